"""Built-in scenes with details that are too small to see at the size of most models' images.

The training and the evaluation stream are endless and disjoint, as those of the scenes are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from vlmenv.core.answers import Answer
from vlmenv.core.coordinates import Box
from vlmenv.core.spaces import Image
from vlmenv.envs.data.scenes import COLOURS, Scenes, Shape, choose_reference, sample_scene, sample_tint
from vlmenv.envs.data.source import Sample

SCALE: Final = 5
"""Pixels of these scenes per pixel of the built-in scenes: they have 480 x 480."""
SIDES: Final = (3, 5)
"""Least and greatest side of a dot in pixels."""

_COUNTS = (2, 5)
_MARGIN = 4  # pixels around a shape that a crop of it shows


@dataclass(frozen=True, slots=True)
class Detail(Sample):
    """A sample with a place to look at."""

    place: Box | None = None
    """a box around what the question is about, in pixels of the image"""


class TinyDots(Scenes):
    """Scenes of shapes, each with a dot of another colour in its middle. The question is the colour of one dot."""

    stream = 2

    def get(self, index: int) -> Detail:
        scene, _ = sample_scene(self.split, index, _COUNTS)
        rng = self.rng(index)
        reference = choose_reference(scene, rng)
        image = scene.image.repeat(SCALE, axis=0).repeat(SCALE, axis=1)
        dots = {shape: _dot(image, shape, rng) for shape in scene.shapes}
        colour, shape = dots[reference.target], reference.target
        return Detail(
            f"dot-{self.split}-{index}",
            (image,),
            f"What colour is the dot in {reference.expression}?",
            Answer(colour, "exact"),
            f"It is in the {shape}.",
            "colour",
            place=_around(shape.box, len(image)),
        )


def _around(box: Box, side: int) -> Box:
    """A box around a shape, in pixels of the image."""
    left, top, right, bottom = (SCALE * edge for edge in box)
    return (
        max(left - _MARGIN, 0.0),
        max(top - _MARGIN, 0.0),
        min(right + _MARGIN, float(side)),
        min(bottom + _MARGIN, float(side)),
    )


def _dot(image: Image, shape: Shape, rng: np.random.Generator) -> str:
    """Draws a square dot in the middle of a shape, and gives its colour."""
    colour = str(rng.choice([one for one in COLOURS if one != shape.colour]))
    side = int(rng.integers(SIDES[0], SIDES[1] + 1))
    left, top, right, bottom = shape.box
    height = 0.65 if shape.kind == "triangle" else 0.5  # where it is wide enough
    x, y = SCALE * (left + right) / 2 - side / 2, SCALE * (top + height * (bottom - top)) - side / 2
    image[round(y) : round(y) + side, round(x) : round(x) + side] = sample_tint(colour, rng)
    return colour
