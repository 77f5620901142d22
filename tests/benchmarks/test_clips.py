"""The benchmark of videos runs at a tiny size, and both of its ways compute the same."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT


@pytest.mark.slow
def test_both_ways_are_measured_and_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # the tests' own number stays
    script = importlib.import_module("videos")
    sizes = {"size": "tiny", "side": 32, "group_size": 2, "new_tokens": 3, "rounds": 1}
    script.main(script.Args(frames=(6,), output=tmp_path / "table.md", **sizes))
    table = (tmp_path / "table.md").read_text()
    lines = [line for line in table.splitlines() if line.startswith("| 6 |")]
    assert [line.split(" | ")[2] for line in lines] == ["once per group", "repeated"]
    assert all(float(re.findall(r"\de[-+]\d\d", line)[0]) < 1e-4 for line in lines)
    once, repeated = (int(line.split(" | ")[-2].replace(",", "")) for line in lines)
    assert once <= repeated
