"""Boxes, their overlap, and the conventions in which vision-language models write coordinates."""

from __future__ import annotations

import math
from enum import StrEnum

Box = tuple[float, float, float, float]
"""`(x1, y1, x2, y2)`, real-valued edges with the origin at the top left; a box covers
`(x2 - x1) * (y2 - y1)`, without the `+ 1` of pixel-index conventions."""

MAX_COORDINATE = 1e6
"""Coordinates beyond this are taken for garbage: no image is that large."""


class CoordinateSpace(StrEnum):
    """How coordinates are written in prompts, answers and `info`.

    `ORIGINAL` is pixels of the image in the observation; `NORM1000` is thousandths of its width and
    height, as Qwen3-VL, InternVL and GLM-4V were taught.
    """

    ORIGINAL = "original"
    NORM1000 = "norm1000"

    @property
    def description(self) -> str:
        """The words that tell a model of the convention."""
        return "pixels" if self is CoordinateSpace.ORIGINAL else "coordinates from 0 to 1000"

    def from_pixels(self, box: Box, width: int, height: int) -> Box:
        """Writes a box given in pixels of a `width` x `height` image in this convention."""
        if self is CoordinateSpace.ORIGINAL:
            return box
        return _scale(box, (1000, 1000), (width, height))

    def to_pixels(self, box: Box, width: int, height: int) -> Box:
        """The inverse of `from_pixels`."""
        if self is CoordinateSpace.ORIGINAL:
            return box
        return _scale(box, (width, height), (1000, 1000))


def _scale(box: Box, to: tuple[int, int], of: tuple[int, int]) -> Box:
    (to_x, to_y), (of_x, of_y) = to, of
    return box[0] * to_x / of_x, box[1] * to_y / of_y, box[2] * to_x / of_x, box[3] * to_y / of_y


def is_box(values: tuple[float, ...]) -> bool:
    """Whether `values` are four finite, plausible edges with `x1 < x2` and `y1 < y2`."""
    return (
        len(values) == 4
        and all(math.isfinite(v) and abs(v) <= MAX_COORDINATE for v in values)
        and values[0] < values[2]
        and values[1] < values[3]
    )


def area(box: Box) -> float:
    """Area of a box."""
    return (box[2] - box[0]) * (box[3] - box[1])


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, in [0, 1].

    It is the same in every `CoordinateSpace`, since scaling an axis scales all areas alike.
    """
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    intersection = width * height
    return intersection / (area(a) + area(b) - intersection)
