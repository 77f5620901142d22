"""The doctor's line about a task's own right answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vlmenv.doctor.answers import right_answers
from vlmenv.doctor.subject import Unchecked
from vlmenv.envs import Sample
from vlmenv.envs.rec import RECEnv


class Unread(RECEnv):
    def write_answer(self, sample: Sample) -> str:
        return f"It is at {sample.target}"


def seen(task: RECEnv, count: int) -> tuple[str, str]:
    subject: Any = SimpleNamespace(task=task, samples=[task.source.get(i) for i in range(count)])
    return right_answers(subject)


def test_a_task_that_agrees_with_itself_passes() -> None:
    assert seen(RECEnv(), 3) == ("all 3 are at their best", "")


def test_a_task_that_cannot_read_what_it_writes_fails() -> None:
    figure, remedy = seen(Unread(), 3)
    assert "on 3 of 3 samples: parse (3), iou (3), format (3)" in figure
    assert "Mend the task's write_answer(), parse()" in remedy


def test_without_samples_there_is_nothing_to_see() -> None:
    with pytest.raises(Unchecked):
        seen(RECEnv(), 0)
