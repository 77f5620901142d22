"""The batch script for Slurm, with commands of the cluster that print what they are told."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPT = ROOT / "examples" / "slurm" / "train.sbatch"
COMMANDS = {
    "scontrol": 'printf "%s\\n" node7 node8',
    "srun": 'shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
    "accelerate": 'echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT $*"',
}


def submit(folder: Path, *args: str) -> list[str]:
    """The launchers' arguments, by machine."""
    for name, body in COMMANDS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    of_job = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    environment = os.environ | of_job | {"PATH": f"{folder}:{os.environ['PATH']}", "RUN": str(folder / "my run")}
    done = subprocess.run(["bash", SCRIPT, *args], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_the_script_is_one_of_bash() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)


def test_each_machine_launches_its_ranks(tmp_path: Path) -> None:
    first, second = submit(tmp_path, "--model", "my model")
    assert first.startswith("240 launch --config_file examples/accelerate/fsdp2.yaml --num_machines 2")
    assert "--num_processes 16 --machine_rank 0 --main_process_ip node7 --main_process_port 29500" in first
    assert first.endswith(f"-m vlmenv train --shard-within 8 --output {tmp_path}/my run --model my model")
    assert second == first.replace("--machine_rank 0", "--machine_rank 1")


def test_the_same_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "my run").mkdir()
    (tmp_path / "my run" / "config.yaml").touch()
    first, _ = submit(tmp_path, "--model", "my model")
    assert first.endswith(f"-m vlmenv train --shard-within 8 --resume {tmp_path}/my run")


def test_a_run_needs_a_name() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RUN"}
    with pytest.raises(subprocess.CalledProcessError, match="exit status 1"):
        subprocess.run(["bash", SCRIPT], env=environment, check=True, capture_output=True)
