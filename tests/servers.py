"""What several tests need: servers that are started, and ended whatever becomes of the test."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def self_signed(folder: Path, address: str) -> tuple[Path, Path]:
    """The files of a certificate for an IP address and of its key, made by openssl."""
    folder.mkdir(exist_ok=True)
    cert, key = folder / "cert.pem", folder / "key.pem"
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    named = ["-days", "2", "-subj", "/CN=vlmenv", "-addext", f"subjectAltName=IP:{address}"]
    subprocess.run([*made, *named, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    return cert, key


def listening() -> set[tuple[str, int]]:
    """Addresses and ports at which this process can be reached."""
    connections = psutil.Process().net_connections("tcp")
    return {(one.laddr.ip, one.laddr.port) for one in connections if one.status == psutil.CONN_LISTEN}


class Served:
    """`vlmenv serve` in a process of its own.

    Args:
        port: Port to listen on.
        options: Options of the command.
        before: What goes before the command, as of another machine.
    """

    def __init__(self, port: int, *options: str, before: Sequence[str] = ()) -> None:
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        place = [] if "--socket" in options else ["--port", str(port)]
        command = [*before, sys.executable, "-m", "vlmenv", "serve", *options, *place]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        )
        self._pipes = {name: getattr(self.process, name) for name in ("stdout", "stderr")}
        self._told: dict[str, list[str]] = {name: [] for name in self._pipes}
        for name, pipe in self._pipes.items():
            threading.Thread(target=lambda n=name, p=pipe: self._told[n].extend(p), daemon=True).start()

    def told(self, name: str = "stdout") -> str:
        return "".join(self._told[name])

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 600
        while "ready" not in self.told():
            assert self.process.poll() is None, self.told("stderr")
            assert time.monotonic() < deadline, self.told("stderr")
            time.sleep(0.05)

    def family(self) -> list[psutil.Process]:
        """vLLM's own processes."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def send(self, number: signal.Signals) -> None:
        """To all of them at once, as when a machine fails."""
        for process in self.family():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ends it by a signal; nothing is left of it, and it complains of nothing."""
        family = self.family() if self.process.poll() is None else []
        self.process.send_signal(number)
        assert self.process.wait(120) == (-number if number == signal.SIGKILL else 128 + number)
        _, alive = psutil.wait_procs(family, timeout=60)
        assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
        assert "Traceback" not in self.told("stderr")


@contextmanager
def serving(port: int, *options: str, before: Sequence[str] = ()) -> Iterator[Served]:
    """A server that is about to start."""
    served = Served(port, *options, before=before)
    try:
        yield served
    finally:
        with suppress(psutil.NoSuchProcess):
            served.send(signal.SIGCONT)
        served.process.terminate()
        served.process.wait(120)


@contextmanager
def serve(model: str | Path, *options: str, port: int | None = None, before: Sequence[str] = ()) -> Iterator[Served]:
    """A server that is ready."""
    with serving(port or free_port(), "--model", str(model), *options, before=before) as served:
        served.wait_until_ready()
        yield served
