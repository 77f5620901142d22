"""Notebooks of the tutorials, made from their pages: `python .ci/notebooks.py FOLDER`.

A block of Python becomes a cell, and writes its file first if it begins with `# name.py`. A block of `bash` becomes a
cell that fails with its first command. Other blocks are shown, not run, as on the page.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from nbformat import NotebookNode, v4, writes

DOCS = Path(__file__).parent.parent / "docs"
TUTORIALS = (
    "tutorials/own_data.md",
    "own_task.md",
    "own_algorithm.md",
    "tutorials/reading_a_report.md",
    "tutorials/reward_hacking.md",
)
"""Pages that run from an empty folder on a laptop. "From a laptop to eight GPUs" does not."""

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")
"""A link to a file of the repository: its mark of an image, text, path and anchor."""

_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_RUNS = re.compile(r"```(python|bash)\n(.*)\n```", re.DOTALL)
_FILE = re.compile(r"# (\w+\.py)\n")
_KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
_INTRODUCTION = """\
*Made from the documentation's page of the same title. Run it in an empty folder, with a kernel of the environment into
which vlmenv is installed. The first cell lets the shell find that environment's commands.*"""
_FIRST_CELL = """\
import os
import sysconfig

import vlmenv

os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
print("vlmenv", vlmenv.__version__)"""


def parts(markdown: str) -> Iterator[str]:
    """Code blocks, and what lies between them."""
    at = 0
    for fence in _FENCE.finditer(markdown):
        yield markdown[at : fence.start()]
        yield fence[0]
        at = fence.end()
    yield markdown[at:]


def notebook(page: str) -> NotebookNode:
    """The notebook of a page, a path in `docs/`. Links to other pages become plain text."""
    heading, _, text = (DOCS / page).read_text(encoding="utf-8").partition("\n")
    cells = [v4.new_markdown_cell(f"{heading}\n\n{_INTRODUCTION}"), v4.new_code_cell(_FIRST_CELL)]
    shown = ""
    for part in parts(text):
        if not (block := _RUNS.fullmatch(part)):
            shown += part if part.startswith("```") else LINK.sub(r"\2", part)
            continue
        cells += [v4.new_markdown_cell(shown.strip()), v4.new_code_cell(_source(*block.groups()))]
        shown = ""
    cells.append(v4.new_markdown_cell(shown.strip()))
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"  # and not a random one, so that a page makes one notebook
    return v4.new_notebook(cells=[cell for cell in cells if cell.source], metadata=_KERNEL)


def _source(language: str, code: str) -> str:
    if language == "bash":
        return f"%%bash -e\n{code}"
    file = _FILE.match(code)
    return f"%%writefile {file[1]}\n{code.removeprefix(file[0])}" if file else code


def notebook_path(page: str) -> str:
    """Where a page's notebook is, beside it."""
    return page.removesuffix(".md") + ".ipynb"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for page in TUTORIALS:
        file = folder / Path(notebook_path(page)).name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(writes(notebook(page)), encoding="utf-8")
        print(file)
