"""Rewards for answers that are one box."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from vlmenv.core.answers import NONE, Target, is_exact_box, parse_box
from vlmenv.core.coordinates import Box, giou, iou
from vlmenv.core.formats import AnswerFormat

SCHEDULE: Final = ((0.10, 0.85), (0.25, 0.95), (1.0, 0.99))
"""Parts of training, each with its end and the IoU that a box must reach (V-Triune, arXiv 2505.18129)."""


def parse_boxed_answer(text: str, answer_format: AnswerFormat = AnswerFormat.TAGS) -> Target | None:
    """The box, or "None", in a completion; None if unreadable."""
    content = answer_format.extract(text)
    return None if content is None else parse_box(content)


def iou_reward(text: str, target: Target, answer_format: AnswerFormat = AnswerFormat.TAGS) -> float:
    """Overlap of the answered box with the true one, in [0, 1] (VLM-R1, arXiv 2504.07615, section 3.2).

    If nothing fits, only the answer "None" scores.

    Args:
        text: A completion.
        target: The true box in the coordinates that the prompt asks for, or "None".
        answer_format: The form that separates the answer from the reasoning.
    """
    return _overlap(text, target, answer_format, iou)


def giou_reward(text: str, target: Target, answer_format: AnswerFormat = AnswerFormat.TAGS) -> float:
    """(1 + generalised IoU) / 2, in [0, 1]: it also tells boxes apart that do not overlap.

    If nothing fits, only the answer "None" scores.
    """
    return _overlap(text, target, answer_format, _scaled_giou)


def dynamic_iou_reward(
    text: str, target: Target, answer_format: AnswerFormat = AnswerFormat.TAGS, progress: float = 1.0
) -> float:
    """The overlap if it reaches `least_iou`, else 0 (V-Triune, arXiv 2505.18129).

    Args:
        text: A completion.
        target: The true box in the coordinates that the prompt asks for, or "None".
        answer_format: The form that separates the answer from the reasoning.
        progress: Part of the training steps that are done, in [0, 1].
    """
    overlap = iou_reward(text, target, answer_format)
    return overlap if overlap >= least_iou(progress) else 0.0


def least_iou(progress: float) -> float:
    """The IoU that a box must reach: 0.85 in the first tenth of training, 0.95 up to a quarter, then 0.99."""
    return next((least for end, least in SCHEDULE if progress < end), SCHEDULE[-1][1])


def _overlap(text: str, target: Target, answer_format: AnswerFormat, measure: Callable[[Box, Box], float]) -> float:
    answer = parse_boxed_answer(text, answer_format)
    if answer is None:
        return 0.0
    if answer == NONE or target == NONE:
        return float(answer == target)
    return measure(answer, target)


def iou50_reward(text: str, target: Target, answer_format: AnswerFormat = AnswerFormat.TAGS) -> float:
    """1 if the overlap is at least 0.5, which is RefCOCO's accuracy, else 0."""
    return float(iou_reward(text, target, answer_format) >= 0.5)


def box_format_reward(text: str, target: Target, answer_format: AnswerFormat = AnswerFormat.TAGS) -> float:
    """1 for a text in the answer format and nothing else, whose answer is exactly a box or "None"; else 0."""
    return float(answer_format.is_followed(text) and is_exact_box(answer_format.extract(text) or ""))


def _scaled_giou(a: Box, b: Box) -> float:
    return (1 + giou(a, b)) / 2
