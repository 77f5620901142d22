"""Built-in scenes with details, which are too small to see where models see images at a few pixels.

The training and the evaluation stream are endless and disjoint, as those of the scenes are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from vlmenv.core.answers import Answer
from vlmenv.core.coordinates import Box
from vlmenv.core.spaces import Image
from vlmenv.envs.data.scenes import (
    COLOURS,
    SHAPES,
    Reference,
    Scene,
    Scenes,
    Shape,
    Split,
    choose_reference,
    references,
    sample_scene,
    sample_tint,
)
from vlmenv.envs.data.source import Sample

SCALE: Final = 2
"""Pixels of these scenes per pixel of the built-in scenes: they have 192 x 192."""
SIDES: Final = (3, 5)
"""Least and greatest side of a dot in pixels."""

REACH: Final = 8
"""Pixels on each side of a dot's middle that belong to its place, as far as its shape reaches."""

_COUNTS = (2, 4)


@dataclass(frozen=True, slots=True)
class Detail(Sample):
    """A sample with a place to look at."""

    place: Box | None = None
    """a box around what the question is about, in pixels of the image"""


class Dots(Scenes):
    """Scenes of shapes, each with a dot of another colour in its middle.

    The question is what colour a dot is (the sample's subject is `tiny`), or of what kind a shape is (`plain`).

    Args:
        split: The stream.
        plain: Share of questions of the second kind, where there may be one.
    """

    stream = 2

    def __init__(self, split: Split, plain: float = 0.5) -> None:
        super().__init__(split)
        self.plain = plain

    def get(self, index: int) -> Detail:
        scene, _ = sample_scene(self.split, index, _COUNTS)
        rng = self.rng(index)
        image, dots = dotted(scene, rng)
        plain = [one for one in references(scene) if not set(SHAPES) & set(one.expression.split())]
        asked = _of_dot(choose_reference(scene, rng), dots)
        if plain and rng.random() < self.plain:
            asked = _of_shape(plain[rng.integers(len(plain))])
        return Detail(
            f"dot-{self.split}-{index}",
            (image,),
            asked.question,
            Answer(asked.answer, "exact"),
            asked.rationale,
            asked.kind,
            place=asked.place,
        )


class Dot(NamedTuple):
    """A dot as it is drawn."""

    colour: str
    place: Box
    """around it, within its shape's box"""


class _Asked(NamedTuple):
    """A question with its answer."""

    kind: str
    question: str
    answer: str
    rationale: str
    place: Box


def _of_dot(reference: Reference, dots: Mapping[Shape, Dot]) -> _Asked:
    dot = dots[reference.target]
    question = f"What colour is the dot in {reference.expression}?"
    return _Asked("tiny", question, dot.colour, f"It is in the {reference.target}.", dot.place)


def _of_shape(reference: Reference) -> _Asked:
    shape, question = reference.target, f"What kind of shape is {reference.expression}?"
    return _Asked("plain", question, shape.kind, f"It is the {shape}.", _enlarged(shape.box))


def _enlarged(box: Box) -> Box:
    """A box in pixels of the image."""
    left, top, right, bottom = box
    return SCALE * left, SCALE * top, SCALE * right, SCALE * bottom


def dotted(scene: Scene, rng: np.random.Generator, sides: tuple[int, int] = SIDES) -> tuple[Image, dict[Shape, Dot]]:
    """A scene enlarged, with a dot of another colour in the middle of each shape.

    Args:
        scene: The scene.
        rng: Draws the dots' colours and sides.
        sides: Least and greatest side of a dot in pixels.

    Returns:
        The image, uint8 [2·H, 2·W, 3], and the dots by their shapes.
    """
    image = scene.image.repeat(SCALE, axis=0).repeat(SCALE, axis=1)
    return image, {shape: _draw_dot(image, shape, rng, sides) for shape in scene.shapes}


def _draw_dot(image: Image, shape: Shape, rng: np.random.Generator, sides: tuple[int, int]) -> Dot:
    """Draws a square dot in the middle of a shape."""
    colour = str(rng.choice([one for one in COLOURS if one != shape.colour]))
    side = int(rng.integers(sides[0], sides[1] + 1))
    left, top, right, bottom = _enlarged(shape.box)
    height = 0.65 if shape.kind == "triangle" else 0.5  # where it is wide enough
    x, y = (left + right) / 2, top + height * (bottom - top)
    first, upper = round(x - side / 2), round(y - side / 2)
    image[upper : upper + side, first : first + side] = sample_tint(colour, rng)
    place = max(left, x - REACH), max(top, y - REACH), min(right, x + REACH), min(bottom, y + REACH)
    return Dot(colour, place)
