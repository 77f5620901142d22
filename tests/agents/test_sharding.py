from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def test_a_sharded_policy_learns_as_a_whole_one(tmp_path: Path) -> None:
    """Under FSDP2 it has the same gradients, and its gathered state is saved as its own would be."""
    cases = ["full", "lora"] if importlib.util.find_spec("peft") else ["full"]
    run("sharded.py", str(tmp_path), *cases)
    assert sorted(path.name for path in tmp_path.iterdir()) == cases


@pytest.fixture(scope="module")
def collectives(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Collectives of two ranks for a micro-batch: units of weights, gathers before the loss, events after it."""
    file = tmp_path_factory.mktemp("collectives") / "found.json"
    run("collectives.py", str(file))
    return json.loads(file.read_text())


@pytest.mark.parametrize("case", ["plain", "checkpointing"])
def test_a_pass_gathers_each_block_once_and_reduces_its_gradient_before_the_next(case: str, collectives: Any) -> None:
    """Of the root, the weights stay from the forward pass on."""
    found = collectives[case]
    assert found["forward"] == found["units"]
    backward = found["backward"]
    assert backward.count("gather") == found["units"] - 1
    assert backward.count("reduce") == found["units"]
    reduced = [backward[: backward.index(f"block {index}")].count("reduce") for index in reversed(range(6))]
    assert reduced == list(range(6))


def run(script: str, *args: str) -> None:
    """Runs a script of this folder in two processes."""
    path = str(Path(__file__).parent / script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", path, *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
