from __future__ import annotations

from pathlib import Path

import pytest
from conftest import launch

from vlmenv.agents.engines.ranks import broadcast_from_main, num_processes
from vlmenv.core.errors import EngineError


def test_the_main_process_works_for_both(tmp_path: Path) -> None:
    """What it makes is the other's too, and so is its failure."""
    done = launch("ddp", str(Path(__file__).parent / "from_main.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr
    files = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert files == {"work-0": "", "told-0": "failed in 0", "told-1": "failed in 0"}


def test_one_process_works_for_itself() -> None:
    def fail() -> None:
        raise EngineError("no")

    assert num_processes() == 1
    assert broadcast_from_main(lambda: 5) == 5
    with pytest.raises(EngineError, match="no"):
        broadcast_from_main(fail)
