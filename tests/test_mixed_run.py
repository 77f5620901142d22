"""A run on two tasks: metrics, evaluation, pictures, best models and data by task, and resuming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from vlmenv.cli import main
from vlmenv.runs.manifest import damage, read_manifest

TASKS = ("VLM-REC-v0", "questions")
TINY = ["--steps", "4", "--prompts-per-step", "3", "--group-size", "2", "--eval-limit", "2", "--device", "cpu"]


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def timeless(run: Path) -> list[dict[str, Any]]:
    kept = rows(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/", "tokens_per_"))} for row in kept]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows for one of the tasks, and a run that has checkpoints after steps 2 and 4."""
    folder: Path = tmp_path_factory.mktemp("mixed")
    Image.new("RGB", (64, 64), "red").save(folder / "one.png")
    turns = [{"from": "human", "value": "<image>Where is it?"}, {"from": "gpt", "value": "[1, 2, 30, 40]"}]
    lines = [json.dumps({"id": i, "image": "one.png", "conversations": turns}) for i in range(6)]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    sections = {
        TASKS[0]: {"dataset": [str(folder / "rows.jsonl")], "rewards": {"iou": 1.0}},
        TASKS[1]: {"env": "VLM-VQA-v0"},
    }
    (folder / "mix.yaml").write_text(yaml.safe_dump(sections))
    mix = ["--mix", f"{TASKS[0]}:2", TASKS[1], "--mix-file", str(folder / "mix.yaml")]
    every = ["--eval-every", "2", "--checkpoint-every", "2"]
    main(["train", *mix, *every, *TINY, "--output", str(folder / "run")])
    return folder


@pytest.mark.slow
def test_everything_is_told_by_task(place: Path) -> None:
    run = place / "run"
    metrics, records = rows(run / "metrics.jsonl"), rows(run / "rollouts.jsonl")
    for step, line in enumerate(metrics, 1):
        own = {name: [one for one in records if (one["step"], one["task"]) == (step, name)] for name in TASKS}
        assert [len(found) for found in own.values()] == [4, 2]
        for name, found in own.items():
            mean = sum(one["reward"] for one in found) / len(found)
            assert line[f"task/{name}/reward/mean"] == pytest.approx(mean, abs=1e-6)
        assert "task/questions/reward/iou" not in line
        assert all(one["rewards"].keys() == {"iou"} for one in own[TASKS[0]])
        assert all("iou" not in one["rewards"] for one in own[TASKS[1]])
    told = json.loads((run / "evaluation.json").read_text())
    first = {TASKS[0]: "VLM-REC-v0/accuracy@0.5", TASKS[1]: "questions/accuracy"}
    for part in ("before", "after"):
        values = [told[part][name]["value"] for name in (next(n for n in told[part] if n.startswith(t)) for t in TASKS)]
        assert told[part]["mean of tasks"]["value"] == pytest.approx((2 * values[0] + values[1]) / 3)
    assert first.keys() == {one["task"] for one in rows(run / "after" / "answers.jsonl")}
    assert {name.partition("/")[0] for name in told["change"]} == set(TASKS)
    for name in ("best", *(f"best-{task}" for task in TASKS)):
        manifest, best = read_manifest(run / name), json.loads((run / f"{name}.json").read_text())
        assert manifest is not None
        assert damage(run / name, manifest) is None
        measured = {line["step"]: line[f"eval/{best['metric']}"] for line in metrics if "eval/mean of tasks" in line}
        assert best["value"] == max(measured.values()) == measured[best["step"]]
    for picture in ("curve", "samples"):
        assert all((run / f"{picture}-{task}.png").is_file() for task in TASKS)
    keys = {one["key"] for one in rows(run / "samples" / "index.jsonl")}
    assert {"/".join(key.split("/")[:2]) for key in keys} == {f"{p}/{t}" for p in ("train", "eval") for t in TASKS}
    assert (run / "report.html").is_file()
    used = yaml.safe_load((run / "mix.yaml").read_text())
    assert used[TASKS[0]]["rewards"] == {"iou": 1.0}
    assert used["questions"]["env"] == "VLM-VQA-v0"
    assert used["questions"]["rewards"]


@pytest.mark.slow
def test_a_mixed_run_goes_on_bit_for_bit_and_its_data_are_compared_by_task(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = place / "run", tmp_path / "moved"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "step-4")
    file = place / "rows.jsonl"
    content = file.read_text()
    try:
        file.write_text(content.replace("30, 40", "30, 41", 1))
        with pytest.raises(SystemExit):
            main(["train", "--resume", str(cut)])
        assert "the VLM-REC-v0 training data: rows differ" in " ".join(capsys.readouterr().err.split())
    finally:
        file.write_text(content)
    main(["train", "--resume", str(cut)])
    assert not (cut / "changes.jsonl").exists()
    assert timeless(cut) == timeless(whole)
    assert rows(cut / "rollouts.jsonl") == rows(whole / "rollouts.jsonl")
    ours, theirs = (load_file(run / "checkpoints" / "step-4" / "model.safetensors") for run in (cut, whole))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert (cut / "evaluation.json").read_text() == (whole / "evaluation.json").read_text()
