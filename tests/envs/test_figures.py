from __future__ import annotations

import functools
import math
import re
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from vlmenv.envs.data import figures
from vlmenv.envs.data.figures import HEIGHT, HIGHEST, UNIT, WIDTH, MathFigures
from vlmenv.envs.data.scenes import COLOURS, Scene, falls_to_eval, sample_scene
from vlmenv.envs.data.source import Sample

Label = tuple[int, tuple[float, float]]
"""A number that is written in a figure, and the middle of it."""

NUMBERS = re.compile(r"\d+")


@functools.cache
def samples(split: Any) -> tuple[Sample, ...]:
    source = MathFigures(split)
    return tuple(source.get(index) for index in range(900))


def asked(subject: str, split: Any = "train") -> list[Sample]:
    return [sample for sample in samples(split) if sample.subject == subject]


def evaluate(latex: str) -> float:
    """The value of an answer or a computation, read without the code that wrote it."""
    text = re.sub(r"\\frac\{(\d+)\}\{(\d+)\}", r"(\1/\2)", latex).replace("^", "**")
    text = re.sub(r"\\sqrt\{([^}]+)\}", r"sqrt(\1)", text)
    text = re.sub(r"(?<=[\d)])\\pi", r"*pi", text).replace(r"\pi", "pi")
    assert re.fullmatch(r"(?:[\d\s+*/(),-]|sqrt|max|pi)+", text), latex
    return float(eval(text, {"sqrt": math.sqrt, "max": max, "pi": math.pi}))


def read_labels(image: np.ndarray) -> list[Label]:
    """Reads the dark numbers in a figure by comparing them with numbers drawn alone; fails where one is cut off."""
    ink = find_ink(image)
    labels = []
    left = {(int(y), int(x)) for y, x in np.argwhere(ink)}
    while left:
        region = [left.pop()]
        for y, x in region:
            close = [(y + dy, x + dx) for dy in range(-2, 3) for dx in range(-6, 7)]
            region += [pixel for pixel in close if pixel in left]
            left -= set(close)
        low, high = np.min(region, axis=0), np.max(region, axis=0) + 1
        assert (low > 0).all(), "clipped"
        assert (high < image.shape[:2]).all(), "clipped"
        y, x = (low + high) / 2
        labels.append((read_number(ink[low[0] : high[0], low[1] : high[1]]), (float(x), float(y))))
    return labels


def find_ink(image: np.ndarray) -> np.ndarray:
    """Where a picture is rather black than like its background."""
    return image.max(axis=2) < (20 + int(image[0, 0].max())) / 2


def read_number(ink: np.ndarray) -> int:
    """The number whose drawing is nearest, and near enough."""
    shifted = np.array([padded(ink, y, x) for y in (0, 1, 2) for x in (0, 1, 2)])
    numbers, drawn = drawn_numbers()
    wrong = (drawn[:, None] ^ shifted).sum(axis=(2, 3)).min(axis=1)
    assert wrong.min() < 0.2 * ink.sum(), "no number"
    return numbers[wrong.argmin()]


@functools.cache
def drawn_numbers() -> tuple[list[int], np.ndarray]:
    """Numbers, in both sizes of the font, and their ink [N, 16, 24]."""
    numbers, drawn = list(range(100)) * 2, []
    for place, number in enumerate(numbers):
        picture = Image.new("RGB", (30, 24), (240, 240, 240))
        font = ImageFont.load_default(size=10 if place < 100 else 12)
        ImageDraw.Draw(picture).text((5, 5), str(number), fill=(20, 20, 20), font=font)
        ink = find_ink(np.asarray(picture))
        ys, xs = np.nonzero(ink)
        drawn.append(padded(ink[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1], 1, 1))
    return numbers, np.array(drawn)


def padded(ink: np.ndarray, y: int, x: int) -> np.ndarray:
    return np.pad(ink, ((y, 16 - y - ink.shape[0]), (x, 24 - x - ink.shape[1])))


def measure_bars(image: np.ndarray) -> dict[str, tuple[int, float]]:
    """Each bar's height and the column of its middle, from left to right."""
    bars = {}
    for colour, mean in COLOURS.items():
        rows, columns = np.nonzero(np.abs(image.astype(int) - mean).max(axis=2) <= 12)
        if len(rows):
            height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
            assert len(rows) == height * width, "a bar is covered"
            assert height % UNIT == 0
            bars[colour] = (int(height) // UNIT, float(columns.mean()))
    return dict(sorted(bars.items(), key=lambda bar: bar[1][1]))


def test_the_same_index_gives_the_same_figure() -> None:
    for index in (0, 1, 2, 3, 4, 2**62 - 1):
        one, other = MathFigures("train").get(index), MathFigures("train").get(index)
        assert one.id == f"figure-train-{index}"
        assert (one.question, one.target, one.rationale) == (other.question, other.target, other.rationale)
        np.testing.assert_array_equal(one.images[0], other.images[0])
    assert MathFigures("train").size is None


@pytest.mark.slow
def test_every_subject_and_form_occurs() -> None:
    seen = samples("train")
    counted = Counter(sample.subject for sample in seen)
    assert set(counted) == {"charts", "geometry", "counting"}
    assert min(counted.values()) > 240
    nouns = re.compile(rf"\d+|\b(?:{'|'.join(COLOURS)}|circle|square|triangle|star)(?=s? (?:bar|costs|weigh|and|cost))")
    assert len({(sample.subject, nouns.sub("", sample.question)) for sample in seen}) >= 16
    for sample in seen:
        (image,) = sample.images
        assert image.dtype == np.uint8
        assert image.shape == ((96, 96, 3) if sample.subject == "counting" else (HEIGHT, WIDTH, 3))
        assert max(image.shape) <= 128
        assert sample.target.kind == "math"


def test_answers_are_plain_latex_and_follow_from_the_computation() -> None:
    written = set()
    for sample in samples("train"):
        working, answer = re.fullmatch(r"It is (.+) = (.+)\.", sample.rationale).groups()
        assert answer == sample.target.text
        assert evaluate(working) == pytest.approx(evaluate(answer))
        assert re.fullmatch(r"\d+|\\sqrt\{\d+\}|(?:\d+|\\frac\{\d+\}\{\d+\})(?:\\pi)?", answer)
        numbers = [int(number) for number in NUMBERS.findall(answer)]
        if "frac" in answer:
            assert math.gcd(*numbers) == 1 < numbers[1]
        if "sqrt" in answer:
            assert math.isqrt(numbers[0]) ** 2 != numbers[0]
        written.add(re.sub(r"\d+", "", answer))
    assert written == {"", r"\frac{}{}", r"\pi", r"\frac{}{}\pi", r"\sqrt{}"}


@pytest.mark.slow
def test_charts_are_right() -> None:
    """The values are measured in the picture, and asked of it by reading the question."""
    for sample in asked("charts")[:150]:
        heights = {colour: height for colour, (height, _) in measure_bars(sample.images[0]).items()}
        assert 3 <= len(heights) <= 4
        assert max(heights.values()) <= HIGHEST
        assert len(set(heights.values())) == len(heights)
        named = [heights[word] for word in re.findall(r"\w+", sample.question) if word in COLOURS]
        assert evaluate(sample.target.text) == pytest.approx(float(chart_answer(sample.question, named, heights)))


def chart_answer(question: str, named: list[int], heights: dict[str, int]) -> Fraction:
    values = list(heights.values())
    if "highest" in question:
        return Fraction(max(values))
    if "mean" in question:
        return Fraction(sum(values), len(values))
    if "sum" in question:
        return Fraction(sum(named or values))
    first, second = named
    if question.startswith("By how much"):
        return Fraction(first - second)
    assert re.fullmatch(r"How many times as high as the \w+ bar is the \w+ bar\?", question)
    return Fraction(second, first)


@pytest.mark.slow
def test_charts_show_their_values() -> None:
    """As a legible number above each bar, or on a scale that the bars keep to."""
    scales = 0
    for sample in asked("charts")[:80]:
        bars = measure_bars(sample.images[0])
        labels = sorted(read_labels(sample.images[0]), key=lambda label: label[1][0])
        if len(labels) == len(bars):
            assert [number for number, _ in labels] == [height for height, _ in bars.values()]
            for (number, (x, y)), (_, middle) in zip(labels, bars.values(), strict=True):
                assert abs(x - middle) <= 2
                assert 0 < (89 - UNIT * number) - y < 12
        else:
            scales += 1
            assert sorted(number for number, _ in labels) == list(range(0, HIGHEST + 1, 2))
            assert all(abs(89 - UNIT * number - y) <= 1 for number, (_, y) in labels)
    assert 20 < scales < 60


@pytest.mark.slow
def test_figures_are_labelled_drawn_to_scale_and_answered_rightly() -> None:
    for sample in asked("geometry")[:150]:
        image = sample.images[0]
        labels = read_labels(image)
        figure = (image != image[0, 0]).any(axis=2)
        numbers = sorted(number for number, _ in labels)
        if "circle" in sample.question:
            shown = circle_radius(image, figure, numbers)
            expected = math.pi * (shown**2 if "area" in sample.question else 2 * shown)
        else:
            filled = sides_to_scale(figure, labels)
            assert ("triangle" in sample.question) == (filled < 0.65)
            expected = SIDED[sample.question](*numbers)
        assert evaluate(sample.target.text) == pytest.approx(expected), sample.question


SIDED = {
    "What is the area of the rectangle?": lambda a, b: a * b,
    "What is the perimeter of the rectangle?": lambda a, b: a + b + a + b,
    "What is the square of the rectangle's diagonal?": lambda a, b: math.hypot(a, b) ** 2,
    "What is the area of the right triangle?": lambda a, b: a * b / 2,
    "How long is the hypotenuse of the right triangle?": math.hypot,
}


def circle_radius(image: np.ndarray, figure: np.ndarray, numbers: list[int]) -> float:
    """What the label says of the radius: it is that of the line, which is a radius or a diameter."""
    (number,) = numbers
    across = np.ptp(np.nonzero(figure)[1])
    line = np.ptp(np.nonzero((image == 150).all(axis=2))[1])
    assert min(abs(line / across - share) for share in (0.5, 1)) < 0.08
    return number / 2 if line / across > 0.75 else number


def sides_to_scale(figure: np.ndarray, labels: list[Label]) -> float:
    """Checks the label under and the one beside a figure against its sides; gives the share of its box it fills."""
    figure = figure.copy()
    for _, (x, y) in labels:
        figure[int(y) - 7 : int(y) + 8, int(x) - 10 : int(x) + 11] = False
    rows, columns = np.nonzero(figure)
    (level, (x, y)), (upright, _) = sorted(labels, key=lambda label: -label[1][1])
    assert y > rows.max()
    assert columns.min() < x < columns.max()
    height, width = np.ptp(rows), np.ptp(columns)
    assert width / height == pytest.approx(level / upright, rel=0.1)
    return len(rows) / ((height + 1) * (width + 1))


def test_sums_over_counted_shapes_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Scene] = []

    def sample(*args: Any) -> Any:
        drawn.append(sample_scene(*args)[0])
        return drawn[-1], None

    monkeypatch.setattr(figures, "sample_scene", sample)
    source = MathFigures("eval")
    for index in range(250):
        figure = source.get(index)
        if figure.subject == "counting":
            np.testing.assert_array_equal(figure.images[0], drawn[-1].image)
            kinds = Counter(shape.kind for shape in drawn[-1].shapes)
            assert evaluate(figure.target.text) == pytest.approx(priced(figure.question, kinds))
    assert len(drawn) > 60


def priced(question: str, kinds: Counter[str]) -> float:
    """The answer to a question about prices or weights, by adding up shape for shape."""
    prices = {
        name: int(price) for name, price in re.findall(r"each (\w+)(?: shape)? (?:costs|weighs) (\d+)", question, re.I)
    }
    assert len(prices) == 2
    cost = {kind: number * prices.get(kind, prices.get("other", 0)) for kind, number in kinds.items()}
    if "on average" in question:
        return sum(cost.values()) / sum(kinds.values())
    first, second = (cost.get(kind, 0) for kind in prices)
    if "together" in question:
        return first + second
    assert "How much more do all" in question
    return first - second


@pytest.mark.slow
def test_training_and_evaluation_figures_never_coincide() -> None:
    """There are so few geometric questions that some coincide within a stream."""
    train, held_out = ([(s.question, s.rationale) for s in asked("geometry", split)] for split in ("train", "eval"))
    assert len(set(train)) < len(train)
    assert not set(train) & set(held_out)
    assert len(set(train)) > 200
    assert len(set(held_out)) > 120


@pytest.mark.parametrize("split", ["train", "eval"])
def test_what_a_chart_shows_and_asks_decides_its_stream(split: Any) -> None:
    """Not its tints, nor the order of its bars."""
    for sample in asked("charts", split)[:100]:
        bars = sorted((colour, height) for colour, (height, _) in measure_bars(sample.images[0]).items())
        assert falls_to_eval((sample.question, bars)) == (split == "eval")


@pytest.mark.parametrize("split", ["train", "eval"])
def test_counted_scenes_are_of_the_stream(split: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_of = set()

    def sample(of: Any, *args: Any) -> Any:
        asked_of.add(of)
        return sample_scene(of, *args)

    monkeypatch.setattr(figures, "sample_scene", sample)
    for index in range(20):
        MathFigures(split).get(index)
    assert asked_of == {split}


def test_figures_are_many() -> None:
    contents = {(s.question, s.images[0].tobytes()) for s in samples("train")}
    assert len(contents) == len(samples("train"))
