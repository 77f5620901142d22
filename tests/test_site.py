"""Links of the Markdown files, as GitHub shows them, and the site that is built of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT

HIDDEN = ("runs", "build", "dist")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)")


def markdown_files() -> list[Path]:
    found = [file.relative_to(ROOT) for file in ROOT.rglob("*.md") if "node_modules" not in file.parts]
    ours = {file for file in found if file.parts[0] not in HIDDEN and not file.parts[0].startswith((".v", ".pytest"))}
    return sorted(file for file in ours if "vlmenv" not in file.parts)  # its links lead to the folders of the root


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to headings: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), flags=re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", one).lower() for one in headings]
    return {re.sub(r"[^\w\- ]", "", one).replace(" ", "-") for one in plain}


@pytest.mark.parametrize("file", markdown_files(), ids=str)
def test_links_lead_to_files_and_headings(file: Path) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    for target, anchor in LINK.findall(FENCE.sub("", text)):
        path = ROOT / file.parent / target if target else ROOT / file
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{target}#{anchor}"


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes about 8 seconds, most of them for docstrings."""
    for module in ("mkdocs", "mkdocstrings", "nbformat"):
        pytest.importorskip(module, reason='needs the extra "docs": pip install -c constraints.txt -e ".[docs]"')
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.chdir(ROOT)
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path)))  # strict: a warning ends it
    for page in (ROOT / "docs").rglob("*.md"):
        assert (tmp_path / page.relative_to(ROOT / "docs").with_suffix(".html")).is_file(), page
    assert 'href="tasks.html"' in (tmp_path / "index.html").read_text()
    assert (tmp_path / "source" / "agents" / "passes.py.txt").read_text() == (ROOT / "agents/passes.py").read_text()
    assert "Rank of low-rank adapters" in (tmp_path / "reference" / "all_options.html").read_text()
    assert 'id="vlmenv.envs.public.VisualTaskEnv"' in (tmp_path / "reference" / "python.html").read_text()
    assert 'href="own_data.ipynb"' in (tmp_path / "tutorials" / "own_data.html").read_text()
    assert json.loads((tmp_path / "tutorials" / "own_data.ipynb").read_text())["nbformat"] == 4
