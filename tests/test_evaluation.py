from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from vlmenv.core.answers import Detection, write_detections
from vlmenv.core.formats import AnswerFormat
from vlmenv.envs.ovd import OVDEnv
from vlmenv.envs.vqa import VQAEnv
from vlmenv.evaluation import Evaluation, read_evaluation, summarise, write_evaluation

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
    assert math.isnan(evaluation.metrics["accuracy/y"].low)  # of one question there is no interval
    assert (evaluation.as_json()["unparsable"]["count"], evaluation.as_json()["unparsable"]["answers"]) == (1, 3)
    assert evaluation.as_json()["accuracy/y"]["low"] is None
    write_evaluation(evaluation, tmp_path)
    again = read_evaluation(tmp_path, task)
    assert again.metrics["accuracy"] == evaluation.metrics["accuracy"]
    assert [one["prediction"] for one in again.answers] == [one["prediction"] for one in answers]


def test_the_metrics_are_written_last(tmp_path: Path) -> None:
    """A resumed run takes an evaluation as done where they are there."""
    (tmp_path / "answers.jsonl").mkdir()
    with pytest.raises(IsADirectoryError):
        write_evaluation(Evaluation({}, []), tmp_path)
    assert not (tmp_path / "metrics.json").exists()
