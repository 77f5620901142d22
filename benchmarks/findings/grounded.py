"""Rewards for exact descriptions of built-in scenes, and for answers that rest on one."""

from __future__ import annotations

import re

from vlmenv.core.answers import Caption
from vlmenv.core.formats import AnswerFormat
from vlmenv.envs.captioning import answer_reward
from vlmenv.envs.data.scenes import COLOURS, SHAPES

FORMAT = AnswerFormat.SECTIONS


def described(text: str, target: Caption) -> float:
    """F1 of the colours and shapes that a description names, in [0, 1]; 0 out of format."""
    words = set(re.findall("[a-z]+", FORMAT.description(text).lower()))
    named, true = words & {*COLOURS, *SHAPES}, set(target.keywords)
    return 2 * len(named & true) / (len(named) + len(true)) if FORMAT.is_followed(text) else 0.0


def grounded_answer(text: str, target: Caption) -> float:
    """1 for a right answer after an exact description; else 0."""
    return answer_reward(text, target, FORMAT) if described(text, target) == 1 else 0.0
