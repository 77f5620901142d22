from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from vlmenv.cli import main


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("algorithms")


@pytest.fixture
def runs(script: ModuleType) -> ModuleType:
    return importlib.import_module("findings.runs")


@pytest.fixture
def commands(runs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What is run; in this process, which need not import everything again."""
    called: list[tuple[str, ...]] = []

    def run(*args: str) -> None:
        called.append(args)
        main(list(args))

    monkeypatch.setattr(runs, "_vlmenv", run)
    return called


def test_runs_are_trained_once_and_taken_up(
    script: ModuleType, commands: list[tuple[str, ...]], tmp_path: Path
) -> None:
    envs, output = ("VLM-REC-v0", "VLM-VQA-v0"), tmp_path / "table.md"
    args = script.Args(envs, ("grpo", "sft"), 1, 2, 2, 2, runs=tmp_path / "runs", output=output)
    script.main(args)
    assert len(commands) == 4
    table = output.read_text()
    assert [line for line in table.splitlines() if line.startswith("## ")] == [f"## {env}" for env in envs]
    assert len(re.findall(r"^\| grpo (\| \d\.\d{3} ){4}\| \d+ \|$", table, re.M)) == 2
    assert len(re.findall(r"^\| sft \| [^–]* \| – \| – \| ", table, re.M)) == 2
    assert Image.open(output.with_suffix(".png")).size[0] == 700
    cut = tmp_path / "runs" / "VLM-REC-v0" / "grpo-seed0"
    (cut / "evaluation.json").unlink()
    script.main(args)
    assert commands[4:] == [("train", "--resume", str(cut))]
    assert output.read_text() == table


def test_runs_of_another_kind_are_refused(script: ModuleType, commands: list[tuple[str, ...]], tmp_path: Path) -> None:
    args = script.Args(only=("sft",), seeds=1, steps=1, prompts=2, limit=1, runs=tmp_path)
    script.main(args)
    args.steps = 3
    with pytest.raises(SystemExit, match="sft-seed0 is a run with steps 1, not 3"):
        script.main(args)
    (tmp_path / "model.sha256").write_text("0")
    with pytest.raises(SystemExit, match="of another built-in model"):
        script.main(args)
    assert len(commands) == 1


def test_what_is_read_of_a_run(script: ModuleType, runs: ModuleType, tmp_path: Path) -> None:
    metric = '{"iou/mean": {"value": %s}, "format": {"value": 1.0}}'
    (tmp_path / "evaluation.json").write_text(f'{{"before": {metric % 0.25}, "after": {metric % 0.75}}}')
    rows = [f'{{"step": {i}, "reward/mean": {i}, "time/rollout": 2, "time/update": 0.5}}\n' for i in range(1, 21)]
    (tmp_path / "metrics.jsonl").write_text("".join(rows))
    run = script.Run.read(tmp_path)
    assert (run.metric, run.before, run.after, run.seconds) == ("iou/mean", 0.25, 0.75, 50)
    other = script.Run("iou/mean", 0.25, 0.5, run.rewards + 1, 60)
    assert runs.values({"a": {"value": 1.0, "low": 0.5}}) == {"a": 1.0}
    row = "| grpo | 0.250 | 0.750 / 0.500 | 1.500 / 2.500 | 19.500 / 20.500 | 50 / 60 |"
    assert script.row("grpo", [run, other]) == row


def test_smoothing_is_a_mean_of_as_many_as_there_are(runs: ModuleType) -> None:
    smooth = runs.smooth(np.arange(60.0), 3)
    np.testing.assert_allclose(smooth[[0, 1, 30, 59]], [0.5, 1, 30, 58.5])
