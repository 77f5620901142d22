"""Reads and writes the content of answers. No text raises, and every function runs in time linear in its length."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

from vlmenv.core.coordinates import Box, iou, is_box

NONE: Final = "None"
"""What is answered, and written in data sets, when nothing in the image fits."""

Target = Box | Literal["None"]
"""A box, or `"None"` where nothing in the image fits."""


class Detection(NamedTuple):
    """A labelled box."""

    label: str
    box: Box
    crowd: bool = False
    """of a true box: a region of many, in which answers count neither way, as in COCO"""
    area: float | None = None
    """of a true box: the object's area where it is known better than the box's, in squared pixels"""


AnswerKind = Literal["choice", "yes_no", "numeric", "exact", "math", "edit"]
"""How an answer is compared with the true one: `choice` by the letter, or the set of letters, `yes_no` by the word, `numeric` within a
tolerance, `exact` as a normalised string, `math` symbolically, `edit` by the share of characters that are right."""


class Answer(NamedTuple):
    """A true answer, and how others are compared with it."""

    text: str
    kind: AnswerKind
    tolerance: float = 0.0
    """of numbers: the greatest difference that still counts as equal"""
    choices: tuple[str, ...] = ()
    """of letters: what those from A on stand for, if that is known; it may be written out in their place"""
    others: tuple[Answer, ...] = ()
    """other answers that are as right"""


class Caption(NamedTuple):
    """The truth of a captioning row."""

    keywords: tuple[str, ...]
    """what a description should mention"""
    answer: Answer | None = None
    """of the question that the row asks besides, if any"""


# Bounded quantifiers only: no input makes these backtrack beyond a number's own length.
_INNERMOST_LIST = re.compile(r"\[([^\[\]]*)\]")
_NUMBER = re.compile(r"[+-]?\d{1,9}(?:\.\d{0,17})?", re.ASCII)
_TRAILING_COMMA = re.compile(r",\s*([\]}])")
_LONGEST_DETECTIONS = 100_000
_LONGEST_ANSWER = 10_000  # characters; a box needs 30, a wordy answer some hundreds
_NONE_FORMS: Final = frozenset({"none", '"none"', "'none'", "none.", "[]"})


def parse_box(content: str) -> Target | None:
    """Reads one box, or "None", from the content of an answer.

    A bare list, a fenced one, a JSON object with `bbox_2d`, floats and trailing commas all parse.
    What holds no box, more than one, or one with swapped edges, another count of numbers, or numbers
    that are no finite coordinates does not, nor does an answer of more than 10,000 characters.

    Args:
        content: Any text.

    Returns:
        The box in the coordinates that the text uses, `"None"`, or None if there is no single answer.
    """
    if len(content) > _LONGEST_ANSWER:
        return None
    if _unfenced(content).lower() in _NONE_FORMS:
        return NONE
    found: Box | None = None
    for match in _INNERMOST_LIST.finditer(content):
        values = _numbers(match[1])
        if values is None:
            continue
        if found is not None or not is_box(values):
            return None
        found = (values[0], values[1], values[2], values[3])
    return found


def _unfenced(content: str) -> str:
    """`content` without white space and a Markdown code fence around it."""
    content = content.strip().removeprefix("```json").removeprefix("```").removesuffix("```")
    return content.strip()


def _numbers(items: str) -> tuple[float, ...] | None:
    """The numbers of a comma-separated list; None where it is no list of numbers."""
    parts = [part.strip() for part in items.rstrip().removesuffix(",").split(",")]
    if not all(_NUMBER.fullmatch(part) for part in parts):
        return None
    return tuple(float(part) for part in parts)


def parse_detections(content: str) -> tuple[Detection, ...] | None:
    """Reads a list of labelled boxes from the content of an answer; "None" is the empty list.

    A JSON list of `{"bbox_2d": [x1, y1, x2, y2], "label": str}`, fenced or not, a single such object,
    floats and trailing commas all parse. One entry that is no labelled box spoils the list.

    Args:
        content: Any text.

    Returns:
        The detections in the coordinates that the text uses, or None if there is no such list, or
        more than 100,000 characters of it.
    """
    if len(content) > _LONGEST_DETECTIONS:
        return None
    content = _unfenced(content)
    if content.lower() in _NONE_FORMS:
        return ()
    try:
        found = json.loads(_TRAILING_COMMA.sub(r"\1", content))
    except (ValueError, RecursionError):
        return None
    entries = [_detection(entry) for entry in (found if isinstance(found, list) else [found])]
    return None if None in entries else tuple(entry for entry in entries if entry is not None)


def _detection(entry: object) -> Detection | None:
    """A JSON object as a detection; None where it is none."""
    if not isinstance(entry, dict) or not isinstance(entry.get("label"), str):
        return None
    values = entry.get("bbox_2d")
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        return None
    try:
        box = tuple(float(value) for value in values)
    except OverflowError:
        return None
    return Detection(entry["label"].strip(), (box[0], box[1], box[2], box[3])) if is_box(box) else None


def write_detections(detections: Sequence[Detection]) -> str:
    """Detections as models are asked to write them: fenced JSON, or "None".

    Coordinates are whole numbers, but for boxes so small that rounding would cost COCO's highest threshold.
    """
    if not detections:
        return NONE
    rows = [{"bbox_2d": _rounded(box), "label": label} for label, box, *_ in detections]
    return f"```json\n{json.dumps(rows, ensure_ascii=False)}\n```"


def _rounded(box: Box) -> list[float]:
    whole = (round(box[0]), round(box[1]), round(box[2]), round(box[3]))
    return list(whole if is_box(whole) and iou(whole, box) >= 0.95 else (round(value, 2) for value in box))


def write_box(target: Target) -> str:
    """A box as models are asked to write it, rounded to whole numbers; "None" stays "None"."""
    if target == NONE:
        return NONE
    return "[" + ",".join(f"{value:.0f}" for value in target) + "]"
