from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from vlmenv.agents import VLMAgent
from vlmenv.cli import main
from vlmenv.core.answers import Detection, write_detections
from vlmenv.core.formats import AnswerFormat
from vlmenv.envs.metrics.detection import coco_metrics
from vlmenv.envs.metrics.intervals import Interval, wilson_interval
from vlmenv.envs.ovd import OVDEnv
from vlmenv.envs.rewards import math as math_terms
from vlmenv.envs.rewards import workers
from vlmenv.envs.rewards.workers import WorkerLostError
from vlmenv.envs.vqa import VQAEnv
from vlmenv.evaluation import (
    Evaluation,
    differences,
    metrics_table,
    progress,
    read_evaluation,
    summarise,
    write_evaluation,
)

A, B = Detection("cat", (0.0, 0.0, 10.0, 10.0)), Detection("cat", (20.0, 20.0, 40.0, 40.0))


def answered(task: Any, index: int, text: str, target: Any, **more: str) -> dict[str, Any]:
    return {
        "index": index,
        "completion": text,
        "prediction": task.parse(text),
        "target": target,
        "measures": task.measure(text, target, {}),
    } | more


def test_precision_recall_and_ratio_are_over_all_boxes() -> None:
    """Three boxes answered, two of them right, to five true ones."""
    task, write = OVDEnv(), AnswerFormat.TAGS.write
    answers = [
        answered(task, 0, write(write_detections([A, A])), (A, B)),
        answered(task, 1, write(write_detections([B])), (A, B)),
        answered(task, 2, "hm", (A,)),
    ]
    metrics = summarise(task, answers)
    assert metrics["precision@0.5"].value == pytest.approx(2 / 3)
    assert metrics["recall@0.5"].value == pytest.approx(2 / 5)
    assert metrics["boxes/ratio"].value == pytest.approx(3 / 5)
    assert metrics["unparsable"].value == pytest.approx(1 / 3)
    assert {"AP", "AP50", "AP75", "APs", "AR100", "NMS-AP"} <= metrics.keys()


def test_accuracy_by_subject_and_what_is_written(tmp_path: Path) -> None:
    task = VQAEnv()
    target = task.source.get(0).target
    right, wrong = AnswerFormat.TAGS.write(target.text), "no idea"
    answers = [
        answered(task, 0, right, target, subject="x"),
        answered(task, 1, wrong, target, subject="x"),
        answered(task, 2, right, target, subject="y"),
    ]
    evaluation = Evaluation(summarise(task, answers), answers)
    assert evaluation.metrics["accuracy"].value == pytest.approx(2 / 3)
    assert evaluation.metrics["accuracy/x"].value == pytest.approx(1 / 2)
    assert evaluation.metrics["accuracy/y"].value == 1
    assert evaluation.metrics["accuracy/y"] == wilson_interval(1, 1)
    assert (evaluation.as_json()["unparsable"]["count"], evaluation.as_json()["unparsable"]["answers"]) == (1, 3)
    write_evaluation(evaluation, tmp_path)
    again = read_evaluation(tmp_path, task)
    assert again.metrics["accuracy"] == evaluation.metrics["accuracy"]
    assert [one["prediction"] for one in again.answers] == [one["prediction"] for one in answers]


def test_changes_are_of_the_samples_that_both_answered() -> None:
    """Sample 2 was left out before, 3 after; precision is a ratio of sums."""
    task, write = OVDEnv(), AnswerFormat.TAGS.write
    good, half, bad = (write(write_detections(found)) for found in ([A, B], [A], [A, A]))
    before = [answered(task, 0, bad, (A, B)), answered(task, 1, half, (A, B)), answered(task, 3, good, (A, B))]
    after = [answered(task, 1, good, (A, B)), answered(task, 2, good, (A, B)), answered(task, 0, half, (A, B))]
    found = differences(task, before, after)
    assert found["recall@0.5"].value == pytest.approx(3 / 4 - 2 / 4)
    assert found["precision@0.5"].value == pytest.approx(3 / 3 - 2 / 3)
    rows = [
        [task.parse(one["completion"]) for one in answers] for answers in ([before[1], before[0]], [after[0], after[2]])
    ]
    values = [coco_metrics(one, [[A, B]] * 2)["AP"].value for one in rows]
    assert found["AP"].value == pytest.approx(values[1] - values[0])
    assert "APs" not in found
    columns = {
        "before": Evaluation(summarise(task, before), before),
        "after": Evaluation(summarise(task, after), after),
    }
    table = metrics_table("", columns, found)
    names, changes = (map(str, column.cells) for column in (table.columns[0], table.columns[-1]))
    cells = dict(zip(names, changes, strict=True))
    assert cells["precision@0.5"].startswith("+0.333 (")
    assert "(" in cells["AP"]
    assert "(" not in cells["APs"]


@pytest.mark.parametrize("width", [80, 200])
def test_intervals_stay_whole_on_narrow_consoles(width: int) -> None:
    whole = Interval(0.58, 0.555, 0.605)
    named = {"accuracy/algebra and word problems": whole, "iou/mean": whole}
    change = {name: Interval(-0.007, -0.02, 0.1) for name in named}
    out = io.StringIO()
    columns = {"before": Evaluation(named, []), "after": Evaluation(named, [])}
    Console(file=out, width=width).print(metrics_table("", columns, change, width))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert out.getvalue().count("(0.555 to 0.605)") == 4
    assert out.getvalue().count("(-0.020 to +0.100)") == 2
    assert ("0.580 (0.555" in out.getvalue()) == (width == 200)


def test_the_metrics_are_written_last(tmp_path: Path) -> None:
    """A resumed run takes an evaluation as done where they are there."""
    (tmp_path / "answers.jsonl").mkdir()
    with pytest.raises(IsADirectoryError):
        write_evaluation(Evaluation({}, []), tmp_path)
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.slow
def test_answers_whose_processes_others_end_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the metrics of a step and in the result of an evaluation, and only there where there are any."""
    run = tmp_path / "run"

    class Killed:
        def map(self, pairs: list[tuple[str, str]]) -> list[object]:
            return [WorkerLostError()] * len(pairs)

        def start(self) -> None: ...

    monkeypatch.setattr(math_terms, "_workers", Killed())
    monkeypatch.setattr(math_terms, "_at_once", lambda answer, truth: None)
    monkeypatch.setattr(workers.LOSSES, "answers", 0)
    options = ["--env", "VLM-Math-v0", "--steps", "2", "--eval-limit", "8", "--device", "cpu"]
    main(["train", *options, "--prompts-per-step", "4", "--group-size", "4", "--output", str(run)])
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < step["score/unscored"] <= 16 for step in steps)
    assert all(step["score/lost_processes"] == 0 for step in steps)
    measured = json.loads((run / "evaluation.json").read_text())
    for when in ("before", "after"):
        assert 0 < measured[when]["unscored"]["value"] <= 1
    counted = sum(step["score/unscored"] for step in steps)
    counted += sum(8 * measured[when]["unscored"]["value"] for when in ("before", "after"))
    assert workers.LOSSES.answers >= counted


def test_the_end_of_a_run_is_measured_once_and_in_its_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measuring on the way may come after the last step too."""
    run, precisions, act = tmp_path / "run", [], VLMAgent.act

    def watched(agent: VLMAgent, observations: Any) -> list[str]:
        precisions.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        return act(agent, observations)

    monkeypatch.setattr(VLMAgent, "act", watched)
    options = ["--steps", "4", "--eval-every", "2", "--eval-limit", "4", "--precision", "bf16", "--device", "cpu"]
    main(["train", *options, "--prompts-per-step", "2", "--group-size", "4", "--output", str(run)])
    assert precisions == [torch.bfloat16] * 3
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    after = json.loads((run / "evaluation.json").read_text())["after"]
    assert {name: metric["value"] for name, metric in after.items()} == {
        name.removeprefix("eval/"): value for name, value in last.items() if name.startswith("eval/")
    }


def test_where_there_is_no_terminal_progress_is_told_in_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more often than every half minute; the end needs no line."""
    clock = iter([0.0, 10.0, 31.0, 40.0, 62.0, 93.0])
    monkeypatch.setattr("vlmenv.evaluation.time", SimpleNamespace(monotonic=lambda: next(clock)))
    out = io.StringIO()
    with progress("evaluating [x]", 100, Console(file=out), done=20) as advance:
        for _ in range(5):
            advance(16)
    assert out.getvalue().splitlines() == [
        "evaluating [x]: 52 of 100 samples, about 0:00:46 left",
        "evaluating [x]: 84 of 100 samples, about 0:00:16 left",
    ]


def test_on_a_terminal_progress_is_a_bar_that_goes() -> None:
    out = io.StringIO()
    with progress("evaluating", 10, Console(file=out, force_terminal=True)) as advance:
        advance(4)
    assert "4/10" in out.getvalue()


SUBJECTS = ("[/red]", "\x1b[31mx", "[bold]b", ":smile:")


@pytest.mark.slow
def test_names_from_data_are_neither_markup_nor_orders_to_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of subjects, in an evaluation, in training, and of the folders that are named."""
    monkeypatch.setenv("COLUMNS", "250")
    Image.new("RGB", (48, 48)).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "problem": "Which?", "answer": "red", "subject": one} for one in SUBJECTS]
    file, run = tmp_path / "rows.jsonl", tmp_path / "a [/b]\x1b[31m run"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--env", "VLM-VQA-v0", "--dataset", str(file), "--device", "cpu", "--max-new-tokens", "4"]
    main(["train", *options, "--steps", "1", "--prompts-per-step", "1", "--group-size", "2", "--output", str(run)])
    main(["eval", *options, "--model", str(run)])
    told = capsys.readouterr().out
    for shown in ("accuracy/[/red]", "accuracy/\\x1b[31mx", "accuracy/[bold]b", "accuracy/:smile:"):
        assert told.count(shown) == 2
    assert "\x1b" not in told
    assert "a [/b]\\x1b[31m run" in told
