"""The notebooks of the tutorials run in a real kernel, with their commands at a small size."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from small_data import SMALL

WHY = 'needs the extra "docs": pip install -c constraints.txt -e ".[docs]"'
nbclient = pytest.importorskip("nbclient", reason=WHY)
pytest.importorskip("ipykernel", reason=WHY)
MAKER = runpy.run_path(str(ROOT / ".ci" / "notebooks.py"))

COMMAND = re.compile(r"^vlmenv (\w+)(?:[^\n\\#]|\\\n)*", re.MULTILINE)

pytestmark = pytest.mark.slow


def small(source: str) -> str:
    """A cell whose commands train and measure little."""
    return COMMAND.sub(lambda found: f"{found[0]} {' '.join(SMALL[found[1]])}", source)


def executed(notebook: Any, folder: Path) -> Any:
    """Runs all cells in a folder; the first that fails ends it with its error."""
    for cell in notebook.cells:
        if cell.source.startswith("%%bash"):
            cell.source = small(cell.source)
    metadata = {"metadata": {"path": str(folder)}}
    return nbclient.NotebookClient(notebook, timeout=1200, kernel_name="python3", resources=metadata).execute()


SHOWN = {
    "tutorials/own_data.md": "held-out metric",
    "own_task.md": "PointEnv",
    "own_algorithm.md": "my_algorithm:Median",
}
"""What a run or an environment shows of itself, by page."""


@pytest.mark.parametrize("page", MAKER["TUTORIALS"])
def test_every_cell_runs_from_an_empty_folder(page: str, tmp_path: Path) -> None:
    cells = executed(MAKER["notebook"](page), tmp_path).cells
    outputs = [one for cell in cells for one in cell.get("outputs", []) if one.output_type == "execute_result"]
    assert SHOWN.get(page, "") in "".join(one.data.get("text/html", "") for one in outputs)


def test_a_cell_that_fails_is_told(tmp_path: Path) -> None:
    """A command before the last one of its cell, too."""
    notebook = MAKER["notebook"]("tutorials/reward_hacking.md")
    notebook.cells[1].source = "%%bash -e\nfalse\ntrue"
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="false"):
        executed(notebook, tmp_path)
