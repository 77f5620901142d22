from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("case", ["full", "lora"])
def test_a_sharded_policy_has_the_gradients_of_a_whole_one(tmp_path: Path, case: str) -> None:
    if case == "lora":
        pytest.importorskip("peft")
    script = Path(__file__).parent / "sharded.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    result = subprocess.run([*command, str(tmp_path), case], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    assert (tmp_path / "model" / "value_head").is_dir()
