from __future__ import annotations

import numpy as np
import pytest
import shapely
from hypothesis import assume, given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from vlmenv.core.coordinates import Box, Coordinates, CoordinateSpace, ResizeRule, iou, is_box
from vlmenv.core.errors import ConfigError

CONVENTIONS = [
    Coordinates(),
    Coordinates(CoordinateSpace.NORM1000),
    Coordinates(CoordinateSpace.RESIZED, ResizeRule()),
]

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


@given(boxes(), boxes(), st.integers(1, 4000), st.integers(1, 4000), st.sampled_from(CONVENTIONS))
def test_iou_is_the_same_in_every_convention(a: Box, b: Box, width: int, height: int, space: Coordinates) -> None:
    scaled = iou(space.from_pixels(a, width, height), space.from_pixels(b, width, height))
    assert scaled == pytest.approx(iou(a, b), abs=1e-9)


@given(boxes(), st.integers(1, 4000), st.integers(1, 4000), st.sampled_from(CONVENTIONS))
def test_pixels_survive_a_round_trip(box: Box, width: int, height: int, space: Coordinates) -> None:
    assert space.to_pixels(space.from_pixels(box, width, height), width, height) == pytest.approx(box, abs=1e-6)


def test_norm1000_counts_thousandths_of_each_axis() -> None:
    assert Coordinates(CoordinateSpace.NORM1000).from_pixels((32, 24, 320, 480), 640, 480) == (50, 50, 500, 1000)


def test_resized_counts_pixels_of_what_the_model_sees() -> None:
    """Qwen2.5-VL sees 640 x 480 as 644 x 476, and 96 x 96 as 84 x 84."""
    resized = Coordinates(CoordinateSpace.RESIZED, ResizeRule())
    assert resized.shown_size(640, 480) == (644, 476)
    assert resized.from_pixels((40, 48, 80, 96), 96, 96) == (35, 42, 70, 84)


@given(
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.sampled_from([28, 32]),
    st.sampled_from([(3136, 12845056), (65536, 1 << 24), (1024, 36864)]),
)
def test_sizes_equal_the_published_processors(width: int, height: int, factor: int, bounds: tuple[int, int]) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    assume(max(width, height) <= 200 * min(width, height))
    theirs = smart_resize(height, width, factor, *bounds)
    assert ResizeRule(factor, *bounds).size(width, height) == theirs[::-1]


def test_resized_and_its_rule_go_together() -> None:
    for arguments in ((CoordinateSpace.RESIZED, None), (CoordinateSpace.ORIGINAL, ResizeRule())):
        with pytest.raises(ConfigError, match="go together"):
            Coordinates(*arguments)


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
