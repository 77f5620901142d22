"""`vlmenv pipeline`: stages that go on from one another, each of which survives a kill."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, shared
from small_data import lay_out_pipeline, small_pipeline

from vlmenv.cli import main
from vlmenv.commands.pipeline import Step, _arguments, _environment, _launch

pytestmark = pytest.mark.usefixtures("without_pictures")

TRAINED = ("warmup", "perception", "reasoning")


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def timeless(run: Path) -> list[dict[str, Any]]:
    kept = rows(run / "metrics.jsonl")
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "memory/", "tokens_per_second"))} for row in kept
    ]


def options_of(run: Path) -> dict[str, Any]:
    options: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())
    return options


@pytest.mark.pictures
def test_stages_go_on_from_one_another_and_end_in_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = small_pipeline("pebr_r1_builtin", tmp_path), tmp_path / "out"
    main(["pipeline", str(file), "--output", str(out)])
    shown = capsys.readouterr().out
    for stage, origin in {"sampling": "warmup", "perception": "warmup", "reasoning": "perception"}.items():
        assert options_of(out / stage)["model"] == str(out / origin / "checkpoints" / "step-2")
    assert options_of(out / "perception")["dataset"] == [str(out / "sampling" / "easy.jsonl")]
    assert options_of(out / "reasoning")["dataset"] == [str(out / "sampling" / "medium.jsonl")]
    for stage in TRAINED:
        assert (out / stage / "curve.png").is_file()
    report = json.loads((out / "report.json").read_text())
    assert list(report) == ["base", *TRAINED]
    for stage, found in report.items():
        measured = json.loads((out / "evaluation" / stage / "perception" / "metrics.json").read_text())
        assert list(found) == [
            "perception: clip",
            "perception: keyword_recall",
            "reasoning: accuracy",
            "reasoning: format",
        ]
        assert all(value == measured[name.partition(": ")[2]] for name, value in found.items())
        assert not (out / "evaluation" / stage / "reasoning").exists()  # the same set, measured once
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (out / "report.md").read_text().splitlines()]
    assert table[0] == ["", "base", *TRAINED]
    assert table[5][0] == "reasoning: format"
    assert table[5][4].startswith(f"{report['reasoning']['reasoning: format']['value']:.3f}")

    changes = {row[0]: row[1:] for row in table if len(row) == 4}
    assert changes["change from the base"] == list(TRAINED)
    for stage, cell in zip(TRAINED, changes["reasoning: format"], strict=True):
        now, was = (report[name]["reasoning: format"]["value"] for name in (stage, "base"))
        assert cell.startswith(f"{now - was:+.3f} (")
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*.*") if "report" not in path.name}
    main(["pipeline", str(file), "--output", str(out)])
    assert capsys.readouterr().out.count("done before") == 8
    assert "warmup" in shown
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.*") if "report" not in path.name} == written


def test_the_published_pipeline_runs_on_rows_in_its_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lay_out_pipeline(tmp_path)
    main(["pipeline", str(small_pipeline("pebr_r1", tmp_path))])
    out = Path("runs/pebr_r1")
    assert options_of(out / "warmup")["algo"] == "sft"
    assert options_of(out / "perception")["rewards"]["keywords"] == 0.4
    assert options_of(out / "reasoning")["rewards"] == {"accuracy": 0.9, "format": 0.1}
    report = json.loads((out / "report.json").read_text())
    assert list(report["reasoning"]) == [
        "perception: clip",
        "perception: keyword_recall",
        "reasoning: accuracy",
        "reasoning: format",
    ]


def checkpoint(stage: str) -> Callable[[Path], bool]:
    return lambda out: (out / stage / "checkpoints" / "step-1" / "trainer.pt").is_file()


def test_a_kill_in_each_stage_loses_nothing(tmp_path: Path) -> None:
    """The same results, and what was done before the kill is not done again."""
    changes = {"steps": 8, "checkpoint_every": 1, "tracker": "none"}
    file = small_pipeline("pebr_r1_builtin", tmp_path, **changes)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    main(["pipeline", str(file), "--output", str(whole)])
    command = [sys.executable, "-m", "vlmenv", "pipeline", str(file), "--output", str(cut)]
    moments = {
        "warmup": checkpoint("warmup"),
        "sampling": lambda out: len(list((out / "sampling" / "parts").glob("[0-9]*.jsonl"))) >= 1,
        "perception": checkpoint("perception"),
        "reasoning": checkpoint("reasoning"),
    }
    for stage, has_come in moments.items():
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
        deadline = time.monotonic() + 120
        while not has_come(cut):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
        assert json.loads((cut / stage / "stage.json").read_text())["finished"] is False
    saved = (cut / "warmup" / "checkpoints" / "step-8" / "model.safetensors").stat().st_mtime_ns
    main(["pipeline", str(file), "--output", str(cut)])
    assert (cut / "warmup" / "checkpoints" / "step-8" / "model.safetensors").stat().st_mtime_ns == saved
    for stage in TRAINED:
        assert timeless(cut / stage) == timeless(whole / stage)
        assert rows(cut / stage / "rollouts.jsonl") == rows(whole / stage / "rollouts.jsonl")
        weights = "checkpoints/step-8/model.safetensors"
        assert (cut / stage / weights).read_bytes() == (whole / stage / weights).read_bytes()
    for level in ("easy", "medium", "hard"):
        name = f"sampling/{level}.jsonl"
        assert (cut / name).read_text() == (whole / name).read_text()
    assert (cut / "report.json").read_text() == (whole / "report.json").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_launched_stages_end_with_the_pipeline_and_go_on(number: signal.Signals, tmp_path: Path) -> None:
    stages = {"only": {"train": {"device": "cpu", "steps": 400, "prompts_per_step": 2, "eval_limit": 0}}}
    file, out = tmp_path / "one.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump({"stages": stages}))
    launch = ["--launch", f"{sys.executable} -m vlmenv"]
    command = [sys.executable, "-m", "vlmenv", "pipeline", str(file), "--output", str(out), *launch]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    metrics, deadline = out / "only" / "metrics.jsonl", time.monotonic() + 120
    while not metrics.is_file():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(timeout=60) == (128 + signal.SIGTERM if number == signal.SIGTERM else -number)
    while not list(out.glob("only/checkpoints/step-*/trainer.pt")):  # by the stage, which was told to end
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (saved,) = (out / "only" / "checkpoints").glob("step-*")
    if number == signal.SIGTERM:
        return
    step = int(saved.name.removeprefix("step-"))
    config = (out / "only" / "config.yaml").read_text().replace("steps: 400", f"steps: {step + 1}")
    (out / "only" / "config.yaml").write_text(config)
    main(["pipeline", str(file), "--output", str(out), *launch])
    assert [row["step"] for row in rows(metrics)] == list(range(1, step + 2))


TRAIN = {"train": {"device": "cpu", "steps": 1, "prompts_per_step": 1, "group_size": 2, "eval_limit": 0}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"stages": {"a": {"train": {"stepz": 1}}}}, "stepz"),
        ({"stages": {"a": {"train": {"lr": 0}}}}, "p.yaml: a: lr must be finite and above 0"),
        ({"stages": {"a": {"train": {"model": "{b}/model"}}, "b": TRAIN}}, "a refers to {b}, but no stage before it"),
        ({"stages": {"a": {"train": {"output": "x"}}}}, "a has the option 'output', which the pipeline sets itself"),
        ({"stages": {"a": {"train": {}, "sample": {}}}}, "the stage a must be one 'train' or 'sample'"),
        ({"stages": {"a": {"sample": {}}}}, "no stage trains a model"),
        ({"stages": {"base": TRAIN}}, "a stage cannot be called 'base'"),
        ({"stages": {"a": {"train": ["lr"]}}}, "the options of a are 'name: value' lines"),
        ({"stages": {}}, "'stages', and 'evaluate' if there is one, map names to what is done"),
        ({"stage": {}}, "unknown part of a pipeline 'stage'. Did you mean 'stages'?"),
        (
            {"stages": {"a": TRAIN}, "evaluate": {"e": {"eval_limit": 1, "device": "cpu", "metrics": ["iou"]}}},
            "unknown metric 'iou'",
        ),
    ],
)
def test_a_faulty_pipeline_is_told(
    content: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit):
        main(["pipeline", "p.yaml"])
    assert message in " ".join(capsys.readouterr().err.split())


def test_an_unknown_metric_is_told_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base has been measured then, and is not measured again with the right name."""
    file, out = tmp_path / "p.yaml", tmp_path / "out"
    measured = {"eval_limit": 1, "device": "cpu", "max_new_tokens": 8}
    file.write_text(yaml.safe_dump({"stages": {"a": TRAIN}, "evaluate": {"e": measured | {"metrics": ["iou"]}}}))
    with pytest.raises(SystemExit):
        main(["pipeline", str(file), "--output", str(out)])
    assert "e: unknown metric 'iou'. Known: accuracy@0.5," in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in out.iterdir()] == ["evaluation"]
    file.write_text(yaml.safe_dump({"stages": {"a": TRAIN}, "evaluate": {"e": measured | {"metrics": ["iou/mean"]}}}))
    main(["pipeline", str(file), "--output", str(out)])
    assert capsys.readouterr().out.count("done before") == 1
    assert list(json.loads((out / "report.json").read_text())["a"]) == ["e: iou/mean"]


def test_a_suite_is_measured_after_each_stage(tmp_path: Path) -> None:
    """Each of its data sets has rows of its own in the table."""
    source = shared("data/rec/refcocos")
    for name in ("refcoco_val", "refcocog_val"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / f"{name}.jsonl").symlink_to(source / "samples.jsonl")
        (tmp_path / "data" / name / "images").symlink_to(source / "images")
    suite = {
        "suite": "vlm_r1",
        "suite_data": [str(tmp_path / "data")],
        "device": "cpu",
        "eval_limit": 2,
        "max_new_tokens": 8,
    }
    shown = ["refcoco_val: accuracy@0.5", "refcocog_val: iou/mean"]
    sets = {"all": suite, "some": suite | {"metrics": shown}}
    file, out = tmp_path / "p.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump({"stages": {"a": TRAIN}, "evaluate": sets}))
    main(["pipeline", str(file), "--output", str(out)])
    found = json.loads((out / "report.json").read_text())["a"]
    stored = json.loads((out / "evaluation" / "a" / "all" / "metrics.json").read_text())
    assert [name for name in found if name.startswith("some: ")] == [f"some: {name}" for name in shown]
    assert len(found) == sum(map(len, stored.values())) + 2
    assert found["all: refcocog_val: iou/mean"] == found["some: refcocog_val: iou/mean"]
    assert found["all: refcocog_val: iou/mean"] == stored["refcocog_val"]["iou/mean"]
    assert "| all: refcoco_val: accuracy@0.5 | " in (out / "report.md").read_text()


def test_other_options_for_a_begun_stage_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "p.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump({"stages": {"a": TRAIN}}))
    main(["pipeline", str(file), "--output", str(out)])
    file.write_text(yaml.safe_dump({"stages": {"a": {"train": TRAIN["train"] | {"lr": 0.5}}}}))
    with pytest.raises(SystemExit):
        main(["pipeline", str(file), "--output", str(out)])
    assert re.search("a was begun with other options: vlmenv train .*--steps=1", capsys.readouterr().err)


def test_names_of_pipelines_and_processes_are_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["pipeline", "pebr"])
    assert "unknown pipeline 'pebr'. Did you mean 'pebr_r1'?" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        main(["pipeline", "pebr_r1_builtin"])
    assert "--launch starts its stages in several" in capsys.readouterr().err


def test_the_published_pipelines_say_what_they_need() -> None:
    for name in ("pebr_r1", "pebr_r1_builtin"):
        head = (ROOT / "vlmenv" / "pipelines" / f"{name}.yaml").read_text().partition("\n\n")[0]
        assert all(f"\n# {what} " in head for what in ("Source", "Hardware", "Data", "Time"))


@pytest.mark.parametrize("name", ["judge_url", "judge-url"])
def test_credentials_of_a_judge_are_on_no_command_line(name: str, tmp_path: Path) -> None:
    """Which a stage's record holds too. Launched processes have them in their environment."""
    step = Step("first", "train", {name: "http://tester:sesame@judge/v1", "judge-model": "a"})
    told = _arguments(step, tmp_path)
    assert "--judge-url=http://***@judge/v1" in told
    assert "sesame" not in " ".join(told)
    code = "import os; assert os.environ['VLMENV_JUDGE_URL'] == 'http://tester:sesame@judge/v1'"
    _launch([sys.executable, "-c", code], _environment(step))
    assert "VLMENV_JUDGE_URL" not in _environment(Step("first", "train", {name: "http://***@judge/v1"}))
