from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlmenv.cli import main
from vlmenv.runs.pictures import draw_curve
from vlmenv.runs.watch import collapse, concerns, drift, first_concerns

START = {"completion/length": 100.0, "completion/box_ratio": 1.0, "completion/repetition": 0.1, "reward/format": 0.9}


def history(metric: list[float], **last: float) -> list[dict[str, float]]:
    """Forty steps, an evaluation after every tenth; other answers from the thirtieth on."""
    steps = [dict(START) for _ in range(40)]
    for metrics in steps[29:]:
        metrics |= {name.replace("__", "/"): value for name, value in last.items()}
    for step, value in zip((10, 20, 30, 40), metric, strict=True):
        steps[step - 1]["eval/map"] = value
    return steps


@pytest.mark.parametrize(
    ("last", "told"),
    [
        ({"completion__length": 160.0}, "length 100 → 160"),
        ({"completion__length": 60.0}, "length 100 → 60"),
        ({"completion__box_ratio": 4.2}, "box_ratio 1 → 4.2"),
        ({"completion__repetition": 0.25}, "repetition 0.1 → 0.25"),
        ({"reward__format": 0.5}, "format 0.9 → 0.5"),
        ({"completion__length": 140.0}, None),
        ({"completion__repetition": 0.15}, None),
        ({"completion__repetition": 0.0}, None),
        ({"reward__format": 0.85}, None),
        ({"reward__format": 1.0}, None),
    ],
)
def test_a_drift_is_told_while_the_metric_falls(last: dict[str, float], told: str | None) -> None:
    message = drift(history([0.2, 0.3, 0.25, 0.2], **last), 0.1, "map")
    assert (message is None) == (told is None)
    if message is not None and told is not None:
        assert f"completions drift while map falls: it was 0.300 after step 20 and is 0.200 now; {told}. " in message
    assert drift(history([0.2, 0.3, 0.25, 0.28], **last), 0.1, "map") is None


def test_one_step_apart_from_the_others_is_no_drift() -> None:
    steps = [dict(START) for _ in range(12)]
    steps[5]["eval/map"], steps[11]["eval/map"] = 0.3, 0.2
    steps[11]["completion/length"] = 170.0
    assert drift(steps, None, "map") is None
    for metrics in steps[7:]:
        metrics["completion/length"] = 170.0
    message = drift(steps, None, "map")
    assert message is not None
    assert "length 100 → 170" in message


def test_the_metric_before_training_counts() -> None:
    steps = history([0.2, 0.2, 0.2, 0.2], completion__length=300.0)
    assert drift(steps, None, "map") is None
    message = drift(steps, 0.4, "map")
    assert message is not None
    assert "was 0.400 before training and is 0.200 now; length 100 → 300" in message


def test_what_is_not_measured_does_not_drift() -> None:
    steps = history([0.3, 0.3, 0.3, 0.1], completion__length=300.0)
    for metrics in steps[:29]:
        del metrics["completion/length"]
    assert drift(steps, None, "map") is None


def test_a_run_whose_answers_fall_apart_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    options: dict[str, Any] = {"steps": 4, "lr": 0.1, "warmup-steps": 0, "eval-every": 2, "eval-limit": 16}
    options |= {"prompts-per-step": 4, "group-size": 4, "device": "cpu", "output": run, "max-new-tokens": 60}
    main(["train", *(f"--{name}={value}" for name, value in options.items())])
    warnings = [json.loads(line) for line in (run / "warnings.jsonl").read_text().splitlines()]
    assert {one["step"] for one in warnings} <= {2, 4}
    assert all(one["message"].startswith("completions drift while iou/mean falls: it was 0.") for one in warnings)
    assert "completions drift while iou/mean falls" in capsys.readouterr().out
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    draw_curve(tmp_path / "without.png", metrics, title="run: VLM-REC-v0, grpo")
    shown, without = (np.asarray(Image.open(path)) for path in (run / "curve.png", tmp_path / "without.png"))
    assert not np.array_equal(shown, without), "the warnings are not drawn"


def steps(count: int, **metrics: float) -> list[dict[str, float]]:
    usual = {"reward/mean": 0.5, "reward/zero_std_groups": 0.2, "policy/entropy": 1.0, "completion/truncated": 0.0}
    usual |= {"policy/kl": 0.01, "completion/length": 100.0}
    return [usual | {name.replace("__", "/"): value for name, value in metrics.items()}] * count


@pytest.mark.parametrize(
    ("kind", "late", "enough"),
    [
        ("nothing to learn", {"reward__zero_std_groups": 1.0}, 20),
        ("KL", {"policy__kl": 1.5}, 5),
        ("entropy", {"policy__entropy": 0.04}, 5),
        ("entropy", {"policy__entropy": 3.5}, 5),
        ("length", {"completion__length": 450.0}, 5),
        ("length", {"completion__length": 20.0}, 5),
        ("truncation", {"completion__truncated": 0.6}, 5),
    ],
)
def test_each_sign_of_trouble_is_told_after_enough_steps(kind: str, late: dict[str, float], enough: int) -> None:
    assert list(concerns(steps(30))) == []
    assert kind not in dict(concerns(steps(30) + steps(enough // 2 - 1, **late)))
    (found,) = concerns(steps(30) + steps(enough, **late))
    assert found[0] == kind


def test_low_entropy_with_rising_rewards_is_what_training_is_for() -> None:
    assert list(concerns(steps(10) + steps(10, policy__entropy=0.001, reward__mean=0.9))) == []
    assert list(concerns(steps(10) + steps(10, completion__length=900.0, reward__mean=0.9))) == []


def test_imitation_has_nothing_to_compare() -> None:
    assert list(concerns([{"policy/entropy": 1.0, "loss": 2.0}] * 40)) == []
    assert collapse([{"loss": 2.0}] * 40) is None


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["sft", "grpo"])
def test_imitation_is_not_told_that_there_is_nothing_to_learn(
    algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_pictures: None
) -> None:
    """Its groups are true answers, which all earn the same."""
    monkeypatch.setattr("vlmenv.runs.watch.FLAT_STEPS", 1)
    same = ["--group-size", "2", "--temperature", "1e-4"] if algorithm == "grpo" else []
    small = ["--steps", "2", "--prompts-per-step", "1", "--eval-limit", "0", "--device", "cpu", "--tracker", "none"]
    main(["train", "--algo", algorithm, *same, *small, "--output", str(tmp_path / "run")])
    warned = (tmp_path / "run" / "warnings.jsonl").is_file()
    assert warned == (algorithm == "grpo")


def test_collapse_is_a_lost_reward_or_a_lost_reference() -> None:
    assert collapse(steps(40)) is None
    assert collapse(steps(20) + steps(4, reward__mean=0.0)) is None
    found = collapse(steps(20) + steps(5, reward__mean=0.01))
    assert found == "the mean reward was 0.5 and is 0.01"
    found = collapse(steps(20) + steps(5, policy__kl=11.0))
    assert found is not None
    assert "11 nats" in found
    assert collapse(steps(40, reward__mean=-1.0)) is None
    assert collapse(steps(40, reward__mean=0.0)) is None


@pytest.mark.parametrize(
    ("readable", "truncated", "rewards", "kinds"),
    [
        (8, 0, "differ", []),
        (4, 8, "differ", []),
        (3, 0, "differ", ["unreadable"]),
        (0, 9, "alike", ["truncation", "unreadable"]),
        (16, 0, "alike", ["rewards"]),
    ],
)
def test_first_answers(readable: int, truncated: int, rewards: str, kinds: list[str]) -> None:
    given = [0.5] * 15 + [0.75 if rewards == "differ" else 0.5]
    cut = [i < truncated for i in range(16)]
    found = list(first_concerns(["no box"] * 16, [i < readable for i in range(16)], cut, given))
    assert [kind for kind, _ in found] == kinds


def test_a_model_that_answers_unreadably_is_told_before_anything_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here by a length limit within which no answer ends; and the training is the same bit for bit as without."""
    options = ["--steps", "2", "--eval-limit", "4", "--prompts-per-step", "2", "--group-size", "4", "--device", "cpu"]
    main(["train", *options, "--max-new-tokens", "4", "--output", str(tmp_path / "run")])
    shown = " ".join(capsys.readouterr().out.split())
    first, *others = [json.loads(line) for line in (tmp_path / "run" / "warnings.jsonl").read_text().splitlines()]
    assert (first["step"], first["kind"]) == (0, "first truncation")
    assert [one["kind"] for one in others if one["step"] == 0] == ["first unreadable"]
    assert "0 of the model's first 16 answers can be read" in others[0]["message"]
    assert shown.index("first 16 answers can be read") < shown.index("step 1/2")


def test_the_look_at_first_answers_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--steps", "2", "--eval-limit", "0", "--prompts-per-step", "2", "--group-size", "4", "--device", "cpu"]
    main(["train", *options, "--output", str(tmp_path / "with")])
    monkeypatch.setattr("vlmenv.commands.train.look_first", lambda *arguments: None)
    main(["train", *options, "--output", str(tmp_path / "without")])
    for name in ("rollouts.jsonl", "checkpoints/step-2/model.safetensors"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()
    assert not (tmp_path / "with" / "warnings.jsonl").exists()
