"""Built-in scenes: coloured shapes drawn from a seed, with exact boxes and referring expressions.

The training and the evaluation stream are endless and disjoint: the content of a scene, through a
hash, decides to which of the two it belongs.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageDraw

from vlmenv.core.answers import Detection
from vlmenv.core.coordinates import Box, area
from vlmenv.core.spaces import Image
from vlmenv.envs.data.source import Sample, Source

Split = Literal["train", "eval"]

QUESTION: Final = "Locate {expression}."
DETECTION_QUESTION: Final = "Detect all of these: {kinds}."

Placed = tuple[str, str, str, int, int, int, int]
"""A shape as (size, colour, kind, x, y, width, height)."""
Layout = tuple[Placed, ...]

SIDE: Final = 96
"""Width and height of a scene in pixels."""
COLOURS: Final = {
    "red": (214, 40, 40),
    "orange": (247, 127, 0),
    "yellow": (250, 212, 30),
    "green": (42, 157, 70),
    "blue": (35, 90, 200),
    "purple": (130, 50, 160),
}
SHAPES: Final = ("circle", "square", "triangle", "star")
SIDES: Final = {"small": (16, 25), "large": (30, 40)}
"""Side lengths of a size class in pixels, both ends included."""

_EVAL_SHARE = 4  # one scene in so many belongs to the evaluation stream
_GAP = 2  # pixels between neighbouring shapes
_LEAD = 6  # pixels by which "the left-most" must lead
_STAR = np.array([(np.sin(a), -np.cos(a)) for a in np.arange(10) * np.pi / 5]) * np.tile([[1.0], [0.4]], (5, 1))


@dataclass(frozen=True, slots=True)
class Shape:
    """One drawn object."""

    size: str
    colour: str
    kind: str
    box: Box
    """exact edges of the drawn pixels"""

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.kind}"


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture and its shapes."""

    image: Image
    shapes: tuple[Shape, ...]
    layout: Layout = ()
    """the shapes as they are drawn, in the same order"""

    def mask(self, number: int) -> NDArray[np.bool_]:
        """The pixels [H, W] of a shape, by its number."""
        return np.asarray(mask_of(self.layout[number]))


@dataclass(frozen=True, slots=True)
class Reference:
    """An expression that fits exactly one shape of a scene."""

    expression: str
    kind: str
    """`colour`, `shape`, `both`, `size` or `relation`: what singles the shape out"""
    target: Shape


class Drawn(Source):
    """Built-in samples of a stream, each drawn from its index; endless."""

    size = None
    stream: ClassVar[int]
    """Tells the random numbers from those of other sources."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def rng(self, index: int) -> np.random.Generator:
        """The random numbers of a sample."""
        return np.random.default_rng([int(self.split == "eval"), index, self.stream])


class Scenes(Drawn):
    """Built-in scenes of a stream; endless."""


class ReferringScenes(Scenes):
    """Built-in scenes, each with one expression."""

    def get(self, index: int) -> Sample:
        scene, rng = sample_scene(self.split, index)
        reference = choose_reference(scene, rng)
        question = QUESTION.format(expression=reference.expression)
        return Sample(
            f"scene-{self.split}-{index}", (scene.image,), question, reference.target.box, f"the {reference.target}"
        )


class CountScenes(Scenes):
    """Built-in scenes of up to nine shapes, with the question how many of some kind there are."""

    def get(self, index: int) -> Sample:
        scene, rng = sample_scene(self.split, index, (1, 9))
        noun, group = choose_group(scene.shapes, rng)
        question = f"How many {noun} are there?"
        return Sample(f"count-{self.split}-{index}", (scene.image,), question, len(group), list_shapes(group))


class DetectionScenes(Scenes):
    """Built-in scenes with questions for several kinds of shapes; some kinds are absent."""

    def get(self, index: int) -> Sample:
        scene, rng = sample_scene(self.split, index)
        asked = [str(kind) for kind in rng.permutation(SHAPES)[: rng.integers(1, len(SHAPES) + 1)]]
        target = tuple(Detection(shape.kind, shape.box) for shape in scene.shapes if shape.kind in asked)
        there = ", ".join(f"a {shape}" for shape in scene.shapes if shape.kind in asked)
        question = DETECTION_QUESTION.format(kinds=", ".join(asked))
        return Sample(f"scene-{self.split}-{index}", (scene.image,), question, target, there or "none of them")


def sample_scene(split: Split, index: int, counts: tuple[int, int] = (2, 4)) -> tuple[Scene, np.random.Generator]:
    """Draws scene number `index` of a stream.

    Args:
        split: The stream.
        index: A non-negative whole number; the same one gives the same scene.
        counts: The least and the most shapes in a scene.

    Returns:
        The scene, for which there is at least one unambiguous expression, and the generator in the
        state after drawing, for what else belongs to the sample.
    """
    rng = np.random.default_rng([int(split == "eval"), index])
    while True:
        layout = sample_layout(rng, counts)
        if is_held_out(layout) == (split == "eval"):
            scene = draw_layout(layout, rng)
            if references(scene):
                return scene, rng


def is_held_out(layout: Layout) -> bool:
    """Whether a scene of these shapes, drawn in whatever order, belongs to the evaluation stream."""
    return falls_to_eval(sorted(layout))


def falls_to_eval(content: object) -> bool:
    """Whether what a sample shows and asks, told by its `repr`, belongs to the evaluation stream."""
    return zlib.crc32(repr(content).encode()) % _EVAL_SHARE == 0


def references(scene: Scene) -> list[Reference]:
    """Every unambiguous expression for the shapes of a scene."""
    shapes = scene.shapes
    found = [
        Reference(f"the {' '.join(words)}", kind, shape)
        for shape in shapes
        for kind, words, fits in _descriptions(shape)
        if sum(map(fits, shapes)) == 1
    ]
    # A size is only worth saying where the description is ambiguous without it.
    plain = {reference.expression for reference in found if reference.kind != "size"}
    found = [
        reference
        for reference in found
        if reference.kind != "size" or reference.expression.replace(f" {reference.target.size}", "") not in plain
    ]
    return found + _superlatives(shapes)


def choose_reference(scene: Scene, rng: np.random.Generator) -> Reference:
    """Picks an expression: first the kind of expression, then one of that kind."""
    by_kind: dict[str, list[Reference]] = {}
    for reference in references(scene):
        by_kind.setdefault(reference.kind, []).append(reference)
    kinds = sorted(by_kind)
    chosen = by_kind[kinds[rng.integers(len(kinds))]]
    return chosen[rng.integers(len(chosen))]


def choose_group(shapes: Sequence[Shape], rng: np.random.Generator) -> tuple[str, list[Shape]]:
    """Picks shapes of a kind or colour, or all of them, by their number, and their noun in the plural."""
    groups = {"shapes": list(shapes)}
    groups |= {f"{kind}s": [shape for shape in shapes if shape.kind == kind] for kind in SHAPES}
    groups |= {f"{colour} shapes": [shape for shape in shapes if shape.colour == colour] for colour in COLOURS}
    # The number comes first: most groups are empty, or of one.
    numbers = sorted({len(group) for group in groups.values()})
    number = numbers[int(rng.integers(len(numbers)))]
    nouns = [noun for noun, group in groups.items() if len(group) == number]
    noun = nouns[int(rng.integers(len(nouns)))]
    return noun, groups[noun]


def list_shapes(shapes: Sequence[Shape]) -> str:
    """Shapes in words, such as "a large red circle, a small blue star"."""
    return ", ".join(f"a {shape}" for shape in shapes) or "none of them"


def sample_layout(rng: np.random.Generator, counts: tuple[int, int]) -> Layout:
    """Between `counts[0]` and `counts[1]` shapes that do not touch."""
    placed: list[Placed] = []
    for _ in range(rng.integers(counts[0], counts[1] + 1)):
        size, colour, kind = _attributes(rng, placed)
        width, height = (int(v) for v in rng.integers(SIDES[size][0], SIDES[size][1] + 1, size=2))
        if kind in ("circle", "square"):
            height = width
        place = find_place(rng, width, height, placed)
        if place is not None:
            placed.append((size, colour, kind, *place, width, height))
    return tuple(placed) if len(placed) >= counts[0] else sample_layout(rng, counts)


def find_place(rng: np.random.Generator, width: int, height: int, placed: Sequence[Placed]) -> tuple[int, int] | None:
    """A random upper left corner for a shape that touches no placed one; None if 20 tries find none."""
    for _ in range(20):
        x, y = int(rng.integers(1, SIDE - width)), int(rng.integers(1, SIDE - height))
        if all(_apart((x, y, width, height), other[3:]) for other in placed):
            return x, y
    return None


def _attributes(rng: np.random.Generator, placed: list[Placed]) -> tuple[str, str, str]:
    """Size, colour and kind; half the time one of them is an earlier shape's, so that shapes get confused."""
    size = ("small", "large")[rng.integers(2)]
    colour = list(COLOURS)[rng.integers(len(COLOURS))]
    kind = SHAPES[rng.integers(len(SHAPES))]
    if placed and rng.random() < 0.5:
        other = placed[rng.integers(len(placed))]
        shared = rng.integers(3)
        colour = other[1] if shared != 0 else colour
        kind = other[2] if shared != 1 else kind
    return size, colour, kind


def _apart(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return (
        a[0] + a[2] + _GAP <= b[0]
        or b[0] + b[2] + _GAP <= a[0]
        or a[1] + a[3] + _GAP <= b[1]
        or b[1] + b[3] + _GAP <= a[1]
    )


def draw_layout(layout: Layout, rng: np.random.Generator) -> Scene:
    """Draws shapes in their order; the tints of the background and of each shape are random."""
    picture = PILImage.new("RGB", (SIDE, SIDE), sample_background(rng))
    shapes = []
    for size, colour, kind, x, y, width, height in layout:
        mask = mask_of((size, colour, kind, x, y, width, height))
        picture.paste(sample_tint(colour, rng), mask=mask)
        box = mask.getbbox()
        assert box is not None
        shapes.append(Shape(size, colour, kind, tuple(float(v) for v in box)))  # type: ignore[arg-type]
    return Scene(np.asarray(picture), tuple(shapes), layout)


def mask_of(placed: Placed) -> PILImage.Image:
    """The pixels that an object takes, one bit each, of the whole scene's size."""
    mask = PILImage.new("1", (SIDE, SIDE))
    _draw_kind(ImageDraw.Draw(mask), *placed[2:])
    return mask


def sample_background(rng: np.random.Generator) -> tuple[int, ...]:
    """A light colour to draw on."""
    return tuple(int(v) for v in rng.integers(225, 256, size=3))


def sample_tint(colour: str, rng: np.random.Generator) -> tuple[int, ...]:
    """A tint of one of the `COLOURS`, close enough to have its name."""
    tint = np.clip(np.array(COLOURS[colour]) + rng.integers(-12, 13, size=3), 0, 255)
    return tuple(int(v) for v in tint)


def _draw_kind(draw: ImageDraw.ImageDraw, kind: str, x: int, y: int, width: int, height: int) -> None:
    right, bottom = x + width - 1, y + height - 1
    if kind == "circle":
        draw.ellipse((x, y, right, bottom), fill=1)
    elif kind == "square":
        draw.rectangle((x, y, right, bottom), fill=1)
    elif kind == "triangle":
        draw.polygon([(x, bottom), (x + (width - 1) / 2, y), (right, bottom)], fill=1)
    else:
        low, high = _STAR.min(axis=0), _STAR.max(axis=0)
        points = (_STAR - low) / (high - low) * (width - 1, height - 1) + (x, y)
        draw.polygon([tuple(point) for point in points.tolist()], fill=1)


def _descriptions(shape: Shape) -> list[tuple[str, tuple[str, ...], Callable[[Shape], bool]]]:
    """Ways to describe a shape by its attributes: the kind of description, its words, and whom it fits."""
    ways = [
        ("colour", ("colour",)),
        ("shape", ("kind",)),
        ("both", ("colour", "kind")),
        ("size", ("size", "colour")),
        ("size", ("size", "kind")),
        ("size", ("size", "colour", "kind")),
    ]
    return [(how, _words(shape, names), _fits(shape, names)) for how, names in ways]


def _words(shape: Shape, names: tuple[str, ...]) -> tuple[str, ...]:
    words = tuple(str(getattr(shape, name)) for name in names)
    return words if "kind" in names else (*words, "shape")


def _fits(shape: Shape, names: tuple[str, ...]) -> Callable[[Shape], bool]:
    return lambda other: all(getattr(other, name) == getattr(shape, name) for name in names)


def _superlatives(shapes: tuple[Shape, ...]) -> list[Reference]:
    """The left-most, largest and so on of all shapes, or of those of one colour or kind."""
    found = []
    for noun, members in _groups(shapes).items():
        for word, key, lead in _ORDERS:
            best, second = sorted(members, key=key)[:2]
            if key(second) - key(best) >= lead:
                kind = "size" if word in ("largest", "smallest") else "relation"
                found.append(Reference(f"the {word} {noun}", kind, best))
    return found


def _groups(shapes: tuple[Shape, ...]) -> dict[str, list[Shape]]:
    groups = {"shape": list(shapes)}
    for shape in shapes:
        groups.setdefault(shape.kind, [s for s in shapes if s.kind == shape.kind])
        groups.setdefault(f"{shape.colour} shape", [s for s in shapes if s.colour == shape.colour])
    return {noun: members for noun, members in groups.items() if len(members) > 1}


_ORDERS: Final[tuple[tuple[str, Callable[[Shape], float], float], ...]] = (
    ("left-most", lambda s: s.box[0] + s.box[2], 2 * _LEAD),
    ("right-most", lambda s: -s.box[0] - s.box[2], 2 * _LEAD),
    ("top-most", lambda s: s.box[1] + s.box[3], 2 * _LEAD),
    ("bottom-most", lambda s: -s.box[1] - s.box[3], 2 * _LEAD),
    ("largest", lambda s: -np.log(area(s.box)), 0.3),
    ("smallest", lambda s: np.log(area(s.box)), 0.3),
)
