"""Several machines, as namespaces of this one: two that train, and a third with a server."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import machines as several
import psutil
import pytest
import torch
from conftest import ROOT, launch
from machines import ADDRESSES, LIMIT, TINY, Machines
from safetensors.torch import load_file

from vlmenv.runs.checkpoints import find_checkpoint
from vlmenv.runs.run_folder import RunFolder

machines = several.machines
"""a fixture"""


@pytest.fixture
def server(machines: Machines, tmp_path: Path) -> Iterator[str]:
    """Address of the stand-in server on a machine of its own."""
    script = str(Path(__file__).parent / "stand_in_elsewhere.py")
    with machines.start("gpu-box", script, ADDRESSES["gpu-box"], cwd=tmp_path) as process, ExitStack() as stack:
        stack.callback(process.terminate)
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith(f"http://{ADDRESSES['gpu-box']}:")
        yield url


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_two_machines_train_with_a_server_on_a_third(machines: Machines, server: str, tmp_path: Path) -> None:
    engine = ["--engine", "vllm-server", "--server", server, "--weight-transfer", "direct", "--max-staleness", "1"]
    engine += ["--max-new-tokens", "3"]  # as many as the stand-in gives
    rows = [{"problem": f"How many are {i} and 3?", "answer": str(i + 3)} for i in range(8)]  # it sees no images
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ["--env", "VLM-Math-v0", "--dataset", "rows.jsonl"]
    machines.train("--steps", "3", *TINY, *data, *engine, cwd=tmp_path)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3]
    saved = tmp_path / "run" / "checkpoints" / "step-3"
    assert sorted(path.name for path in saved.glob("process-*.pt")) == ["process-0.pt", "process-1.pt"]


@pytest.mark.parametrize("way", ["file", "direct"])
def test_weights_that_do_not_get_to_another_machine_are_told_of(
    way: str, machines: Machines, server: str, tmp_path: Path
) -> None:
    """A file in memory, as the trainer writes it by default, and a trainer that a firewall keeps the server from."""
    asked = ["-m", "vlmenv", "eval", "--device", "cpu", "--eval-limit", "2", "--output", "eval"]
    how = ["--engine", "vllm-server", "--server", server, "--weight-transfer", way]
    with machines.walled("gpu-box", int(server.rpartition(":")[2])):
        _, told = machines.start("node1", *asked, *how, cwd=tmp_path).communicate(timeout=LIMIT)
    expected = {
        "file": r"not on the server's machine: give a shared --weights-folder, or --weight-transfer direct",
        "direct": r"at 10\.77\.0\.1, port \d+: the server does not reach the trainer \(.+\): open the trainer's ports",
    }
    assert re.search(expected[way], told), told
    assert "Traceback" not in told


def submit(machines: Machines, folder: Path, *args: str) -> None:
    """Runs the batch script of the examples on two machines with two ranks each; Slurm's commands are stood in for."""
    started = [f'SLURM_NODEID={i} {shlex.join(machines.on(name))} "$@" &' for i, name in enumerate(("node1", "node2"))]
    commands = {
        "scontrol": ['printf "%s\\n" node1 node2'],
        "srun": ["set -e; shift", "trap 'kill $(jobs -p) || true' EXIT", *started, "wait -n; wait -n"],
    }
    for name, lines in commands.items():
        (folder / name).write_text("\n".join(["#!/bin/bash", *lines, ""]))
        (folder / name).chmod(0o755)
    of_job = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "2"}
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | of_job | {"PATH": path, "RUN": str(folder / "run"), "OMP_NUM_THREADS": "1"}
    command = ["bash", "examples/slurm/train.sbatch", *args]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_copy_on_each_machine_learns_as_copies_in_each_rank(machines: Machines, tmp_path: Path) -> None:
    """Hybrid sharding, by the script for Slurm, beside DDP with four ranks: gradients alone leave a machine."""
    steps = ["--steps", "2", "--warmup-steps", "0", "--save-dtype", "fp32", *TINY[:-2]]
    for name in ("two", "one"):
        (tmp_path / name).mkdir()
    before = machines.sent("node2")
    submit(machines, tmp_path / "two", *steps)
    sent = machines.sent("node2") - before
    done = launch("ddp", "-m", "vlmenv", "train", *steps, "--output", "run", cwd=tmp_path / "one", processes=4)
    assert done.returncode == 0, done.stderr
    own, other = (load_file(next((tmp_path / name).rglob("step-2/model.safetensors"))) for name in ("two", "one"))
    for name, weight in other.items():
        torch.testing.assert_close(own[name], weight, atol=1e-5, rtol=0, msg=lambda told, name=name: f"{name}: {told}")
    for mine, theirs in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert mine["reward/mean"] == theirs["reward/mean"]
        assert mine["policy/grad_norm"] == pytest.approx(theirs["policy/grad_norm"], rel=1e-4)
    gradients = 2 * sum(weight.nbytes for weight in other.values())
    assert gradients < sent < 1.1 * gradients


def test_machines_that_do_not_reach_each_other_are_told_of(
    machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gloo is told to listen where each machine comes to itself. One is refused, and the other waits."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "1")
    with machines.launched(*TINY, cwd=tmp_path) as launchers:
        deadline = time.monotonic() + LIMIT
        while not (ended := [one for one in launchers if one.poll() is not None]):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        told = ended[0].communicate()[1]
    assert re.search(r"error in process \d: the processes of this run do not reach each other \(.*refused", told), told


@pytest.mark.parametrize("end", ["killed", "unplugged"])
def test_a_machine_that_is_lost_ends_the_others(end: str, machines: Machines, tmp_path: Path) -> None:
    """One whose rank is killed says so by its connections; of one that is cut off nothing is heard."""
    options = ["--steps", "100000", "--checkpoint-every", "1", "--keep", "2", "--rank-timeout", "0.5"]
    with machines.launched(*TINY, *options, cwd=tmp_path) as (first, second), ExitStack() as stack:
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
            stack.enter_context(machines.unplugged("node2"))
        told = [launcher.communicate(timeout=LIMIT)[1] for launcher in (first, second)]
    assert first.returncode == second.returncode == 1
    if end == "killed":
        assert "error in process 0: another process has ended; its own message says why" in told[0]
    else:
        assert all("another process has not answered for 30 seconds" in one for one in told)
    assert find_checkpoint(RunFolder(tmp_path / "run")).step > 0
