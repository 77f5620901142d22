from __future__ import annotations

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from vlmenv.core.coordinates import Box, CoordinateSpace, iou, is_box

edges = st.floats(-1000, 1000, allow_nan=False).map(lambda value: round(value, 3))


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    x1, y1 = draw(edges), draw(edges)
    return x1, y1, x1 + draw(st.floats(0.01, 500)), y1 + draw(st.floats(0.01, 500))


@given(boxes(), boxes())
def test_iou_equals_shapely(a: Box, b: Box) -> None:
    first, second = shapely.box(*a), shapely.box(*b)
    expected = first.intersection(second).area / first.union(second).area
    assert iou(a, b) == pytest.approx(expected, abs=1e-7)


def test_iou_equals_pycocotools() -> None:
    rng = np.random.default_rng(0)
    corners, sides = rng.uniform(0, 100, (200, 2)), rng.uniform(1, 60, (200, 2))
    xywh = np.concatenate([corners, sides], axis=1)
    expected = coco_mask.iou(xywh, xywh, [False] * 200)
    ours = [[iou(_xyxy(a), _xyxy(b)) for b in xywh] for a in xywh]
    np.testing.assert_allclose(ours, expected, atol=1e-9)


def _xyxy(box: np.ndarray) -> Box:
    x, y, w, h = box.tolist()
    return x, y, x + w, y + h


def test_a_box_of_one_pixel_overlaps_itself_wholly() -> None:
    assert iou((5, 5, 6, 6), (5, 5, 6, 6)) == 1.0
    assert iou((5, 5, 5.25, 90), (5, 5, 5.25, 90)) == 1.0


@given(boxes(), boxes(), st.integers(1, 4000), st.integers(1, 4000))
def test_iou_is_the_same_in_every_coordinate_space(a: Box, b: Box, width: int, height: int) -> None:
    space = CoordinateSpace.NORM1000
    scaled = iou(space.from_pixels(a, width, height), space.from_pixels(b, width, height))
    assert scaled == pytest.approx(iou(a, b), abs=1e-9)


@given(boxes(), st.integers(1, 4000), st.integers(1, 4000), st.sampled_from(CoordinateSpace))
def test_pixels_survive_a_round_trip(box: Box, width: int, height: int, space: CoordinateSpace) -> None:
    assert space.to_pixels(space.from_pixels(box, width, height), width, height) == pytest.approx(box, abs=1e-6)


def test_norm1000_counts_thousandths_of_each_axis() -> None:
    assert CoordinateSpace.NORM1000.from_pixels((32, 24, 320, 480), 640, 480) == (50, 50, 500, 1000)


@pytest.mark.parametrize(
    "values",
    [
        (1, 2, 3),
        (1, 2, 3, 4, 5),
        (3, 2, 1, 4),
        (1, 4, 3, 2),
        (1, 2, 1, 4),
        (0, 0, float("nan"), 1),
        (0, 0, float("inf"), 1),
        (0, 0, 1e308, 1e308),
    ],
)
def test_what_is_no_box(values: tuple[float, ...]) -> None:
    assert not is_box(values)
