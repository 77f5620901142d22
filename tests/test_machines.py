"""Several machines, as network namespaces of this one: two that train, and a third with a server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT

from vlmenv.runs.checkpoints import find_checkpoint
from vlmenv.runs.run_folder import RunFolder

ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2", "server": "10.77.0.3"}
TINY = ["--prompts-per-step", "4", "--group-size", "2", "--eval-limit", "0", "--device", "cpu", "--output", "run"]
LIMIT = 300
"""seconds"""


class Machines:
    """Network namespaces with an address each, on one bridge."""

    def __init__(self) -> None:
        self._names = {name: f"vlmenv-{os.getpid()}-{name}" for name in ADDRESSES}

    def make(self) -> None:
        for name in self._names.values():
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        hub = self._names["server"]
        _ip("-n", hub, "link", "add", "eth0", "type", "bridge")
        for name in ("a", "b"):
            _ip(
                "-n",
                hub,
                "link",
                "add",
                "name",
                f"to-{name}",
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                self._names[name],
            )
            _ip("-n", hub, "link", "set", f"to-{name}", "master", "eth0", "up")
        for name, address in ADDRESSES.items():
            _ip("-n", self._names[name], "address", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", self._names[name], "link", "set", "eth0", "up")

    def remove(self) -> None:
        for name in self._names.values():
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    def unplug(self, name: str) -> None:
        """Cuts a machine off, which nobody tells the others."""
        _ip("-n", self._names["server"], "link", "set", f"to-{name}", "down")

    def start(self, name: str, *args: str, cwd: Path) -> subprocess.Popen[str]:
        command = ["ip", "netns", "exec", self._names[name], sys.executable, *args]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=cwd, env=environment, stdout=pipe, stderr=pipe, text=True)

    @contextmanager
    def training(self, *args: str, cwd: Path) -> Iterator[list[subprocess.Popen[str]]]:
        """A rank on each of two machines, as docs/distributed.md starts them."""
        config = str(ROOT / "examples" / "accelerate" / "ddp.yaml")
        several = ["--num_machines", "2", "--num_processes", "2", "--main_process_ip", ADDRESSES["a"]]
        command = [
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            config,
            *several,
            "--main_process_port",
            "29500",
        ]
        train = ["-m", "vlmenv", "train", *TINY, *args]
        launchers = [
            self.start(name, *command, "--machine_rank", str(rank), *train, cwd=cwd) for rank, name in enumerate("ab")
        ]
        try:
            yield launchers
        finally:
            for launcher in launchers:
                launcher.terminate()
            for launcher in launchers:
                launcher.communicate(timeout=LIMIT)


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip")
    made = Machines()
    try:
        made.make()
        yield made
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces can be made here: {error.stderr.strip()}")
    finally:
        made.remove()


@pytest.fixture
def server(machines: Machines, tmp_path: Path) -> Iterator[str]:
    """Address of the stand-in server on a machine of its own."""
    script = str(Path(__file__).parent / "stand_in_elsewhere.py")
    with machines.start("server", script, ADDRESSES["server"], cwd=tmp_path) as process, ExitStack() as stack:
        stack.callback(process.terminate)
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith(f"http://{ADDRESSES['server']}:")
        yield url


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_two_machines_train_with_a_server_on_a_third(machines: Machines, server: str, tmp_path: Path) -> None:
    engine = ["--engine", "vllm-server", "--server", server, "--weight-transfer", "direct", "--max-staleness", "1"]
    engine += ["--max-new-tokens", "3"]  # as many as the stand-in gives
    rows = [{"problem": f"How many are {i} and 3?", "answer": str(i + 3)} for i in range(8)]  # it sees no images
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ["--env", "VLM-Math-v0", "--dataset", "rows.jsonl"]
    with machines.training("--steps", "3", *data, *engine, cwd=tmp_path) as launchers:
        told = [launcher.communicate(timeout=LIMIT) for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], "".join(map("".join, told))
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3]
    saved = tmp_path / "run" / "checkpoints" / "step-3"
    assert sorted(path.name for path in saved.glob("process-*.pt")) == ["process-0.pt", "process-1.pt"]


@pytest.mark.parametrize("end", ["killed", "unplugged"])
def test_a_machine_that_is_lost_ends_the_others(end: str, machines: Machines, tmp_path: Path) -> None:
    """One whose rank is killed says so by its connections; of one that is cut off nothing is heard."""
    options = ["--steps", "100000", "--checkpoint-every", "1", "--keep", "2", "--rank-timeout", "0.5"]
    with machines.training(*options, cwd=tmp_path) as (first, second):
        deadline = time.monotonic() + LIMIT
        saved = tmp_path / "run" / "checkpoints"
        while not list(saved.glob("step-*")):
            assert time.monotonic() < deadline
            assert first.poll() is None, "".join(first.communicate())
            time.sleep(0.05)
        if end == "killed":
            (rank,) = psutil.Process(second.pid).children()
            rank.kill()
        else:
            machines.unplug("b")
        told = [launcher.communicate(timeout=LIMIT)[1] for launcher in (first, second)]
    assert first.returncode == second.returncode == 1
    if end == "killed":
        assert "error in process 0: another process has ended; its own message says why" in told[0]
    else:
        assert all("another process has not answered for 30 seconds" in one for one in told)
    assert find_checkpoint(RunFolder(tmp_path / "run")).step > 0
