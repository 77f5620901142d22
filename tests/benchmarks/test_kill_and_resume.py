from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("kill_and_resume")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The files that a run leaves."""
    folder, saved = tmp_path / "whole", tmp_path / "whole" / "checkpoints" / "step-1"
    saved.mkdir(parents=True)
    (folder / "before").mkdir()
    for name in ("rollouts.jsonl", "evaluation.json", "best.json", "before/answers.jsonl", "before/metrics.json"):
        (folder / name).write_text("{}\n")
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.5, "time/update": 1.0}) + "\n")
    save_file({"weight": torch.ones(2)}, saved / "model.safetensors")
    torch.save({"step": 1, "state": [{"exp_avg": torch.ones(2)}, (1.0,)]}, saved / "trainer.pt")
    return folder


def rewritten(name: str, old: str, new: str) -> Callable[[Path], object]:
    return lambda run: (run / name).write_text((run / name).read_text().replace(old, new))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda run: None, []),
        (rewritten("metrics.jsonl", '"time/update": 1.0', '"time/update": 2.0'), []),
        (rewritten("metrics.jsonl", "0.5", "0.6"), ["metrics.jsonl"]),
        (rewritten("rollouts.jsonl", "{}", "{}\n{}"), ["rollouts.jsonl"]),
        (lambda run: (run / "before" / "metrics.json").unlink(), ["before/metrics.json"]),
        (lambda run: (run / "checkpoints" / ".step-1").mkdir(), ["checkpoints/.step-1"]),
        (
            lambda run: save_file(
                {"weight": torch.tensor([1.0, 1.0000001])}, run / "checkpoints/step-1/model.safetensors"
            ),
            ["checkpoints/step-1/model.safetensors"],
        ),
        (
            lambda run: torch.save(
                {"step": 1, "state": [{"exp_avg": torch.zeros(2)}, (1.0,)]}, run / "checkpoints/step-1/trainer.pt"
            ),
            ["checkpoints/step-1/trainer.pt"],
        ),
    ],
)
def test_every_difference_is_found(
    script: ModuleType, run: Path, change: Callable[[Path], object], found: list[str]
) -> None:
    other = run.with_name("other")
    shutil.copytree(run, other)
    change(other)
    assert script.differences(run, other) == found
