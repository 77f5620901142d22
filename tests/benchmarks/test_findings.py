"""The papers' findings in miniature: here still smaller, to see that the scripts run and tell what they measured."""

from __future__ import annotations

import importlib
import json
import re
from collections import Counter
from itertools import islice
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml
from conftest import ROOT
from PIL import Image
from small_data import small_pipeline

from vlmenv.cli import main
from vlmenv.core.answers import Detection
from vlmenv.envs.data.scenes import QUESTION, SHAPES, sample_scene
from vlmenv.envs.geometry import DETECTIONS
from vlmenv.envs.ovd import OVDEnv
from vlmenv.envs.rewards.detection import od_length_reward
from vlmenv.envs.zoom import read_crop
from vlmenv.runs.watch import drift

SMALL = {
    "hacking": {"prompts": 1, "lessons": 1, "every": 1},
    "zero_variance": {"prompts": 1},
    "two_stages": {"prompts": 1, "steps": 2},
    "zoom": {"prompts": 1, "steps": 2, "parts": 1, "dialogues": 1},
    "shortcut": {"prompts": 1, "rows": 4, "every": 1, "algos": ("grpo", "papo_g")},
    "distillation": {"prompts": 1, "every": 1, "teaching": 1, "teacher_steps": 1, "equal_steps": 1},
    "quality": {"prompts": 1, "rows": 2, "every": 1},
    "sampling": {"prompts": 1, "pool": 40, "again": 1, "rows": 3, "every": 1},
    "forgetting": {"sft_steps": 1, "prompts": 1, "every": 1},
    "sparse": {"prompts": 1, "steps": 2, "rows": 2, "lessons": 1},
    "scale": {"widths": (64, 128), "lessons": 1, "prompts": 1, "every": 1},
}
SLOW = ("sampling", "forgetting")

FIRST_CELLS = (
    "before|publ|map|od_length|grpo|papo|opd|sft|as they|left|…|perc|both|reas|with|all|sampled|online|rev|det|amb|VLM|"
    "other|more|KL|\\d"
)
"""How the rows with results begin."""


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What is run is run in this process, which need not import everything again."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "findings")
    module = importlib.import_module("runs")
    monkeypatch.setattr(module, "_vlmenv", lambda *args: main(list(args)))
    return module


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in SMALL])
def test_a_finding(name: str, runs: ModuleType, tmp_path: Path) -> None:
    script, output = importlib.import_module(name), tmp_path / f"{name}.md"
    args = script.Args(
        **{"seeds": 1, "steps": 1, "limit": 2, "runs": tmp_path / "runs", "output": output} | SMALL[name]
    )
    script.main(args)
    text = output.read_text()
    rows = [line for line in text.splitlines() if re.match(rf"\| ({FIRST_CELLS})", line)]
    assert (
        len(rows)
        == {
            "hacking": 3,
            "zero_variance": 3,
            "two_stages": 5,
            "zoom": 8,
            "shortcut": 3,
            "distillation": 3,
            "quality": 3,
            "sampling": 5,
            "forgetting": 11,
            "scale": 2,
            "sparse": 5,
        }[name]
    )
    for row in rows[1:]:
        assert re.search(r"\d\.\d{3}", row)
    assert f"{name}.png" in text
    assert Image.open(output.with_suffix(".png")).size[0] == 900
    models = list((tmp_path / "runs").glob("*seed0*/checkpoints/step-*"))
    several = {"two_stages": 4, "sparse": 4, "distillation": 3, "forgetting": 3, "zoom": 2, "scale": 2}
    assert len(models) == several.get(name, len(rows) - 1)
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("metrics.json*")}
    script.main(args)  # nothing is trained or measured anew
    assert output.read_text() == text
    assert {file: file.stat().st_mtime_ns for file in written} == written


@pytest.mark.slow
def test_the_built_in_run_beside_supervision(runs: ModuleType, tmp_path: Path) -> None:
    script, output = importlib.import_module("rec_builtin"), tmp_path / "rec_builtin.md"
    args = script.Args(seeds=1, steps=2, limit=2, runs=tmp_path / "runs", output=output)
    script.main(args)
    text = output.read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    names = ["built-in model", "GRPO, seed 0", "supervised, loose labels", "supervised, exact labels"]
    assert [row[0].strip("| ") for row in rows[1:]] == names
    evaluation = runs.evaluation_of(tmp_path / "runs" / "seed0")
    assert rows[2][1:5] == [f"{evaluation[name]:.3f}" for name in script.COLUMNS]
    assert sorted(file.parent.name for file in (tmp_path / "runs").glob("*/vlmenv.json")) == ["exact", "loose"]
    script.main(args)  # nothing is trained or measured anew
    assert output.read_text() == text


@pytest.mark.slow
def test_newer_tasks_are_learnt_from_a_shipped_model(runs: ModuleType, tmp_path: Path) -> None:
    script, output = importlib.import_module("new_tasks"), tmp_path / "new_tasks.md"
    how = {"tasks": ("VLM-Point-v0",), "model": "builtin-tasks", "steps": 1, "seeds": 2, "limit": 2}
    script.main(script.Args(**how, runs=tmp_path / "runs", output=output))
    (row,) = [line for line in output.read_text().splitlines() if line.startswith("| VLM-")]
    found = [runs.evaluation_of(tmp_path / "runs" / f"point-{seed}")["f1/mean"] for seed in range(2)]
    assert f"| {runs.seeds_cell(found)} |" in row
    assert "--model builtin-tasks" in output.read_text()


@pytest.mark.slow
def test_the_pipeline_with_several_seeds(runs: ModuleType, tmp_path: Path) -> None:
    script, output = importlib.import_module("pebr_r1"), tmp_path / "pebr_r1.md"
    file = small_pipeline("pebr_r1_builtin", tmp_path)
    args = script.Args(seeds=2, pipeline=file, runs=tmp_path / "runs", output=output)
    script.main(args)
    rows = [line.split(" | ") for line in output.read_text().splitlines() if line.startswith("| ")]
    assert [row[0].strip("| ") for row in rows] == ["", "---", *script.METRICS]
    reports = [runs.piped(tmp_path / "runs" / f"seed{seed}", file) for seed in range(2)]
    told = float(rows[2][4].split()[0])
    assert told == pytest.approx(np.mean([one["reasoning"]["perception: clip"]["value"] for one in reports]), abs=1e-3)
    seeds = [yaml.safe_load((tmp_path / "runs" / f"seed{seed}.yaml").read_text()) for seed in range(2)]
    assert [one["stages"]["reasoning"]["train"]["seed"] for one in seeds] == [0, 1]


@pytest.mark.slow
def test_a_mix_beside_its_tasks(runs: ModuleType, tmp_path: Path) -> None:
    script, output = importlib.import_module("mix"), tmp_path / "mix.md"
    args = script.Args(seeds=1, steps=1, prompts=1, limit=2, runs=tmp_path / "runs", output=output)
    script.main(args)
    rows = [line for line in output.read_text().splitlines() if line.startswith("| VLM-")]
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in script.METRICS]
    for name in script.METRICS:
        counts = [shown(tmp_path / "runs" / f"{run}-seed0", name) for run in ("mix", f"{name}-1", f"{name}-3")]
        assert counts == [1, 1, 3]


def shown(run: Path, name: str) -> int:
    """The number of samples of a task that a run has shown."""
    records = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    return len({record["index"] for record in records if record.get("task", name) == name})


def test_lessons_know_no_kind_of_detail(runs: ModuleType) -> None:
    lessons = importlib.import_module("zoom_lessons")
    task = lessons.Dialogues()
    samples = [task.source.get(index) for index in range(300)]
    crops = [read_crop(task.write_turn(sample, ())) for sample in samples]
    for kind in ("tiny", "plain"):
        asked = [crop is not None for crop, sample in zip(crops, samples, strict=True) if sample.subject == kind]
        assert 0.2 < np.mean(asked) < 0.46
    crop, sample = next((crop, sample) for crop, sample in zip(crops, samples, strict=True) if crop)
    assert crop.box == sample.place


def test_lessons_of_parts_are_parts_of_dialogues(runs: ModuleType) -> None:
    lessons = importlib.import_module("zoom_lessons")
    task, first, close_up = lessons.Dialogues(**lessons.SHOWN), lessons.FirstTurns(), lessons.CloseUps()
    samples = [task.source.get(index) for index in range(30)]
    for sample in samples:
        asked = task.write_turn(sample, ())
        assert first.write_answer(sample) == asked
        np.testing.assert_array_equal(first.observe(sample)["images"][0], task.observe(sample)["images"][0])
        if read_crop(asked) is not None:
            assert task.write_turn(sample, (asked,)) == task.write_answer(sample)
            (shown,) = close_up.observe(sample)["images"]
            np.testing.assert_array_equal(shown, task.respond(sample, (asked,)).images[0])
            assert close_up.write_turn(sample, ()) == close_up.write_answer(sample)
    assert len({first.write_answer(sample) == task.write_answer(sample) for sample in samples}) == 2


def test_scenes_of_other_kinds(runs: ModuleType, tmp_path: Path) -> None:
    script, shown = importlib.import_module("other_scenes"), {}
    for kind in ("as in training", *script.KINDS):
        file = script.write_scenes(tmp_path / kind, kind, 6)
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        boxes = [json.loads(row["conversations"][1]["value"]) for row in rows]
        sides = [max(box[2] - box[0], box[3] - box[1]) for box in boxes]
        pictures = [np.asarray(Image.open(file.parent / row["image"])) for row in rows]
        shown[kind] = sides, pictures, rows[0]["conversations"][0]["value"]
    usual = shown["as in training"]
    assert all(16 <= side <= 40 for side in usual[0])
    assert all(side <= 14 or side >= 42 for side in shown["other sizes"][0])
    assert "Point out the" in shown["other phrasing"][2]
    assert "Locate the" in usual[2]
    assert np.array_equal(shown["other phrasing"][1], usual[1])
    assert not np.array_equal(shown["other shades"][1], usual[1])
    assert shown["other shades"][0] == usual[0]


def test_the_published_reward_leaves_its_doors_open(runs: ModuleType) -> None:
    published = importlib.import_module("published").published_map
    cat, dog, near = (
        Detection(*one) for one in (("cat", (10, 10, 50, 50)), ("dog", (0, 0, 9, 9)), ("cat", (12, 10, 52, 50)))
    )
    assert published("", (cat,), (cat,)) == pytest.approx(1)
    assert published("", (cat,), (cat, dog)) == pytest.approx(1)  # a label that nobody asked for
    assert published("", (cat,), (cat, *[near] * 20)) == pytest.approx(1)  # boxes after the last true one
    assert published("", (cat,), (dog, cat)) == pytest.approx(1)
    assert published("", (cat,), (near, cat)) < 1
    assert published("", (cat, dog), (cat,)) == pytest.approx(0.5)
    assert published("", (cat,), None) == 0
    assert published("", (), None) == published("", (), ()) == 1
    assert published("", (), (cat,)) == 0


def test_the_watch_warns_while_the_published_reward_is_content(runs: ModuleType) -> None:
    """Answers take on surplus boxes, more in each step: the published reward stays at 1, and held-out AP falls."""
    published, careless = importlib.import_module("published").published_map, importlib.import_module("careless")
    task, rng = OVDEnv(), np.random.default_rng(0)
    samples = [sample for sample in map(task.source.get, range(20)) if sample.target]
    history: list[dict[str, float]] = []
    for step in range(10):
        found: list[tuple[float, ...]] = []
        for sample in samples:
            boxes, kinds = sample.target, [kind for kind in SHAPES if kind in sample.question]
            for _ in range(step):
                boxes += careless.surplus(sample.target, kinds, rng)
            text = task.answer_format.write(DETECTIONS.write(boxes))
            answered = task.parse(text)
            box_ratio = task.traits(answered, sample.target)["box_ratio"]
            image_ap = task.measure(text, sample.target, {})["image_ap/mean"]
            penalised = od_length_reward(text, sample.target, task.answer_format)
            found.append((image_ap, box_ratio, published(text, sample.target, answered), penalised))
        names = ("eval/image_ap/mean", "completion/box_ratio", "published", "od_length")
        history.append(dict(zip(names, map(float, np.mean(found, axis=0)), strict=True)))
    assert {round(one["published"], 6) for one in history} == {1.0}
    assert history[-1]["od_length"] < 0.5 < history[0]["od_length"]
    assert drift(history[:1], 1.0, "image_ap/mean") is None
    message = drift(history, 1.0, "image_ap/mean")
    assert message is not None
    assert "box_ratio" in message


def test_careless_annotators_repeat_what_is_there(runs: ModuleType) -> None:
    careless = importlib.import_module("careless")
    task = careless.Careless()
    samples = [task.source.get(index) for index in range(200)]
    repeated = 0
    for sample in samples:
        answered = task.parse(task.write_answer(sample))
        assert answered[: len(sample.target)] == sample.target
        for surplus in answered[len(sample.target) :]:
            assert surplus.label in sample.question
            assert any(np.abs(np.subtract(surplus.box, true.box)).max() <= careless.SHIFT for true in sample.target)
        repeated += len(answered) > len(sample.target)
    assert 0.2 < repeated / sum(bool(sample.target) for sample in samples) < 0.4


def test_ambiguous_expressions_fit_several_shapes(runs: ModuleType) -> None:
    quality = importlib.import_module("quality")
    for share in (0.0, 1.0):
        for sample in islice(quality.samples(share), 30):
            scene, _ = sample_scene("train", int(sample.id.removeprefix("scene-")))
            expressions = {QUESTION.format(expression=text): fitting for text, fitting in quality.ambiguous(scene)}
            assert (sample.question in expressions) == bool(share)
            assert sample.target in {shape.box for shape in expressions.get(sample.question, scene.shapes)}
            assert all(len(fitting) > 1 for fitting in expressions.values())


def test_a_file_of_mostly_useless_rows(runs: ModuleType, tmp_path: Path) -> None:
    script = importlib.import_module("sampling")
    pool = tmp_path / "pool"
    pool.mkdir()
    for level, number in {"easy": 20, "medium": 9, "hard": 12}.items():
        rows = [f'"{level} {i}"\n' for i in range(number)]
        (pool / f"{level}.jsonl").write_text("".join(rows))
        again = tmp_path / f"{level}-again"
        again.mkdir()
        (again / f"{level}.jsonl").write_text("".join(rows[::2]))  # every other row was so again
        (again / "summary.json").write_text("{}")
    mixed = script.file_of_rows(pool, script.Args(rows=15, runs=tmp_path))
    chosen = [json.loads(line).split() for line in mixed.read_text().splitlines()]
    assert Counter(level for level, _ in chosen) == {"easy": 6, "medium": 3, "hard": 6}
    assert all(int(number) % 2 == 0 for level, number in chosen if level != "medium")
    with pytest.raises(SystemExit, match="raise --pool"):
        script.file_of_rows(pool, script.Args(rows=20, runs=tmp_path))
