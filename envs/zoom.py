"""Questions about details too small to see: an answer may ask for a part of the image, enlarged, before it answers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Final, NamedTuple

from vlmenv.core.answers import NONE, parse_box, write_box
from vlmenv.core.coordinates import Box
from vlmenv.core.formats import AnswerFormat
from vlmenv.core.spaces import Image
from vlmenv.envs.asking import AskingEnv, read_number, read_request
from vlmenv.envs.data.dataset import Reading
from vlmenv.envs.data.details import Detail, Dots
from vlmenv.envs.data.images import resized
from vlmenv.envs.data.scenes import Split
from vlmenv.envs.data.source import Sample, Source
from vlmenv.envs.episodes import Reply
from vlmenv.envs.rewards.terms import RewardTerm

_KEY: Final = "bbox_2d"
_LEAST_SIDE: Final = 8
"""Pixels of a crop's sides: smaller boxes are widened."""
_WIDEST: Final = 4
"""Longer side of a crop by its shorter side: narrower boxes are widened."""


class Crop(NamedTuple):
    """A request for a part of an image."""

    box: Box
    """in the convention of the prompt"""
    image: int = 1
    """number of the image among the sample's, from 1"""


def read_crop(text: str, answer_format: AnswerFormat = AnswerFormat.TAGS) -> Crop | None:
    """The request in a completion, as `{"bbox_2d": [x1, y1, x2, y2]}`; None if its answer is none.

    With several images `"image": 2` names another than the first. JSON that stands alone needs no tags around it.
    """
    content = read_request(text, _KEY, answer_format)
    box = None if content is None else parse_box(content)
    if content is None or box is None or box == NONE:
        return None
    number = read_number(content, "image")
    return Crop(box, 1 if number is None else number)


def crops_term(text: str, target: Any, answer_format: AnswerFormat = AnswerFormat.TAGS) -> float:
    """1 for an answer that asks for a crop, else 0. It has a negative weight: a crop costs something."""
    return float(read_crop(text, answer_format) is not None)


class ZoomEnv(AskingEnv):
    """`VLM-Zoom-v0`: as `VLM-VQA-v0`, but an answer may be a request for a crop, which is the next turn's image.

    The crop is cut from the image at its full size, and enlarged to the size at which the whole image is shown. With
    `max_turns=1` there are no crops, as a control.
    """

    terms: ClassVar[Mapping[str, RewardTerm]] = {**AskingEnv.terms, "crops": crops_term}
    default_rewards: ClassVar[Mapping[str, float]] = {"accuracy": 1.0, "format": 0.1, "crops": -0.05}
    turn_terms: ClassVar[Collection[str]] = ("crops",)
    max_turns: int = 3
    prompt_template: ClassVar[str] = (
        "Answer as {answer}\nTo see a part of the image enlarged, answer {request} in {coordinates}.\n{question}"
    )
    request: ClassVar[str] = f'{{"{_KEY}": [x1,y1,x2,y2]}}'
    again: ClassVar[str] = "ask for another part"

    def builtin_source(self, split: Split) -> Source:
        return Dots(split)

    def reading(self, *args: Any, **kwargs: Any) -> Reading:
        """As for other tasks, but images are loaded at their full size, from which crops are cut."""
        return replace(super().reading(*args, **kwargs), bound=None)

    def bring(self, sample: Sample, text: str) -> Reply | None:
        crop = read_crop(text, self.answer_format)
        part = None if crop is None else self._cut(sample, crop)
        return None if part is None else Reply("This part, enlarged.", (part,))

    def write_request(self, sample: Sample, texts: Sequence[str]) -> str | None:
        """A crop of the detail, if its place is known."""
        place = sample.place if isinstance(sample, Detail) else None
        if place is None or texts:
            return None
        height, width = sample.images[0].shape[:2]
        left, top, right, bottom = self.coordinates.from_pixels(place, width, height)
        box = (math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom))
        return f'{{"{_KEY}": {write_box(box)}}}'

    def _cut(self, sample: Sample, crop: Crop) -> Image | None:
        """A part of an image, enlarged to the longer side of the image as it is shown; None if there is none."""
        if not 1 <= crop.image <= len(sample.images):
            return None
        whole, size = sample.images[crop.image - 1], sample.full_sizes[crop.image - 1]
        found = pixels_of(self.coordinates.to_pixels(crop.box, *size), size)
        if found is None:
            return None
        height, width = whole.shape[:2]
        across, down = width / size[0], height / size[1]
        left, top, right, bottom = (round(edge * by) for edge, by in zip(found, (across, down) * 2, strict=True))
        part = whole[top : max(bottom, top + 1), left : max(right, left + 1)]
        scale = max(self._shown(whole, size).shape) / max(part.shape)
        enlarged = resized(part, *(max(1, round(side * scale)) for side in part.shape[1::-1]))
        return self._shown(enlarged, (enlarged.shape[1], enlarged.shape[0]))

    def _check_coordinates(self, template: str) -> None:
        """Requests name places, in any convention."""


def pixels_of(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """The pixels of a box within an image: left, top, right, bottom. None if it lies outside.

    Small and narrow boxes are widened around their middle, so that they can be enlarged.

    Args:
        box: Edges in pixels.
        size: Width and height of the image.
    """
    sides = []
    for start, end, most in zip(box[:2], box[2:], size, strict=True):
        low, high = max(0.0, start), min(float(most), end)
        if low >= high:
            return None
        sides.append((low, high))
    least = max(_LEAST_SIDE, *((high - low) / _WIDEST for low, high in sides))
    (left, right), (top, bottom) = (_widened(*side, least, most) for side, most in zip(sides, size, strict=True))
    return left, top, right, bottom


def _widened(low: float, high: float, least: float, most: int) -> tuple[int, int]:
    """An interval of at least `least`, within 0 to `most`, in whole numbers."""
    length = min(max(high - low, least), most)
    start = min(max((low + high - length) / 2, 0.0), most - length)
    first = round(start)
    return first, min(most, max(first + 1, round(start + length)))
