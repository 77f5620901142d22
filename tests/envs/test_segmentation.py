"""`VLM-Seg-v0`: outlines, boxes and points as answers, mask IoU, VisionReasoner's accuracy, and layouts of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco

from vlmenv.core.errors import DataError
from vlmenv.core.formats import AnswerFormat
from vlmenv.envs.regions import outlines_of_mask, shape_of, simple_outlines
from vlmenv.envs.rewards.segments import Objects, Segment, mask_iou_reward, non_repeat_reward, parse_segments
from vlmenv.envs.segmentation import SegmentEnv

PICTURE = Image.new("RGB", (420, 840))
SQUARE = (10, 10, 30, 10, 30, 30, 10, 30)


@pytest.mark.parametrize(
    ("content", "segments"),
    [
        ('[{"polygon": [[10,10],[30,10],[30,30],[10,30]]}]', (Segment(SQUARE),)),
        ("[[10,10],[30,10],[30,30],[10,30]]", (Segment(SQUARE),)),
        ("```json\n[[[10,10],[30,10],[30,30],[10,30]]]\n```", (Segment(SQUARE),)),
        ('[{"bbox_2d": [1,2,3,4], "point_2d": [2,3]}]', (Segment((1, 2, 3, 4), (2, 3)),)),
        ('{"bbox_2d": [1,2,3,4]}', (Segment((1, 2, 3, 4)),)),
        ('{"bbox": [1,2,3,4], "point": [2,3]}', (Segment((1, 2, 3, 4), (2, 3)),)),
        ("[1, 2, 3, 4]", (Segment((1, 2, 3, 4)),)),
        ('[{"polygon": [10,10,30,10,30,30,10,30]}]', (Segment(SQUARE),)),
        ('[{"polygon": [[[10,10],[30,10],[30,30],[10,30]]]}]', (Segment(SQUARE),)),
        ('{"polygons": [[10,10],[30,10],[30,30],[10,30]]}', (Segment(SQUARE),)),
        ('[{"segmentation": [[10,10,30,10,30,30,10,30]]}]', (Segment(SQUARE),)),
        ("[[10,10,30,10,30,30,10,30]]", (Segment(SQUARE),)),
        ('{"polygon": [{"x":10,"y":10},{"x":30,"y":10},{"x":30,"y":30},{"x":10,"y":30}]}', (Segment(SQUARE),)),
        ("(10,10), (30,10), (30,30), (10,30)", (Segment(SQUARE),)),
        ("[[10,10],[10,10],[30,10],[30,30],[10,30],[10,10]]", (Segment((10, 10, *SQUARE)),)),
        (
            '{"objects": [{"bbox_2d": [1,2,3,4]}, {"bbox_2d": [5,6,7,8]}]}',
            (Segment((1, 2, 3, 4)), Segment((5, 6, 7, 8))),
        ),
        ('{"bbox_2d": [1,2,3,4]}\n{"bbox_2d": [5,6,7,8]}', (Segment((1, 2, 3, 4)), Segment((5, 6, 7, 8)))),
        ("None", ()),
        ("[]", ()),
        ('{"objects": []}', ()),
        ('[{"bbox_2d": null}]', ()),
        ('{"polygon": []}', ()),
        ('{"bbox_2d": [1,2,3,4]} {"bbox_2d": null}', None),
        ('{"bbox_2d": [1,2,3,4], "polygon": []}', (Segment((1, 2, 3, 4)),)),
        ("Of [1, 2] I see (something)", None),
        ("[1, 2, 3, 4, 5]", None),
        ("[10,10,30,10,10,30,30,30]", None),  # crosses itself
        ('[{"polygon": [[10,10],[30,10]]}]', None),
        ('[{"polygon": [[0,0],[10,10],[10,0],[0,10]]}]', None),  # crosses itself
        ('[{"bbox_2d": [3,2,1,4]}]', None),
        ('[{"bbox_2d": [1,2,3,4]}, {"label": "cat"}]', None),
        ('[{"polygon": [[10,10],[30,10],[30,', None),
        ("cat", None),
        (json.dumps([{"polygon": [[i, i * i] for i in range(400)]}] * 2), None),  # more than 500 corners in all
    ],
)
def test_objects_that_are_read(content: str, segments: Any) -> None:
    assert parse_segments(content) == segments


TWO = [{"bbox_2d": [0, 0, 100, 100], "point_2d": [50, 50]}, {"bbox_2d": [200, 0, 300, 100], "point_2d": [250, 50]}]


@pytest.mark.parametrize(
    ("answer", "true", "iou", "matched", "accuracy"),
    [
        (TWO, TWO, 1, 1, 1),
        (TWO[::-1], TWO, 1, 1, 1),
        (TWO[:1], TWO, 1 / 2, 1 / 2, 1 / 2),
        ([*TWO, {"bbox_2d": [0, 0, 100, 100], "point_2d": [50, 50]}], TWO, 1, 2 / 3, 2 / 3),
        ([{"polygon": [[0, 0], [100, 0], [100, 100], [0, 100]]}], TWO[:1], 1, 1, 2 / 3),  # no point
        # The picture is 420 wide: in 840 x 840 the edges are 0, 0, 36 and 0 apart, and the points 18.
        ([{"bbox_2d": [0, 0, 82, 100], "point_2d": [41, 50]}], TWO[:1], 0.82, 0.82, 1),
        ([{"bbox_2d": [0, 0, 60, 100], "point_2d": [30, 50]}], TWO[:1], 0.6, 0.6, 1 / 3),
        ([{"bbox_2d": [0, 0, 100, 100], "point_2d": [150, 50]}], TWO[:1], 1, 1, 2 / 3),
        ([{"bbox_2d": [200, 0, 300, 100], "point_2d": [250, 50]}], TWO[:1], 0, 0, 0),
        ("None", TWO, 0, 0, 0),
        ("hm", TWO, 0, 0, 0),
        ("None", "None", 1, 1, 1),
        (TWO, "None", 0, 0, 0),
        ("hm", "None", 0, 0, 0),
    ],
)
@pytest.mark.parametrize("coordinates", ["original", "norm1000"])
def test_rewards_by_hand(answer: Any, true: Any, iou: float, matched: float, accuracy: float, coordinates: str) -> None:
    rewards = {"iou": 1.0, "matched_iou": 1.0, "boxes_points": 1.0}
    rows = [{"image": PICTURE, "problem": "?", "solution": true if isinstance(true, str) else json.dumps(true)}]
    env = SegmentEnv(dataset=rows, rewards=rewards, coordinates=coordinates)
    if not isinstance(answer, str):
        across, down = (1000 / 420, 1000 / 840) if coordinates == "norm1000" else (1, 1)
        answer = json.dumps([{name: scaled(value, across, down) for name, value in row.items()} for row in answer])
    score = env.score(AnswerFormat.TAGS.write(answer), env.source.get(0))
    assert score.terms == pytest.approx({"iou": iou, "matched_iou": matched, "boxes_points": accuracy}, abs=1e-6)


def scaled(value: Any, across: float, down: float) -> Any:
    if isinstance(value[0], list):
        return [scaled(one, across, down) for one in value]
    return [number * (across, down)[i % 2] for i, number in enumerate(value)]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_mask_iou_is_that_of_pycocotools(seed: int) -> None:
    """Of an answer of boxes at whole pixels, and a mask of any form."""
    rng = np.random.default_rng(seed)
    pixels = rng.random((12, 10)) < 0.4
    pixels[0, 0] = True
    packed = coco.encode(np.asfortranarray(pixels.astype(np.uint8)))
    stored = {"size": packed["size"], "counts": packed["counts"].decode()}
    rows = [{"image": Image.new("RGB", (10, 12)), "question": "?", "answer": [{"segmentation": stored}]}]
    env = SegmentEnv(dataset=rows)
    edges = [(*sorted(rng.choice(11, 2, replace=False)), *sorted(rng.choice(13, 2, replace=False))) for _ in range(3)]
    boxes = [[int(x1), int(y1), int(x2), int(y2)] for x1, x2, y1, y2 in edges]
    covered = np.zeros((12, 10), dtype=np.uint8)
    for x1, y1, x2, y2 in boxes:
        covered[y1:y2, x1:x2] = 1
    expected = float(coco.iou([coco.encode(np.asfortranarray(covered))], [packed], [False])[0, 0])
    text = AnswerFormat.TAGS.write(json.dumps([{"bbox_2d": box} for box in boxes]))
    target = env.target(env.source.get(0))
    assert mask_iou_reward(text, target, env.parse(text)) == pytest.approx(expected, abs=1e-9)
    measured = env.measure(text, target, {})
    assert measured["area/intersection"] == pytest.approx((covered * pixels).sum())
    assert measured["area/union"] == pytest.approx(((covered + pixels) > 0).sum())


@pytest.mark.parametrize(
    ("answer", "objects"),
    [
        (TWO, (Segment((0, 0, 100, 100), (50, 50)), Segment((200, 0, 300, 100), (250, 50)))),  # VisionReasoner
        ([{"segmentation": [[10, 10, 30, 10, 30, 30, 10, 30]]}], (Segment(SQUARE),)),  # COCO
        ([{"polygon": [[10, 10], [30, 10], [30, 30], [10, 30]], "point_2d": [20, 20]}], (Segment(SQUARE, (20, 20)),)),
        ([10, 10, 30, 30], (Segment((10, 10, 30, 30)),)),
        ("None", ()),
    ],
)
@pytest.mark.parametrize("coordinates", ["original", "norm1000"])
def test_own_truths_score_1_in_each_layout(answer: Any, objects: Any, coordinates: str) -> None:
    env = SegmentEnv(dataset=[{"image": PICTURE, "question": "?", "answer": answer}], coordinates=coordinates)
    sample = env.source.get(0)
    assert sample.target == objects
    score = env.score(env.write_answer(sample), sample)
    assert score.terms == pytest.approx({"iou": 1, "format": 1}, abs=0.02)
    if coordinates == "original":
        assert score.terms["iou"] == 1


def test_masks_as_pycocotools_makes_them() -> None:
    pixels = np.zeros((PICTURE.height, PICTURE.width), np.uint8, order="F")
    pixels[5:9, 3:7] = 1
    for answer in (rle := coco.encode(pixels), [{"segmentation": rle}]):
        (segment,) = SegmentEnv(dataset=[{"image": PICTURE, "question": "?", "answer": answer}]).source.get(0).target
        assert shapely.equals(shape_of(segment.region), shapely.box(3, 5, 7, 9))


def test_masks_of_another_size_are_refused_and_turned_ones_are_turned(tmp_path: Path) -> None:
    mask = {"size": [4, 6], "counts": [0, 4, 20]}  # the left column of an image of 6 x 4
    row = {"question": "?", "answer": json.dumps([{"segmentation": mask}])}
    with pytest.raises(DataError, match="row 0: the data set says that the image has 6 x 4 pixels, but it has 5 x 5"):
        SegmentEnv(dataset=[{"image": Image.new("RGB", (5, 5)), **row}])
    stored = Image.new("RGB", (6, 4))
    stored.getexif()[0x0112] = 6  # shown with its left column on top
    stored.save(tmp_path / "a.jpg", exif=stored.getexif())
    source = SegmentEnv(dataset=[{"image": "a.jpg", **row}], image_root=tmp_path).source
    assert source.get(0).full_sizes == ((4, 6),)
    assert shapely.equals(shape_of(source.get(0).target[0].region), shapely.box(0, 0, 4, 1))


def test_truths_as_arrays() -> None:
    outline = np.array([[1, 1], [5, 1], [5, 5]])
    for answer in (np.array([[1.0, 1.0, 5.0, 1.0, 5.0, 5.0]]), np.array([outline.ravel(), None], object)[:1]):
        row = {"image": PICTURE, "question": "?", "answer": answer}
        assert SegmentEnv(dataset=[row]).source.get(0).target[0].region == (1, 1, 5, 1, 5, 5)
    with pytest.raises(DataError, match="row 0: 'image' is an array of 3 dimensions: give a picture as Image"):
        SegmentEnv(dataset=[{"image": np.zeros((5, 5, 3), np.uint8), "question": "?", "answer": "None"}])


def test_points_cover_nothing() -> None:
    with pytest.raises(DataError, match="has a point, which covers nothing"):
        SegmentEnv(dataset=[{"image": PICTURE, "question": "?", "answer": [[1, 2]]}])


def test_outlines_go_around_something() -> None:
    with pytest.raises(DataError, match=r"row 0: .*an outline that goes around nothing"):
        SegmentEnv(dataset=[{"image": PICTURE, "question": "?", "answer": [{"polygon": [1, 1, 5, 5, 9, 9]}]}])


def test_long_outlines_are_simplified_until_they_can_be_answered() -> None:
    angles = np.linspace(0, 2 * np.pi, 4000, endpoint=False)
    circle = tuple(float(v) for a in angles for v in (200 + 150 * np.cos(a), 200 + 150 * np.sin(a)))
    (simple,) = simple_outlines(circle, 300)
    assert len(simple) <= 600
    whole, less = shape_of(circle), shape_of(simple)
    assert whole.intersection(less).area / whole.union(less).area > 0.99


def test_many_small_parts_are_answered_by_the_largest() -> None:
    pixels = np.zeros((60, 60), dtype=np.bool_)
    pixels[::3, ::3] = True
    pixels[30:50, 30:50] = True
    outlines = simple_outlines(outlines_of_mask(pixels), 100)
    assert sum(map(len, outlines)) <= 200
    assert max(shape_of(outline).area for outline in outlines) >= 400


def test_repeated_sentences() -> None:
    assert non_repeat_reward("I see. I look. [1.5, 1.5, 1.5].", None) == 1
    assert non_repeat_reward("I see. I see. It is there.", None) == 1
    assert non_repeat_reward("I see. I see. I see.", None) == 0
    assert non_repeat_reward("<think>I see. I see. I see.</think><answer>None</answer>", None) == 0
    assert non_repeat_reward("<think>I see. I see.</think><answer>None</answer>", None) == 1


def test_areas_of_nothing() -> None:
    env = SegmentEnv(dataset=[{"image": PICTURE, "question": "?", "answer": "None"}])
    assert env.target(env.source.get(0)) == Objects((), (1, 1), (420, 840))
    measured = env.measure(AnswerFormat.TAGS.write("None"), env.target(env.source.get(0)), {})
    assert (measured["iou/mean"], measured["area/union"]) == (1, 0)
