"""Verdicts of MATH-Vision on published answers, where the files are: in the folder that VLMENV_PUBLISHED names."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("against_math_vision")


@pytest.mark.slow
def test_the_verdicts_agree(script: ModuleType) -> None:
    """At every 40th question; the page has all with choices."""
    folder = Path(os.environ.get("VLMENV_PUBLISHED", "")) / "MathVision"
    if not (folder / "outputs").is_dir():
        pytest.skip("needs MATH-V's repository as MathVision in a folder that VLMENV_PUBLISHED names")
    found = script.judge(folder, 40, 400)
    choices = [one for one in found if one.is_choice]
    assert len(choices) == 16 * 39
    assert sum(one.ours == one.theirs for one in choices) / len(choices) > 0.93
    assert sum(one.theirs and not one.ours for one in choices) <= 3


def test_verdicts_are_counted_and_classed(script: ModuleType) -> None:
    def verdict(text: str, ours: bool, theirs: bool) -> object:
        return script.Verdict("m", "1", True, "B", ("1 g", "50^\\circ"), text, ours, theirs)

    page = script.describe(
        [
            verdict("B", True, True),
            verdict("A", False, False),
            verdict("\\textbf{(B) }", True, False),
            verdict("50", True, False),
            verdict("C", False, True),
        ]
    )
    assert "| both right | 1 | 0 |" in page
    assert "| agreement | 40.0 % | 0.0 % |" in page
    assert "| a letter in font commands or brackets, as `\\boxed{\\textbf{(E) } 50}` | 1 | 0 |" in page
    assert "| the text of the truth, but for signs and fonts | 1 | 0 |" in page
    assert "| others | 1 | 0 |" in page
