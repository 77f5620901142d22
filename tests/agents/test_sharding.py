from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path


def test_a_sharded_policy_learns_as_a_whole_one(tmp_path: Path) -> None:
    """Under FSDP2 it has the same gradients, and its gathered state is saved as its own would be."""
    cases = ["full", "lora"] if importlib.util.find_spec("peft") else ["full"]
    script = Path(__file__).parent / "sharded.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run([*command, str(tmp_path), *cases], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == cases
