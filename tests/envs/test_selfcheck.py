"""A task that does not take its own right answers for right is told so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from PIL import Image
from test_geometry import PointEnv

from vlmenv.cli import main
from vlmenv.core.coordinates import ResizeRule
from vlmenv.core.errors import ConfigError
from vlmenv.envs import ClipScore, Sample, VisualTaskEnv, self_check
from vlmenv.envs.captioning import CaptionEnv
from vlmenv.envs.rec import RECEnv
from vlmenv.envs.selfcheck import describe

TASKS = [
    *("VLM-Caption-v0", "VLM-Count-v0", "VLM-GUI-v0", "VLM-Math-v0"),
    *("VLM-OCR-v0", "VLM-OVD-v0", "VLM-Point-v0", "VLM-REC-v0", "VLM-Seg-v0", "VLM-VQA-v0"),
    *("VLM-Chart-v0", "VLM-Search-v0", "VLM-Temporal-v0", "VLM-VideoQA-v0"),
]
WAYS: list[dict[str, Any]] = [{}, {"coordinates": "norm1000"}, {"coordinates": "resized", "resize": ResizeRule()}]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("way", WAYS, ids=["original", "norm1000", "resized"])
def test_the_built_in_tasks_agree_with_themselves(name: str, way: dict[str, Any]) -> None:
    assert self_check(gymnasium.make(name, **way).unwrapped, 12) == []  # type: ignore[arg-type]


class Unread(RECEnv):
    """Writes what it cannot parse."""

    def write_answer(self, sample: Sample) -> str:
        return f"It is at {sample.target}"


class Swapped(RECEnv):
    """Writes y before x."""

    def write_answer(self, sample: Sample) -> str:
        x1, y1, x2, y2 = self.target(sample)
        return self.answer_format.write(f"[{y1:.0f},{x1:.0f},{y2:.0f},{x2:.0f}]")


class Unconverted(RECEnv):
    """Writes pixels whatever is asked for."""

    def write_answer(self, sample: Sample) -> str:
        return self.answer_format.write(f"[{','.join(f'{value:.0f}' for value in sample.target)}]")


class Failing(RECEnv):
    def write_answer(self, sample: Sample) -> str:
        return str(sample.target.text)


class Strict(RECEnv):
    def parse(self, text: str) -> Any:
        return super().parse(text[99:]) or 1 / 0


def broken_term(text: str, target: Any) -> float:
    raise KeyError("x")


class BrokenTerm(RECEnv):
    terms = {"broken": broken_term}  # noqa: RUF012
    default_rewards = {"broken": 1.0}  # noqa: RUF012


@pytest.mark.parametrize(
    ("task", "told"),
    [
        (Unread(), r"sample scene-train-0: parse reads no answer; the answer is 'It is at \(.*, which parse\(\) reads"),
        (Swapped(), r"sample scene-train-0: iou is 0.*, not 1; the answer is '<think>.*reads as \(\d+"),
        (Unconverted(coordinates="norm1000"), r"iou is 0, not 1"),
        (Failing(), r"write_answer failed: AttributeError: 'tuple' object has no attribute 'text'$"),
        (Strict(), r"parse failed: ZeroDivisionError"),
        (BrokenTerm(), r"a reward failed: RewardError: reward term 'broken' failed on sample scene-train-0: KeyError"),
    ],
)
def test_a_task_that_contradicts_itself_is_told(task: VisualTaskEnv, told: str) -> None:
    faults = self_check(task)
    assert len({fault.sample for fault in faults}) == 8
    assert re.search(told, str(faults[0]))
    assert "on 8 of 8 samples: " in describe(faults, 8)


def test_what_is_not_1_for_a_right_answer_can_be_said() -> None:
    class Half(RECEnv):
        terms = {**RECEnv.terms, "half": lambda text, target: 0.5}  # noqa: RUF012
        default_rewards = {"iou": 1.0, "half": 1.0, "length": -1.0}  # noqa: RUF012

    Half.terms["length"] = lambda text, target: float(len(text))  # a penalty
    assert {fault.term for fault in self_check(Half())} == {"half"}
    Half.best = {"half": 0.5}
    assert self_check(Half()) == []
    Half.best = {"half": None}
    assert self_check(Half()) == []
    Half.best = {"half": 0.9}
    assert {fault.told for fault in self_check(Half())} == {"is 0.5, not 0.9"}


def test_terms_without_a_known_best_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClipScore, "batch", lambda *args, **more: pytest.fail("it was run"))
    assert self_check(CaptionEnv()) == []


def test_what_is_imitated_is_checked_on_request(tmp_path: Path) -> None:
    """A row's own completion may be in another format than the one that is asked for."""
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    answer = "<think>I look</think><answer>[1, 2, 30, 40]</answer>"
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "a.png", "question": "Where?", "answer": answer}))
    for form, wrong in (("tags", set()), ("sections", {"parse", "iou", "format"})):
        env = RECEnv(dataset=tmp_path / "rows.jsonl", answer_format=form)
        assert self_check(env) == []
        assert {fault.term for fault in self_check(env, imitated=True)} == wrong


def test_data_check_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a task without built-in samples too."""
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "a.png", "question": "?", "answer": [1, 2, 30, 40]}))
    (tmp_path / "contrary.py").write_text(
        "from vlmenv.envs import POINT, VisualTaskEnv, register_task\n"
        "class Env(VisualTaskEnv):\n"
        "    terms = {'zero': lambda text, target: 0.0}\n"
        "    default_rewards = {'zero': 1.0}\n"
        "    prompt_template = '{question} {coordinates}'\n"
        "    geometry = POINT\n"
        "class Content(Env):\n"
        "    best = {'zero': 0.0}\n"
        "register_task('Contrary-v0', 'contrary:Env')\n"
        "register_task('Content-v0', 'contrary:Content')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    main(["data", "check", "rows.jsonl", "--env", "contrary:Content-v0"])
    assert "right answers" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["data", "check", "rows.jsonl", "--env", "contrary:Contrary-v0"])
    told = capsys.readouterr().out
    assert "does not take its own right answers for right on 1 of 1 samples: zero (1)" in told
    assert "zero is 0, not 1; the answer is '<think></think><answer>[16,21]</answer>'" in told


def test_a_task_without_built_in_samples_asks_for_a_dataset() -> None:
    with pytest.raises(ConfigError, match="PointEnv has no built-in samples: give a dataset, as in --dataset"):
        PointEnv()

    class Empty(VisualTaskEnv):
        pass

    with pytest.raises(ConfigError, match=r"Empty sets no terms: see docs/own_task\.md"):
        Empty()
