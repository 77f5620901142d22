"""Rows of published files, where the files are: in the sample data, and in the folder that VLMENV_PUBLISHED names."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import ROOT, SHARED

FACTS: dict[str, dict[str, Any]] = json.loads((ROOT / "benchmarks" / "published_rows.json").read_text("utf-8"))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("published_rows")


@pytest.mark.slow
@pytest.mark.parametrize("path", FACTS)
def test_every_row_is_read_and_its_truth_scores(path: str, script: ModuleType) -> None:
    folders = [SHARED, *([Path(os.environ["VLMENV_PUBLISHED"])] if "VLMENV_PUBLISHED" in os.environ else [])]
    file = next(file for file in script.FILES if file.path == path)
    place = script.find(file, folders)
    if place is None:
        pytest.skip(f"needs {path} of {file.source}, in a folder that VLMENV_PUBLISHED names")
    read = script.read_file(file, place)
    assert read.faults == []
    known = FACTS[path]
    assert (read.rows, read.read, read.ids) == (known["rows"], known["read"], known["ids"])
    assert (read.kinds, read.left_out) == (known["kinds"], known["left_out"])


def test_no_known_file_has_rows_that_fail() -> None:
    assert all(known["read"] + sum(known["left_out"].values()) == known["rows"] for known in FACTS.values())
