"""Rewards for answers that are a number of things."""

from __future__ import annotations

from typing import Final

from vlmenv.core.points import has_point_marks, parse_marked_points
from vlmenv.envs.rewards.answers import normalise, parse_number

MOST: Final = 99_999
"""Greatest count that is read."""
_WRITTEN: Final = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)
_WORDS: Final = {word: number for number, word in enumerate(_WRITTEN.split())} | {"no": 0, "none": 0}


def parse_count(content: str) -> int | None:
    """The count in an answer: a whole number, a number word up to twenty, or as many as there are marked points.

    Args:
        content: Any text. Points are in Molmo's form, `<points x1="…" y1="…" …>`.

    Returns:
        A number from 0 to 99,999; None if there is no single one.
    """
    if has_point_marks(content):
        points = parse_marked_points(content)
        return None if points is None else len(points)
    word = _WORDS.get(normalise(content)) if len(content) < 100 else None
    number = parse_number(content) if word is None else word
    return int(number) if number is not None and number == int(number) and 0 <= number <= MOST else None


def count_reward(text: str, target: int, prediction: float | None) -> float:
    """1 for the true number, else 0 (R1-V's and Visual-RFT's reward for counting)."""
    return float(prediction == target)


def closeness_reward(text: str, target: int, prediction: float | None) -> float:
    """1 - |answered - true| / true, at least 0; of a true number 0 only that answer scores.

    Args:
        text: A completion.
        target: The true number.
        prediction: The answered number; None if unreadable, which scores 0.
    """
    return 0.0 if prediction is None else max(0.0, 1 - abs(prediction - target) / max(1, target))
