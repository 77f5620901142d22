"""Reads a column `objects`: boxes with labels, as Hugging Face data sets have them, or for the marks of ms-swift."""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from vlmenv.core.answers import Detection
from vlmenv.core.coordinates import is_box
from vlmenv.envs.data.scenes import DETECTION_QUESTION

ABSENT: Final = (1, 3)
"""The least and the most absent categories asked for beside those that are there (VLM-R1, arXiv 2504.07615)."""

_LABELS: Final = ("category", "categories", "label", "labels", "name", "names")
_REF_MARK: Final = "<ref-object>"
_BOX_MARK: Final = "<bbox>"


class Objects(NamedTuple):
    """What a column `objects` holds."""

    boxes: tuple[tuple[float, ...], ...]
    labels: tuple[Any, ...]
    """labels of the boxes: names, or numbers if the data set has no names"""
    refs: tuple[str, ...]
    """the texts for `<ref-object>`, one after the other"""
    categories: tuple[str, ...]
    """categories of the whole data set, if it lists them"""


def read_objects(stored: Any) -> Objects | None:
    """Reads a structure of lists, or a list of structures, also as JSON; None if it has no boxes.

    Raises:
        ValueError: A box is none, or its numbers are not pixels.
    """
    if isinstance(stored, str):
        try:
            stored = json.loads(stored)
        except (ValueError, RecursionError):
            return None
    if isinstance(stored, list) and all(isinstance(one, Mapping) for one in stored):
        stored = {key: [one.get(key) for one in stored] for key in dict.fromkeys(key for one in stored for key in one)}
    if not isinstance(stored, Mapping) or not isinstance(stored.get("bbox"), (list, tuple)):
        return None
    kinds = stored.get("bbox_type") or "real"
    if unlike := {kinds} - {"real"} if isinstance(kinds, str) else set(kinds) - {"real", None}:
        raise ValueError(
            f"the boxes of 'objects' are of type {unlike.pop()!r}: write them in pixels, or leave 'bbox_type' out and "
            "say what they are, as in --boxes-in fractions (norm1) or --boxes-in norm1000"
        )
    labels = next((stored[key] for key in _LABELS if stored.get(key)), ())
    refs = stored.get("ref") or stored.get("caption") or ()
    boxes = tuple(_numbers(box) for box in stored["bbox"])
    return Objects(boxes, tuple(labels), tuple(map(str, refs)), tuple(stored.get("names_of_all") or ()))


def _numbers(box: Any) -> tuple[float, ...]:
    try:
        return tuple(float(value) for value in box)
    except (TypeError, ValueError):
        raise ValueError(f"a box of 'objects' is {str(box)[:80]}, no list of numbers") from None


def has_marks(texts: Sequence[str]) -> bool:
    """Whether texts have marks for boxes or for their labels."""
    return any(_BOX_MARK in text or _REF_MARK in text for text in texts)


def fill_marks(texts: Sequence[str], objects: Objects | None) -> list[str]:
    """Puts the boxes, as they are stored, and what they are of in the place of the marks, one after the other.

    Raises:
        ValueError: There are more or fewer of them than marks.
    """
    if objects is None:
        raise ValueError(f"the text has {_BOX_MARK} or {_REF_MARK} marks, but the row has no 'objects' with 'bbox'")
    boxes = [json.dumps([int(value) if value.is_integer() else value for value in box]) for box in objects.boxes]
    texts = _filled(texts, _BOX_MARK, boxes)
    return _filled(texts, _REF_MARK, objects.refs)


def _filled(texts: Sequence[str], mark: str, values: Sequence[str]) -> list[str]:
    if (marks := sum(text.count(mark) for text in texts)) != len(values):
        raise ValueError(f"the text has {marks} {mark} marks, but 'objects' has {len(values)} for them")
    pieces, left = [], iter(values)
    for text in texts:
        first, *rest = text.split(mark)
        pieces.append(first + "".join(next(left) + piece for piece in rest))
    return pieces


def labelled_boxes(objects: Objects) -> tuple[Detection, ...]:
    """The boxes of a Hugging Face data set for detection, which are `[x, y, width, height]` in pixels.

    Raises:
        ValueError: A box has no name, or covers nothing.
    """
    if len(objects.labels) != len(objects.boxes) or not all(isinstance(one, str) for one in objects.labels):
        raise ValueError("the boxes of 'objects' have no names in 'category': numbers alone name nothing")
    found = []
    for label, box in zip(objects.labels, objects.boxes, strict=True):
        edges = (*box[:2], *(start + length for start, length in zip(box[:2], box[2:], strict=False)))
        if not is_box(edges):
            raise ValueError(f"the box {list(box)} of 'objects' is no [x, y, width, height]")
        found.append(Detection(label.strip(), (edges[0], edges[1], edges[2], edges[3])))
    return tuple(found)


def detection_question(present: Collection[str], categories: Collection[str], key: str) -> str:
    """Asks for all categories that an image holds, and for one to three that it does not hold.

    Args:
        present: Those that it holds.
        categories: All of the data set.
        key: Fixes the choice and the order, such as the image's id.
    """
    number = abs(int(key)) if key.removeprefix("-").isdecimal() and key.isascii() else zlib.crc32(key.encode())
    rng = np.random.default_rng(number)
    absent = sorted(set(categories).difference(present))
    count = rng.integers(ABSENT[0], ABSENT[1] + 1)
    asked = [*sorted(present), *(absent[i] for i in rng.permutation(len(absent))[:count])]
    return ask_for([asked[i] for i in rng.permutation(len(asked))])


def ask_for(categories: Sequence[str]) -> str:
    """The question for objects of some categories."""
    return DETECTION_QUESTION.format(kinds=", ".join(categories))
