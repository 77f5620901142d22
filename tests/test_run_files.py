"""`docs/run_files.md` names every file, field and metric of a run, and no metric that no code writes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from conftest import ROOT

import vlmenv
from vlmenv.envs.metrics.detection import STATISTICS

PAGE = (ROOT / "docs" / "run_files.md").read_text(encoding="utf-8")


def documented(heading: str) -> set[str]:
    """The names in the first column of the tables under a heading."""
    text = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    cells = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of PPO, whose metrics are the most."""
    small = {"prompts_per_step": 1, "group_size": 2, "eval_limit": 2, "max_new_tokens": 24, "device": "cpu"}
    output = tmp_path_factory.mktemp("run") / "run"
    return vlmenv.train(algo="ppo", steps=1, eval_every=1, output=output, **small).path


@pytest.mark.slow
def test_every_file_of_a_run_is_on_the_page(run: Path) -> None:
    known = documented("The folder")
    folders = {name.partition("/")[0] for name in known if "/" in name}
    assert {file.name for file in run.iterdir()} <= known | folders
    assert {file.name for file in (run / "before").iterdir()} == {"metrics.json", "answers.jsonl"}
    written = {file.name for file in (run / "samples").iterdir() if file.suffix != ".webp"}
    assert written == {"index.jsonl", "task.json"}
    assert all(f"`{name}`" in PAGE for name in written)


@pytest.mark.slow
def test_every_metric_of_a_run_is_on_the_page(run: Path) -> None:
    known = documented("Metrics of a step")
    places = {"reward/iou": "reward/TERM", "reward/format": "reward/TERM", "completion/box_ratio": "completion/TRAIT"}
    metrics = lines(run / "metrics.jsonl")[0]
    held_out = {name.removeprefix("eval/") for name in metrics if name.startswith("eval/")}
    written = {places.get(name, name) for name in metrics if not name.startswith("eval/")} - {"step"}
    assert {"value/loss", "completion/TRAIT"} <= written <= known
    assert held_out == set(json.loads((run / "before" / "metrics.json").read_text()))
    assert held_out <= documented("Held-out metrics")


@pytest.mark.slow
def test_every_field_of_an_answer_is_on_the_page(run: Path) -> None:
    known = documented("Completions")
    assert set(lines(run / "rollouts.jsonl")[0]) | set(lines(run / "before" / "answers.jsonl")[0]) <= known


@pytest.mark.slow
def test_a_run_shows_itself_in_a_notebook(run: Path) -> None:
    html = vlmenv.Run(run)._repr_html_()
    assert "VLM-REC-v0, ppo, model builtin, 1 steps" in html
    assert f"<td>iou/mean</td><td>{vlmenv.Run(run).before['iou/mean'].value:.3f} (" in html
    assert html.count("<img") == 1
    assert len(html) < 500_000


def names_in_code() -> Iterator[str]:
    """The metrics that modules name."""
    for folder in ("algos", "agents", "vlmenv/runs"):
        for file in (ROOT / folder).glob("*.py"):
            text = file.read_text(encoding="utf-8")
            yield from re.findall(r'"((?:reward|completion|policy|value|score|data|memory|vision)/[a-z_]+)"', text)


def test_metrics_of_the_page_and_of_the_code_are_the_same() -> None:
    """Also those that a short run does not write, such as a correction's."""
    elsewhere = {"reward/format", "completion/box_ratio"}  # a term and a trait, which the watch looks at
    named = {name for name in documented("Metrics of a step") if re.fullmatch(r"[a-z]+/[a-z_]+", name)}
    timed = {name for name in named if name.startswith("time/")}
    assert timed == {"time/sync", "time/rollout", "time/score", "time/update"}
    assert named - timed == set(names_in_code()) - elsewhere


def test_the_held_out_metrics_of_every_task_are_on_the_page() -> None:
    known = documented("Held-out metrics")
    assert set(STATISTICS) <= known
    for task in ("REC", "OVD", "Math", "Caption", "VQA"):
        env = gymnasium.make(f"VLM-{task}-v0").unwrapped
        terms = dict.fromkeys([*env.terms, "clip", "judge"], 1.0)
        sample = env.source.get(0)
        measured = env.measure(env.write_answer(sample), env.target(sample), terms)
        assert {*measured, *env.ratios} <= known, task
