"""Several machines, as namespaces of this one: each has a network, a name, and memory for files (`/dev/shm`).

They share this machine's disk, as machines of a cluster share one. As by default with Debian and Ubuntu, the name of a
machine stands for 127.0.1.1 to itself.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT

ADDRESSES = {"node1": "10.77.0.1", "node2": "10.77.0.2", "gpu-box": "10.77.0.3"}
"""by name: two machines that train, and one that serves"""
TINY = ["--prompts-per-step", "4", "--group-size", "2", "--eval-limit", "0", "--device", "cpu", "--output", "run"]
LIMIT = 600
"""seconds"""
_ENTER = """
echo "$1" > /proc/sys/kernel/hostname
mount -t tmpfs none /dev/shm
mount --bind "$2" /etc/hosts
shift 2
exec "$@"
"""


class Machines:
    """Network namespaces with an address each, on one bridge.

    Args:
        folder: Folder for the names that each machine knows.
    """

    def __init__(self, folder: Path) -> None:
        self._spaces = {name: f"vlmenv-{os.getpid()}-{name}" for name in ADDRESSES}
        self._folder = folder

    def make(self) -> None:
        for name, space in self._spaces.items():
            known = {"localhost": "127.0.0.1", **ADDRESSES, name: "127.0.1.1"}
            (self._folder / name).write_text("".join(f"{address} {one}\n" for one, address in known.items()))
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
        hub = self._spaces["gpu-box"]
        _ip("-n", hub, "link", "add", "eth0", "type", "bridge")
        for name in ("node1", "node2"):
            ends = f"name to-{name} type veth peer name eth0 netns {self._spaces[name]}"
            _ip("-n", hub, "link", "add", *ends.split())
            _ip("-n", hub, "link", "set", f"to-{name}", "master", "eth0", "up")
        for name, address in ADDRESSES.items():
            _ip("-n", self._spaces[name], "address", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", self._spaces[name], "link", "set", "eth0", "up")
            _ip("-n", self._spaces[name], "route", "add", "default", "dev", "eth0")
        subprocess.run([*self.on("node1"), "true"], check=True, capture_output=True, text=True)

    def remove(self) -> None:
        for space in self._spaces.values():
            subprocess.run(["ip", "netns", "delete", space], check=False, capture_output=True)

    def on(self, name: str) -> list[str]:
        """What goes before a command that runs on a machine; the process keeps its number."""
        enter = ["unshare", "--uts", "sh", "-ec", _ENTER, "enter", name, str(self._folder / name)]
        return ["ip", "netns", "exec", self._spaces[name], *enter]

    @contextmanager
    def unplugged(self, name: str) -> Iterator[None]:
        """Cuts a machine off, which nobody tells the others."""
        link = ("-n", self._spaces["gpu-box"], "link", "set", f"to-{name}")
        _ip(*link, "down")
        try:
            yield
        finally:
            _ip(*link, "up")

    @contextmanager
    def walled(self, name: str, port: int) -> Iterator[None]:
        """Lets a machine answer at a port, and connect to no other machine, as a firewall does."""
        rules = [f"ipproto tcp sport {port} lookup main pref 1", "ipproto tcp to 10.77.0.0/24 prohibit pref 2"]
        for rule in rules:
            _ip("-n", self._spaces[name], "rule", "add", *rule.split())
        try:
            yield
        finally:
            for rule in rules:
                _ip("-n", self._spaces[name], "rule", "delete", *rule.split())

    def sent(self, name: str) -> int:
        """Bytes that a machine has sent to the others."""
        file = "/sys/class/net/eth0/statistics/tx_bytes"
        told = subprocess.run([*self.on(name), "cat", file], check=True, capture_output=True, text=True)
        return int(told.stdout)

    def start(self, name: str, *args: str, cwd: Path) -> subprocess.Popen[str]:
        """Starts a script or module on a machine."""
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [*self.on(name), sys.executable, *args], cwd=cwd, env=environment, stdout=pipe, stderr=pipe, text=True
        )

    @contextmanager
    def launched(self, *args: str, cwd: Path) -> Iterator[list[subprocess.Popen[str]]]:
        """The launchers of `vlmenv train` with a rank on each of two machines, as docs/distributed.md starts them."""
        config = str(ROOT / "examples" / "accelerate" / "ddp.yaml")
        main = ["--main_process_ip", "node1", "--main_process_port", "29500"]
        several = ["--num_machines", "2", "--num_processes", "2", *main]
        command = ["-m", "accelerate.commands.launch", "--config_file", config, *several]
        launchers = [
            self.start(name, *command, "--machine_rank", str(rank), "-m", "vlmenv", "train", *args, cwd=cwd)
            for rank, name in enumerate(("node1", "node2"))
        ]
        try:
            yield launchers
        finally:
            for launcher in launchers:
                launcher.terminate()
            for launcher in launchers:
                launcher.communicate(timeout=LIMIT)

    def train(self, *args: str, cwd: Path) -> None:
        """Trains on two machines until the run's end, which must be a good one."""
        with self.launched(*args, cwd=cwd) as launchers:
            told = [launcher.communicate(timeout=LIMIT) for launcher in launchers]
        assert [launcher.returncode for launcher in launchers] == [0, 0], "".join(map("".join, told))


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    if missing := [one for one in ("ip", "unshare") if shutil.which(one) is None]:
        pytest.skip(f"needs the command {missing[0]}")
    made = Machines(tmp_path_factory.mktemp("machines"))
    try:
        made.make()
    except subprocess.CalledProcessError as error:
        made.remove()
        pytest.skip(f"no machines can be made of namespaces here: {error.stderr.strip()}")
    try:
        yield made
    finally:
        made.remove()
