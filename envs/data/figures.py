"""Drawn mathematics with exact answers: bar charts, geometric figures, and shapes to count and price.

The training and the evaluation stream are endless and disjoint. A hash of figure and question decides which stream a
sample belongs to. Tints, places and the order of bars do not enter it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from math import isqrt
from typing import Final, NamedTuple

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from vlmenv.core.answers import Answer
from vlmenv.core.spaces import Image
from vlmenv.envs.data.scenes import (
    COLOURS,
    SHAPES,
    Drawn,
    Split,
    falls_to_eval,
    sample_background,
    sample_scene,
    sample_tint,
)
from vlmenv.envs.data.source import Sample

WIDTH: Final = 128
HEIGHT: Final = 96
"""Size of charts and geometric figures in pixels."""
HIGHEST: Final = 12
"""Greatest value of a bar."""
UNIT: Final = 6
"""Pixels of a bar's height for each unit of its value."""

_COUNTS = (3, 6)  # shapes to count
_FLOOR = 89  # the row under the bars
_FONT = ImageFont.load_default(size=12)
_SMALL_FONT = ImageFont.load_default(size=10)
_INK, _GREY, _PALE = (20, 20, 20), (150, 150, 150), (212, 212, 212)


class _Form(NamedTuple):
    """A question about some numbers."""

    about: str
    """what the numbers belong to"""
    text: str
    working: str
    """the computation, with places for the numbers, or for all of them as `list` or `terms`"""
    answer: Callable[..., int | Fraction | str]


class _Task(NamedTuple):
    image: Image
    form: _Form
    words: Sequence[object]
    """for the places in the form's text"""
    numbers: Sequence[int]


class MathFigures(Drawn):
    """Figures of a stream, each with one question to which the answer is a number in LaTeX; endless."""

    stream = 2

    def get(self, index: int) -> Sample:
        rng = self.rng(index)
        subject = list(_SUBJECTS)[rng.integers(len(_SUBJECTS))]
        image, form, words, numbers = _SUBJECTS[subject](self.split, rng)
        answer = _latex(form.answer(*numbers))
        written = [str(number) for number in numbers]
        working = form.working.format(*written, list=", ".join(written), terms=" + ".join(written), count=len(written))
        return Sample(
            f"figure-{self.split}-{index}",
            (image,),
            form.text.format(*words),
            Answer(answer, "math"),
            f"It is {working} = {answer}.",
            subject,
        )


def _latex(value: int | Fraction | str) -> str:
    if isinstance(value, Fraction) and value.denominator != 1:
        return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
    return str(value)


def _root(square: int) -> int | str:
    root = isqrt(square)
    return root if root * root == square else rf"\sqrt{{{square}}}"


_CHARTS: Final = (
    _Form("two", "What is the sum of the {0} and the {1} bar?", "{0} + {1}", lambda a, b: a + b),
    _Form("two", "By how much is the {0} bar higher than the {1} bar?", "{0} - {1}", lambda a, b: a - b),
    _Form("two", "How many times as high as the {1} bar is the {0} bar?", "{0} / {1}", Fraction),
    _Form("all", "What is the value of the highest bar?", "max({list})", lambda *values: max(values)),
    _Form("all", "What is the sum of all bars?", "{terms}", lambda *values: sum(values)),
    _Form("all", "What is the mean of all bars?", "({terms}) / {count}", lambda *v: Fraction(sum(v), len(v))),
)
_GEOMETRY: Final = (
    _Form("rectangle", "What is the area of the rectangle?", "{0} * {1}", lambda a, b: a * b),
    _Form("rectangle", "What is the perimeter of the rectangle?", "2 * ({0} + {1})", lambda a, b: 2 * (a + b)),
    _Form("rectangle", "What is the square of the rectangle's diagonal?", "{0}^2 + {1}^2", lambda a, b: a * a + b * b),
    _Form("triangle", "What is the area of the right triangle?", "{0} * {1} / 2", lambda a, b: Fraction(a * b, 2)),
    _Form(
        "triangle",
        "How long is the hypotenuse of the right triangle?",
        r"\sqrt{{{0}^2 + {1}^2}}",
        lambda a, b: _root(a * a + b * b),
    ),
    _Form("radius", "What is the area of the circle?", r"{0}^2 * \pi", lambda r: rf"{r * r}\pi"),
    _Form("radius", "What is the circumference of the circle?", r"2 * {0} * \pi", lambda r: rf"{2 * r}\pi"),
    _Form(
        "diameter",
        "What is the area of the circle?",
        r"({0} / 2)^2 * \pi",
        lambda d: rf"{_latex(Fraction(d * d, 4))}\pi",
    ),
    _Form("diameter", "What is the circumference of the circle?", r"{0} * \pi", lambda d: rf"{d}\pi"),
)
_COUNTING: Final = (
    _Form(
        "two kinds",
        "Each {0} costs {1} and each {2} costs {3}. What do all {0}s and {2}s cost together?",
        "{0} * {1} + {2} * {3}",
        lambda n, p, m, q: n * p + m * q,
    ),
    _Form(
        "two kinds",
        "Each {0} weighs {1} and each {2} weighs {3}. How much more do all {0}s weigh than all {2}s?",
        "{0} * {1} - {2} * {3}",
        lambda n, p, m, q: n * p - m * q,
    ),
    _Form(
        "all",
        "Each {0} costs {1} and each other shape costs {3}. What does a shape cost on average?",
        "({0} * {1} + {2} * {3}) / ({0} + {2})",
        lambda n, p, m, q: Fraction(n * p + m * q, n + m),
    ),
)


def _chart(split: Split, rng: np.random.Generator) -> _Task:
    """The higher of two bars comes first in the question."""
    while True:
        form = _CHARTS[rng.integers(len(_CHARTS))]
        count = int(rng.integers(3, 5))
        colours = rng.permutation(list(COLOURS))[:count].tolist()
        values = rng.permutation(np.arange(1, HIGHEST + 1))[:count].tolist()
        bars: list[tuple[str, int]] = list(zip(colours, values, strict=True))
        pair = sorted((bars[i] for i in rng.permutation(count)[:2]), key=lambda bar: -bar[1])
        words, numbers = zip(*(pair if form.about == "two" else bars), strict=True)
        if falls_to_eval((form.text.format(*words), sorted(bars))) == (split == "eval"):
            return _Task(_draw_chart(bars, rng), form, words, numbers)


def _geometry(split: Split, rng: np.random.Generator) -> _Task:
    while True:
        form = _GEOMETRY[rng.integers(len(_GEOMETRY))]
        if form.about in ("radius", "diameter"):
            numbers = [int(rng.integers(3, 61))]
        else:
            shorter = int(rng.integers(2, 21))
            numbers = [shorter, int(rng.integers(shorter, 3 * shorter + 1))]
        if falls_to_eval((form.about, form.text, numbers)) == (split == "eval"):
            draw = _draw_circle if len(numbers) == 1 else _draw_sides
            return _Task(draw(form.about, numbers, rng), form, (), numbers)


def _counting(split: Split, rng: np.random.Generator) -> _Task:
    """The heavier of two kinds comes first in the question."""
    form = _COUNTING[rng.integers(len(_COUNTING))]
    scene, _ = sample_scene(split, int(rng.integers(2**62)), _COUNTS)
    counts = Counter(shape.kind for shape in scene.shapes)
    first = scene.shapes[rng.integers(len(scene.shapes))].kind
    second = [kind for kind in SHAPES if kind != first][rng.integers(len(SHAPES) - 1)]
    others = counts[second] if form.about == "two kinds" else len(scene.shapes) - counts[first]
    prices = rng.permutation(np.arange(2, 10))[:2].tolist()
    groups = [(first, counts[first], prices[0]), (second, others, prices[1])]
    if form.about == "two kinds":
        groups.sort(key=lambda group: -group[1] * group[2])
    (kind, n, price), (other_kind, m, other_price) = groups
    return _Task(scene.image, form, (kind, price, other_kind, other_price), (n, price, m, other_price))


_SUBJECTS: Final[dict[str, Callable[[Split, np.random.Generator], _Task]]] = {
    "charts": _chart,
    "geometry": _geometry,
    "counting": _counting,
}


def _canvas(rng: np.random.Generator) -> tuple[PILImage.Image, ImageDraw.ImageDraw]:
    picture = PILImage.new("RGB", (WIDTH, HEIGHT), sample_background(rng))
    return picture, ImageDraw.Draw(picture)


def _draw_chart(bars: Sequence[tuple[str, int]], rng: np.random.Generator) -> Image:
    """Bars with their values above them, or with a scale beside them."""
    picture, draw = _canvas(rng)
    labelled = bool(rng.integers(2))
    left = 6 if labelled else 22
    if not labelled:
        _draw_scale(draw, left)
    step = (WIDTH - left - 4) // len(bars)
    for i, (colour, value) in enumerate(bars):
        x, top = left + step * i + step // 2, _FLOOR - UNIT * value
        draw.rectangle((x - step // 3, top, x + step // 3, _FLOOR - 1), fill=sample_tint(colour, rng))
        if labelled:
            _write(draw, x, top - 8, value)
    draw.line((left, _FLOOR, WIDTH - 4, _FLOOR), fill=_GREY)
    return np.asarray(picture)


def _draw_scale(draw: ImageDraw.ImageDraw, left: int) -> None:
    for value in range(0, HIGHEST + 1, 2):
        y = _FLOOR - UNIT * value
        draw.line((left, y, WIDTH - 4, y), fill=_PALE)
        _write(draw, left - 11, y, value, _SMALL_FONT)


def _draw_sides(figure: str, sides: Sequence[int], rng: np.random.Generator) -> Image:
    """A rectangle or a right triangle to scale, with its sides or legs labelled, either of them level."""
    picture, draw = _canvas(rng)
    level, upright = rng.permutation(sides).tolist()
    scale = min(72 / level, 56 / upright)
    width, height = round(level * scale), round(upright * scale)
    x, y = int(rng.integers(26, WIDTH - 25 - width)), int(rng.integers(6, HEIGHT - 21 - height))
    # The upright side is labelled where the right angle is, at the left or at the right.
    near, far, outwards = (x, x + width, -1) if rng.integers(2) else (x + width, x, 1)
    points = [(near, y), (near, y + height), (far, y + height)]
    fill, outline = _tints(rng)
    draw.polygon(points if figure == "triangle" else [*points, (far, y)], fill=fill, outline=outline, width=2)
    _write(draw, near + 14 * outwards, y + height // 2, upright)
    _write(draw, x + width // 2, y + height + 11, level)
    return np.asarray(picture)


def _draw_circle(line: str, lengths: Sequence[int], rng: np.random.Generator) -> Image:
    """A circle with a labelled radius or diameter."""
    picture, draw = _canvas(rng)
    radius = int(rng.integers(28, 41))
    x, y = int(rng.integers(radius + 5, WIDTH - radius - 5)), int(rng.integers(radius + 5, HEIGHT - radius - 5))
    fill, outline = _tints(rng)
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill, outline=outline, width=2)
    start = x - radius if line == "diameter" else x
    draw.line((start, y, x + radius, y), fill=_GREY)
    draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=_GREY)
    _write(draw, (start + x + radius) // 2, y - 9, lengths[0])
    return np.asarray(picture)


def _write(
    draw: ImageDraw.ImageDraw, x: int, y: int, number: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont = _FONT
) -> None:
    """Writes a number around a point, beginning at a whole pixel, where it is crispest."""
    left, top, right, bottom = font.getbbox(str(number))
    draw.text((x - (left + right) // 2, y - (top + bottom) // 2), str(number), fill=_INK, font=font)


def _tints(rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A light tint for the inside of a figure, and one of the same colour for its outline."""
    outline = sample_tint(list(COLOURS)[rng.integers(len(COLOURS))], rng)
    return tuple(255 - (255 - value) // 4 for value in outline), outline
