"""Rewards for answers that are one box."""

from __future__ import annotations

from vlmenv.core.answers import NONE, Target, is_exact_box, parse_box
from vlmenv.core.coordinates import iou
from vlmenv.core.formats import AnswerFormat


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
    answer = parse_boxed_answer(text, answer_format)
    if answer is None:
        return 0.0
    if answer == NONE or target == NONE:
        return float(answer == target)
    return iou(answer, target)


def iou50_reward(text: str, target: Target, answer_format: AnswerFormat = AnswerFormat.TAGS) -> float:
    """1 if the overlap is at least 0.5, which is RefCOCO's accuracy, else 0."""
    return float(iou_reward(text, target, answer_format) >= 0.5)


def box_format_reward(text: str, target: Target, answer_format: AnswerFormat = AnswerFormat.TAGS) -> float:
    """1 for a text in the answer format and nothing else, whose answer is exactly a box or "None"; else 0."""
    return float(answer_format.is_followed(text) and is_exact_box(answer_format.extract(text) or ""))
