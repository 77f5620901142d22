"""Rewards for answers that are one box."""

from __future__ import annotations

from vlmenv.core.answers import NONE, Target, extract_answer, is_think_answer, parse_box
from vlmenv.core.coordinates import iou


def parse_boxed_answer(text: str) -> Target | None:
    """The box, or "None", that a completion answers with; None if it does not answer."""
    content = extract_answer(text)
    return None if content is None else parse_box(content)


def iou_reward(text: str, target: Target) -> float:
    """Overlap of the answered box with the true one, in [0, 1] (VLM-R1, arXiv 2504.07615, section 3.2).

    Where nothing fits, only an answer that says so scores.

    Args:
        text: A completion.
        target: The true box in the coordinates that the prompt asks for, or "None".
    """
    answer = parse_boxed_answer(text)
    if answer is None:
        return 0.0
    if answer == NONE or target == NONE:
        return float(answer == target)
    return iou(answer, target)


def iou50_reward(text: str, target: Target) -> float:
    """1 if the overlap is at least 0.5, which is RefCOCO's accuracy, else 0."""
    return float(iou_reward(text, target) >= 0.5)


def box_format_reward(text: str, target: Target) -> float:
    """1 for one think block and one answer block that holds a box or "None", and nothing else; else 0."""
    return float(is_think_answer(text) and parse_boxed_answer(text) is not None)
