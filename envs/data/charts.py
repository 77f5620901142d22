"""Built-in charts: bars, lines and pies of random values, with questions of exact truth.

The training and the evaluation stream are endless and disjoint, by a hash of values and question.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw

from vlmenv.core.answers import Answer
from vlmenv.core.spaces import Image
from vlmenv.envs.data.scenes import COLOURS, Drawn, falls_to_eval, sample_background, sample_tint
from vlmenv.envs.data.source import Sample
from vlmenv.envs.data.transcripts import font_of

WIDTH: Final = 256
HEIGHT: Final = 176
"""Size of charts in pixels."""
NAMES: Final = (
    *("Apples", "Bread", "Coffee", "Dates", "Eggs", "Fish"),
    *("Grapes", "Honey", "Juice", "Kale", "Milk", "Rice"),
)
"""Names of columns."""
HIGHEST: Final = 100
"""Upper end of the axis."""

_LEFT, _TOP, _RIGHT, _BOTTOM = 32, 12, WIDTH - 8, HEIGHT - 24
"""Edges of the axes in pixels."""
_INK, _GREY = (20, 20, 20), (205, 205, 205)


class Chart(NamedTuple):
    """What a chart shows."""

    kind: str
    """`bar`, `line` or `pie`"""
    names: tuple[str, ...]
    """of the columns: things, or years of a line"""
    values: tuple[int, ...]
    """percent of a pie, which sum to 100"""
    labelled: bool
    """whether the values are written; they always are in a pie"""


class ChartQuestions(Drawn):
    """Charts of a stream, each with one question; endless."""

    stream = 8

    def get(self, index: int) -> Sample:
        rng = self.rng(index)
        kind = list(_DRAW)[rng.integers(len(_DRAW))]
        while True:
            chart = _sample_chart(kind, rng)
            text, answer, working = _ASK[rng.integers(len(_ASK))](chart, rng)
            if falls_to_eval((chart, text)) == (self.split == "eval"):
                break
        picture = PILImage.new("RGB", (WIDTH, HEIGHT), sample_background(rng))
        _DRAW[kind](ImageDraw.Draw(picture), chart, rng)
        image: Image = np.asarray(picture)
        return Sample(f"chart-{self.split}-{index}", (image,), text, answer, f"It is {working}.", kind)


def _sample_chart(kind: str, rng: np.random.Generator) -> Chart:
    """Three to six different values, of a pie at most five."""
    count = int(rng.integers(3, 6 if kind == "pie" else 7))
    if kind == "line":
        first = int(rng.integers(1990, 2020))
        names = tuple(str(first + i) for i in range(count))
    else:
        names = tuple(NAMES[i] for i in sorted(rng.permutation(len(NAMES))[:count].tolist()))
    while True:
        values = rng.integers(5, 96, size=count)
        if kind == "pie":  # shares of the whole
            values = np.diff([0, *sorted(rng.permutation(np.arange(1, 20))[: count - 1].tolist()), 20]) * 5
        if len({*values.tolist()}) == count:
            return Chart(kind, names, tuple(values.tolist()), kind == "pie" or bool(rng.random() < 0.5))


_Asked = tuple[str, Answer, str]
"""A question, its answer, and how it is found."""


def _ask_value(chart: Chart, rng: np.random.Generator) -> _Asked:
    i = int(rng.integers(len(chart.names)))
    return f"What is the value of {chart.names[i]}?", _number(chart.values[i]), str(chart.values[i])


def _ask_extreme(chart: Chart, rng: np.random.Generator) -> _Asked:
    word, choose = (("highest", max), ("lowest", min))[rng.integers(2)]
    value = choose(chart.values)
    name = chart.names[chart.values.index(value)]
    return f"Which has the {word} value?", Answer(name, "exact"), f"{name} with {value}"


def _ask_sum(chart: Chart, rng: np.random.Generator) -> _Asked:
    (a, b), (one, other) = _two(chart, rng)
    return f"What is the sum of {one} and {other}?", _number(a + b), f"{a} + {b} = {a + b}"


def _ask_difference(chart: Chart, rng: np.random.Generator) -> _Asked:
    (a, b), names = _two(chart, rng)
    high, low = names if a > b else names[::-1]
    told = f"{max(a, b)} - {min(a, b)} = {abs(a - b)}"
    return f"By how much is {high} above {low}?", _number(abs(a - b)), told


def _ask_comparison(chart: Chart, rng: np.random.Generator) -> _Asked:
    (a, b), (one, other) = _two(chart, rng)
    said = f"{a} against {b}"
    return f"Is the value of {one} above that of {other}?", Answer("yes" if a > b else "no", "yes_no"), said


def _ask_number(chart: Chart, rng: np.random.Generator) -> _Asked:
    """How many are above a value that none is within 3 of."""
    free = [one for one in range(10, 91, 10) if all(abs(one - value) > 3 for value in chart.values)]
    least = free[rng.integers(len(free))] if free else 0
    above = [str(value) for value in chart.values if value > least]
    return f"How many values are above {least}?", _number(len(above)), f"{len(above)}: {', '.join(above) or 'none'}"


_ASK: Final[tuple[Callable[[Chart, np.random.Generator], _Asked], ...]] = (
    *(_ask_value, _ask_extreme, _ask_sum),
    *(_ask_difference, _ask_comparison, _ask_number),
)


def _two(chart: Chart, rng: np.random.Generator) -> tuple[tuple[int, int], tuple[str, str]]:
    """The values and the names of two columns."""
    i, j = rng.permutation(len(chart.names))[:2].tolist()
    return (chart.values[i], chart.values[j]), (chart.names[i], chart.names[j])


def _number(value: int) -> Answer:
    return Answer(str(value), "numeric")


def height_of(value: float) -> float:
    """The row of pixels at which the axis has a value."""
    return _BOTTOM - value * (_BOTTOM - _TOP) / HIGHEST


def _draw_axes(draw: ImageDraw.ImageDraw, chart: Chart) -> list[float]:
    """Draws the axis with its lines and the names below; the middles of the columns."""
    font = font_of("DejaVuSans", 10)
    for tick in range(0, HIGHEST + 1, 20):
        draw.line((_LEFT, height_of(tick), _RIGHT, height_of(tick)), fill=_GREY if tick else _INK)
        draw.text((_LEFT - 4, height_of(tick)), str(tick), fill=_INK, font=font, anchor="rm")
    step = (_RIGHT - _LEFT) / len(chart.names)
    middles = [_LEFT + step * (i + 0.5) for i in range(len(chart.names))]
    for middle, name in zip(middles, chart.names, strict=True):
        draw.text((middle, _BOTTOM + 5), name, fill=_INK, font=font_of("DejaVuSans", 9), anchor="mt")
    return middles


def _label(draw: ImageDraw.ImageDraw, chart: Chart, middles: list[float]) -> None:
    for middle, value in zip(middles, chart.values, strict=True) if chart.labelled else ():
        draw.text((middle, height_of(value) - 3), str(value), fill=_INK, font=font_of("DejaVuSans", 10), anchor="mb")


def _draw_bars(draw: ImageDraw.ImageDraw, chart: Chart, rng: np.random.Generator) -> None:
    middles, tint = _draw_axes(draw, chart), _tints(1, rng)[0]
    half = 0.3 * (_RIGHT - _LEFT) / len(middles)
    for middle, value in zip(middles, chart.values, strict=True):
        draw.rectangle((middle - half, height_of(value), middle + half, _BOTTOM), fill=tint)
    _label(draw, chart, middles)


def _draw_line(draw: ImageDraw.ImageDraw, chart: Chart, rng: np.random.Generator) -> None:
    middles, tint = _draw_axes(draw, chart), _tints(1, rng)[0]
    points = [(middle, height_of(value)) for middle, value in zip(middles, chart.values, strict=True)]
    draw.line(points, fill=tint, width=2)
    for x, y in points:
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=tint)
    _label(draw, chart, middles)


def _draw_pie(draw: ImageDraw.ImageDraw, chart: Chart, rng: np.random.Generator) -> None:
    """Sectors from the top on, with a list of names, colours and shares beside."""
    tints, start, side = _tints(len(chart.names), rng), -90.0, HEIGHT - 24
    for number, (name, value, tint) in enumerate(zip(chart.names, chart.values, tints, strict=True)):
        draw.pieslice((12, 12, 12 + side, 12 + side), start, start + 3.6 * value, fill=tint, outline=_INK)
        start += 3.6 * value
        y = 24 + 22 * number
        draw.rectangle((side + 24, y - 5, side + 34, y + 5), fill=tint, outline=_INK)
        draw.text((side + 38, y), f"{name} {value}", fill=_INK, font=font_of("DejaVuSans", 9), anchor="lm")


def _tints(count: int, rng: np.random.Generator) -> list[tuple[int, ...]]:
    names = list(COLOURS)
    return [sample_tint(names[i], rng) for i in rng.permutation(len(names))[:count].tolist()]


_DRAW: Final[dict[str, Callable[[ImageDraw.ImageDraw, Chart, np.random.Generator], None]]] = {
    "bar": _draw_bars,
    "line": _draw_line,
    "pie": _draw_pie,
}
