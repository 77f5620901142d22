"""The form of true boxes in a data set: the meaning of their numbers, and the orientation of the image."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from vlmenv.core.coordinates import Box, is_box
from vlmenv.envs.data.images import exif_orientation, image_size
from vlmenv.envs.data.media import ImageRef
from vlmenv.envs.data.rows import Row

Change = Callable[[Box], Box]
MapBoxes = Callable[[Any, Change], Any]
"""Gives a truth with each of its boxes changed."""

_LIST = re.compile(r"\[([^\[\]]*)\]")
_NUMBER = re.compile(r"[+-]?\d{1,17}(?:\.\d{0,40})?(?:[eE][+-]?\d{1,3})?", re.ASCII)


class BoxForm(StrEnum):
    """What the four numbers of a box are in a data set."""

    XYXY = "xyxy"
    """Left, top, right and bottom edge, in pixels."""
    XYWH = "xywh"
    """Left and top edge, width and height, in pixels, as COCO has them."""
    FRACTIONS = "fractions"
    """The edges as fractions of the image's width and height."""
    NORM1000 = "norm1000"
    """The edges in thousandths of the image's width and height."""


class BoxOrientation(StrEnum):
    """The orientation of an image that its boxes refer to, if EXIF turns it."""

    SHOWN = "shown"
    """The turned one, which is shown: browsers and most tools for labelling turn images too."""
    STORED = "stored"
    """That of the stored pixels, as libraries read them that leave EXIF alone."""


@dataclass(frozen=True)
class BoxReading:
    """How the boxes of a data set are read."""

    map_boxes: MapBoxes
    """of the task"""
    form: BoxForm | None = None
    """None: xyxy in answers, and the form of the layout if it has its own"""
    orientation: BoxOrientation = BoxOrientation.SHOWN

    def as_corners(self, row: Row) -> Row:
        """A row whose boxes have four edges, as tasks read them, and may yet need to be scaled.

        Raises:
            ValueError: What the data set has as boxes are none in this form.
        """
        form = self._form_of(row)
        if form is None:
            return row
        edges: Change = corners if form is BoxForm.XYWH else lambda box: box
        if row.detections is None:
            return replace(row, answer=change_numbers(row.answer, edges))
        found = [one._replace(box=edges(lengths(one.box))) for one in row.detections]
        for one in found:
            if not is_box(one.box):
                raise ValueError(f"the box {list(one.box)} covers nothing, if boxes are in {form}")
        return replace(row, detections=tuple(found))

    def _form_of(self, row: Row) -> BoxForm | None:
        """The form of a row's boxes: the given one, or that of its layout. None: edges in pixels."""
        return BoxForm(row.form) if self.form is None and row.form else self.form

    def in_pixels(self, target: Any, row: Row, ref: ImageRef, shown: tuple[int, int]) -> Any:
        """The truth in pixels of the image as it is shown.

        Args:
            target: What the task has read of `as_corners`.
            row: The row.
            ref: Where its first image is.
            shown: Its full width and height, turned as EXIF says.
        """
        width, height = shown
        turn, form = self._turn(row, ref, shown), self._form_of(row)
        if turn == 1 and form not in (BoxForm.FRACTIONS, BoxForm.NORM1000):
            return target
        size = (height, width) if turn in SIDEWAYS else (width, height)
        return self.map_boxes(target, lambda box: turned(scaled(box, form, size), turn, size))

    def told(self, row: Row, shown: tuple[int, int]) -> BoxOrientation | None:
        """The orientation that fits the width and height in the row; None if they do not decide."""
        if shown[0] == shown[1] or row.size not in (shown, shown[::-1]):
            return None
        return BoxOrientation.SHOWN if row.size == shown else BoxOrientation.STORED

    def _turn(self, row: Row, ref: ImageRef, shown: tuple[int, int]) -> int:
        """The EXIF orientation to turn the row's boxes by; 1: none."""
        told = self.told(row, shown)
        if BoxOrientation.STORED not in (told, self.orientation):
            return 1
        turn = exif_orientation(ref)
        orientation = told if told is not None and turn in SIDEWAYS else self.orientation
        return turn if orientation is BoxOrientation.STORED else 1


SIDEWAYS = (5, 6, 7, 8)
"""The EXIF orientations that exchange width and height."""


def size_fault(told: tuple[int, int] | None, ref: ImageRef) -> str | None:
    """What is wrong with the width and height that a data set states for an image; None if they are right.

    Those of the image turned as EXIF says are right too.

    Args:
        told: Width and height; None if the data set states none.
        ref: Where the image is. An unreadable one has no fault here; it is told when it is shown.
    """
    if told is None or ref is None:
        return None
    try:
        stored = image_size(ref)
        if told == stored or (told == stored[::-1] and exif_orientation(ref) in SIDEWAYS):
            return None
    except ValueError:
        return None
    said, real = (f"{width} x {height}" for width, height in (told, stored))
    return f"the data set says that the image has {said} pixels, but it has {real}: its boxes and masks may not fit"


def corners(numbers: Box) -> Box:
    """The edges of a box given by left and top edge, width and height."""
    x, y, width, height = numbers
    return (x, y, x + width, y + height)


def lengths(box: Box) -> Box:
    """The inverse of `corners`."""
    x1, y1, x2, y2 = box
    return (x1, y1, x2 - x1, y2 - y1)


def scaled(box: Box, form: BoxForm | None, size: tuple[int, int]) -> Box:
    """A box in pixels, of edges in a form, and the image's width and height."""
    whole = {BoxForm.FRACTIONS: 1, BoxForm.NORM1000: 1000}
    if form not in whole:
        return box
    across, down = size[0] / whole[form], size[1] / whole[form]
    return (box[0] * across, box[1] * down, box[2] * across, box[3] * down)


def turned(box: Box, orientation: int, size: tuple[int, int]) -> Box:
    """A box of a stored image, on the image as it is shown.

    Args:
        box: In pixels of the stored image.
        orientation: As EXIF has it, from 1 to 8.
        size: Width and height of the stored image.
    """
    (x1, y1, x2, y2), (width, height) = box, size
    if orientation in (2, 3, 7, 8):  # left and right are exchanged
        x1, x2 = width - x2, width - x1
    if orientation in (3, 4, 6, 7):  # top and bottom
        y1, y2 = height - y2, height - y1
    return (y1, x1, y2, x2) if orientation in SIDEWAYS else (x1, y1, x2, y2)


def _plain(value: float) -> str:
    """A number without an exponent, and with no more digits than readers of boxes take."""
    return f"{value:.12f}".rstrip("0").rstrip(".")


def numbers_in(text: str) -> list[Box]:
    """The lists of four numbers in a text."""
    return boxes_of(text, change_numbers)


def boxes_of(target: Any, map_boxes: MapBoxes) -> list[Box]:
    """The boxes of a truth."""
    found: list[Box] = []

    def keep(box: Box) -> Box:
        found.append(box)
        return box

    map_boxes(target, keep)
    return found


def change_numbers(text: str, change: Change) -> str:
    """A text with each list of four numbers in it changed."""

    def changed(match: re.Match[str]) -> str:
        parts = [part.strip() for part in match[1].rstrip().removesuffix(",").split(",")]
        if len(parts) != 4 or not all(map(_NUMBER.fullmatch, parts)):
            return match[0]
        values = [float(part) for part in parts]
        box = change((values[0], values[1], values[2], values[3]))
        return "[" + ", ".join(map(_plain, box)) + "]"

    return _LIST.sub(changed, text)
