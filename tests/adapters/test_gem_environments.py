"""Environments of GEM, trained by vlmenv."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import small_data

from vlmenv.cli import main
from vlmenv.envs.making import make_envs

ENV = "gem_geometry:Geometry3K-v0"


@pytest.fixture
def geometry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gem", reason="needs gem-llm, the extra gem")
    small_data.geometry3k(tmp_path)
    monkeypatch.syspath_prepend(Path(__file__).parent)
    monkeypatch.setenv("GEOMETRY", str(tmp_path / "hiyouga" / "geometry3k"))


@pytest.mark.usefixtures("geometry")
def test_its_grading_is_the_reward() -> None:
    from gem_geometry import Geometry

    rows = Geometry().inner.dataset
    answers = {row["problem"].replace("<image>", ""): row["answer"] for row in rows}
    task = make_envs(ENV, 4, group_size=2).task
    for index in range(8):
        sample = task.source.get(index)
        assert sample.images[0].shape == (64, 64, 3)
        rewards = [task.score(f"\\boxed{{{text}}}", sample).reward for text in (answers[sample.question], "-1")]
        assert rewards == [1, 0]


@pytest.mark.slow
@pytest.mark.usefixtures("geometry", "without_pictures")
def test_it_is_trained_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    small = ["--prompts-per-step", "2", "--group-size", "2", "--max-new-tokens", "8", "--eval-limit", "2"]
    main(["train", "--env", ENV, "--steps", "2", "--device", "cpu", "--output", str(run), *small])
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2
    assert all(np.isfinite(step["loss"]) for step in steps)
