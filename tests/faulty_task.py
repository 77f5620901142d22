"""VLM-REC-v0 with a reward term that does what a test wants of it: `--env faulty_task:VLM-Faulty-v0`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from vlmenv import register_task
from vlmenv.envs.rec import RECEnv
from vlmenv.envs.rewards.terms import RewardTerm

happens: Callable[[int], float] = lambda count: 0.0  # noqa: E731 (tests put others in its place)
"""is given the number of the answer, counted from 1 when an environment is made"""
answers = 0


def trouble(text: str, target: object) -> float:
    global answers
    answers += 1
    return happens(answers)


class FaultyEnv(RECEnv):
    terms: ClassVar[Mapping[str, RewardTerm]] = {**RECEnv.terms, "trouble": trouble}
    default_rewards: ClassVar[Mapping[str, float]] = {"iou": 1.0, "format": 0.1, "trouble": 1.0}

    def __init__(self, **arguments: object) -> None:
        global answers
        answers = 0
        super().__init__(**arguments)  # type: ignore[arg-type]


register_task("VLM-Faulty-v0", "faulty_task:FaultyEnv")
