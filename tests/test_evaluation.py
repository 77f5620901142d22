from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import shared

import vlmenv.difficulty
import vlmenv.evaluation
import vlmenv.suites
from vlmenv.agents.vlm import VLMAgent
from vlmenv.cli import main
from vlmenv.core.answers import Detection, write_detections
from vlmenv.core.formats import AnswerFormat
from vlmenv.envs.ovd import OVDEnv
from vlmenv.envs.vqa import VQAEnv
from vlmenv.evaluation import EvalConfig, Evaluation, read_evaluation, run_evaluation, summarise, write_evaluation
from vlmenv.tasks import load_agent

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


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[VLMAgent]:
    """The agents that commands load, as they load them."""
    agents: list[VLMAgent] = []

    def load(*args: Any, **options: Any) -> VLMAgent:
        agents.append(load_agent(*args, **options))
        return agents[-1]

    for module in (vlmenv.evaluation, vlmenv.suites, vlmenv.difficulty):
        monkeypatch.setattr(module, "load_agent", load)
    return agents


def dtypes(agent: VLMAgent) -> set[torch.dtype]:
    return {weight.dtype for weight in agent.policy.parameters()}


def test_bfloat16_measures_nearly_the_same(loaded: list[VLMAgent]) -> None:
    found = [run_evaluation(EvalConfig(device="cpu", limit=64, precision=one)) for one in ("fp32", "bf16")]
    assert [dtypes(agent) for agent in loaded] == [{torch.float32}, {torch.bfloat16}]
    full, half = (one.metrics["iou/mean"].value for one in found)
    assert full > 0.3
    assert half == pytest.approx(full, abs=0.05)
    same = [a["completion"] == b["completion"] for a, b in zip(found[0].answers, found[1].answers, strict=True)]
    assert 0.5 < sum(same) / len(same) < 1  # not the same arithmetic, nor another model


def suite(folder: Path) -> list[str]:
    (folder / "data").mkdir()
    for name in ("images", "samples.jsonl"):
        (folder / "data" / name.replace("samples", "refcoco_val")).symlink_to(shared("data/rec/refcocos") / name)
    return ["eval", "--suite", "vlm_r1", "--data", str(folder / "data")]


@pytest.mark.parametrize("command", [suite, lambda _: ["sample", "--n", "2"]], ids=["suite", "sample"])
def test_suites_and_sampling_work_in_bfloat16_too(
    command: Callable[[Path], list[str]], loaded: list[VLMAgent], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Answers of another precision do not go with those that are there."""
    args = [*command(tmp_path), "--limit", "2", "--max-new-tokens", "24", "--device", "cpu"]
    args += ["--output", str(tmp_path / "out")]
    main([*args, "--precision", "bf16"])
    assert [dtypes(agent) for agent in loaded] == [{torch.bfloat16}]
    with pytest.raises(SystemExit):
        main(args)
    assert "holds results with another precision" in " ".join(capsys.readouterr().err.split())
