"""Boxes, their overlap, and the conventions in which vision-language models write coordinates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar, cast

from vlmenv.core.errors import ConfigError

Box = tuple[float, float, float, float]
"""`(x1, y1, x2, y2)`, real-valued edges with the origin at the top left; a box covers
`(x2 - x1) * (y2 - y1)`, without the `+ 1` of pixel-index conventions."""

Point = tuple[float, float]
"""`(x, y)`, real-valued, with the origin at the top left."""

Place = TypeVar("Place", bound=tuple[float, ...])
"""Numbers in which x and y alternate: a point, a box, the corners of a polygon."""

MAX_COORDINATE = 5e4
"""Greatest plausible coordinate: no image is that large, and COCO does not count larger boxes."""


class CoordinateSpace(StrEnum):
    """A convention of coordinates in prompts, answers and `info`."""

    ORIGINAL = "original"
    """Pixels of the stored image."""
    RESIZED = "resized"
    """Pixels of the resized image that the model sees. Qwen2.5-VL was trained with these."""
    NORM1000 = "norm1000"
    """Thousandths of width and height. Qwen3-VL, InternVL and GLM-4V were trained with these."""


@dataclass(frozen=True, slots=True)
class ResizeRule:
    """The rule of Qwen's image processors for image sizes: sides are multiples of a factor, the area has bounds."""

    factor: int = 28
    """pixels of a merged patch's side, which divide both sides"""
    min_pixels: int = 56 * 56
    max_pixels: int = 16384 * 28 * 28

    def size(self, width: int, height: int) -> tuple[int, int]:
        """The width and height at which the model sees an image of `width` x `height`."""
        sides = (round(width / self.factor), round(height / self.factor))
        pixels = sides[0] * sides[1] * self.factor**2
        if pixels > self.max_pixels:
            shrink = math.sqrt(width * height / self.max_pixels)  # and then as theirs, to the last bit
            sides = (
                max(1, math.floor(width / shrink / self.factor)),
                max(1, math.floor(height / shrink / self.factor)),
            )
        elif pixels < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (width * height))
            sides = (math.ceil(width * grow / self.factor), math.ceil(height * grow / self.factor))
        return sides[0] * self.factor, sides[1] * self.factor


@dataclass(frozen=True, slots=True)
class Coordinates:
    """A convention of coordinates, with the rule for image sizes if it depends on one.

    Args:
        space: The convention.
        resize: The model's rule for image sizes, for `RESIZED` only.

    Raises:
        ConfigError: `resize` is missing for `RESIZED`, or given for another convention.
    """

    space: CoordinateSpace = CoordinateSpace.ORIGINAL
    resize: ResizeRule | None = None

    def __post_init__(self) -> None:
        if (self.resize is not None) != (self.space is CoordinateSpace.RESIZED):
            raise ConfigError("coordinates 'resized' and a resize rule go together: the one needs the other")

    @property
    def description(self) -> str:
        """The words that state the convention in a prompt."""
        return "coordinates from 0 to 1000" if self.space is CoordinateSpace.NORM1000 else "pixels"

    def shown_size(self, width: int, height: int) -> tuple[int, int]:
        """The width and height at which an image is shown."""
        return (width, height) if self.resize is None else self.resize.size(width, height)

    def from_pixels(self, place: Place, width: int, height: int) -> Place:
        """Writes a point, box or polygon, given in pixels of the original `width` x `height` image, in this convention.

        Example:
            >>> Coordinates(CoordinateSpace.NORM1000).from_pixels((32.0, 24.0), width=64, height=48)
            (500.0, 500.0)
        """
        return _scale(place, self._extent(width, height), (width, height))

    def to_pixels(self, place: Place, width: int, height: int) -> Place:
        """The inverse of `from_pixels`."""
        return _scale(place, (width, height), self._extent(width, height))

    def _extent(self, width: int, height: int) -> tuple[int, int]:
        """The coordinates of the image's lower right corner."""
        return (1000, 1000) if self.space is CoordinateSpace.NORM1000 else self.shown_size(width, height)


def _scale(place: Place, to: tuple[int, int], of: tuple[int, int]) -> Place:
    if to == of:
        return place
    return cast(Place, tuple(value * to[i % 2] / of[i % 2] for i, value in enumerate(place)))


def is_point(values: tuple[float, ...]) -> bool:
    """Whether `values` are two finite, plausible coordinates."""
    return len(values) == 2 and all(math.isfinite(v) and abs(v) <= MAX_COORDINATE for v in values)


def is_box(values: tuple[float, ...]) -> bool:
    """Whether `values` are four finite, plausible edges with `x1 < x2` and `y1 < y2`."""
    return (
        len(values) == 4
        and all(math.isfinite(v) and abs(v) <= MAX_COORDINATE for v in values)
        and values[0] < values[2]
        and values[1] < values[3]
        and (values[2] - values[0]) * (values[3] - values[1]) > 0  # which of the tiniest sides is 0
    )


def area(box: Box) -> float:
    """Area of a box."""
    return (box[2] - box[0]) * (box[3] - box[1])


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, in [0, 1].

    It is the same in every convention of coordinates, because scaling an axis scales all areas alike.
    """
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    intersection = width * height
    return intersection / (area(a) + area(b) - intersection)


def giou(a: Box, b: Box) -> float:
    """Generalised IoU of two boxes, in (-1, 1]: IoU less the part of their hull that neither covers (arXiv 1902.09630).

    It is the same in every convention of coordinates, as IoU is.
    """
    overlap = iou(a, b)
    hull = area((min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])))
    union = (area(a) + area(b)) / (1 + overlap)
    return overlap - (hull - union) / hull
