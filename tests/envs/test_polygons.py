from __future__ import annotations

import json
import math

import pytest
from growth import growth
from hypothesis import given
from hypothesis import strategies as st

from vlmenv.core.coordinates import iou
from vlmenv.core.formats import AnswerFormat
from vlmenv.envs.rewards.polygons import parse_polygon, polygon_iou, polygon_iou_reward

SQUARE = ((0.0, 0.0), (10.0, 0.0), (10.0, 10.0), (0.0, 10.0))


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (SQUARE, 1),
        (SQUARE[::-1], 1),
        (((0, 0), (10, 0), (0, 10)), 0.5),
        (((10, 0), (20, 0), (20, 10), (10, 10)), 0),
        (((5, 0), (15, 0), (15, 10), (5, 10)), 1 / 3),
        (((0, 0), (10, 10), (10, 0), (0, 10)), 0.5),  # crosses itself: two triangles
        (tuple((5 + 5 * math.cos(a / 50 * math.pi), 5 + 5 * math.sin(a / 50 * math.pi)) for a in range(100)), 0.785),
    ],
)
def test_overlap_by_hand(other: tuple[tuple[float, float], ...], expected: float) -> None:
    assert polygon_iou(SQUARE, other) == pytest.approx(expected, abs=1e-3)
    assert polygon_iou(other, SQUARE) == pytest.approx(expected, abs=1e-3)


EDGES = st.tuples(*[st.integers(0, 30)] * 4).filter(lambda e: e[0] < e[2] and e[1] < e[3])


@given(EDGES, EDGES)
def test_boxes_overlap_as_boxes_do(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> None:
    corners = [[(x1, y1), (x2, y1), (x2, y2), (x1, y2)] for x1, y1, x2, y2 in (a, b)]
    assert polygon_iou(*corners) == pytest.approx(iou(a, b), abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "content",
    [
        "",
        "None",
        "[]",
        "[[0, 0], [1, 1]]",
        "[[0, 0], [1, 1], [2, 2]]",
        "[[0, 0], [1, 1], [1, 0, 3]]",
        '[[0, 0], [1, "1"], [1, 0]]',
        "[[0, 0], [1, NaN], [1, 0]]",
        "[[0, 0], [1, 1e308], [1, 0]]",
        "[[0, 0], [1, true], [1, 0]]",
        "[[0, 0], [1, " + "9" * 400 + "], [1, 0]]",
        "[[0, 0], [10, 10], [10, 0], [0, 10]]",
        "[" * 10_000,
        "[" * 10_000_000,
        json.dumps([[i, i * i] for i in range(501)]),
        '{"a": 1}',
    ],
)
def test_what_is_no_outline_scores_nothing(content: str) -> None:
    def score(size: int) -> float:
        return polygon_iou_reward(f"<think></think><answer>{content[:size]}</answer>", SQUARE)

    assert score(len(content)) == 0
    assert growth(score, len(content) // 8) < 24


def test_an_outline_is_read_in_either_format() -> None:
    written = "```json\n[[0, 0], [10, 0], [10.0, 10], [0, 10], [0, 0]]\n```"
    assert parse_polygon(written) == SQUARE
    for answer_format in AnswerFormat:
        assert polygon_iou_reward(answer_format.write(written), SQUARE, answer_format) == 1


@given(st.text())
def test_no_text_raises(text: str) -> None:
    polygon_iou_reward(f"<think></think><answer>{text}</answer>", SQUARE)


def test_a_tangle_of_500_corners_is_refused_in_time() -> None:
    """The crossings of such an outline would take seconds to find, with the square of its corners."""
    tangle = [[i * 7919 % 1000, i * 104729 % 1000] for i in range(500)]

    def score(corners: int) -> float:
        return polygon_iou_reward(AnswerFormat.TAGS.write(json.dumps(tangle[:corners])), SQUARE)

    assert score(500) == 0
    assert growth(score, 60) < 24
