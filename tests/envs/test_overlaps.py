"""GIoU and the dynamic threshold as terms of REC and OVD."""

from __future__ import annotations

import itertools
import json
from typing import Any

import gymnasium
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmenv.core.answers import Detection
from vlmenv.core.coordinates import giou
from vlmenv.core.formats import AnswerFormat
from vlmenv.envs.rewards.boxes import dynamic_iou_reward, giou_reward, least_iou
from vlmenv.envs.rewards.detection import detection_dynamic_iou_reward, detection_giou_reward

TAGS = AnswerFormat.TAGS
EDGES = st.tuples(*[st.integers(0, 20)] * 2, *[st.integers(1, 10)] * 2).map(
    lambda e: (e[0], e[1], e[0] + e[2], e[1] + e[3])
)


def by_shapely(a: Any, b: Any) -> float:
    one, other = shapely.box(*a), shapely.box(*b)
    hull = shapely.box(*shapely.union(one, other).bounds).area
    union = one.union(other).area
    return float(one.intersection(other).area / union - (hull - union) / hull)


@settings(max_examples=60, deadline=None)
@given(EDGES, EDGES)
def test_giou_equals_shapelys(a: Any, b: Any) -> None:
    assert giou(a, b) == pytest.approx(by_shapely(a, b), abs=1e-12)
    assert giou_reward(TAGS.write(json.dumps(a)), b) == pytest.approx((1 + by_shapely(a, b)) / 2, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(*[st.lists(st.tuples(st.sampled_from(["a", "b"]), EDGES), min_size=1, max_size=3)] * 2)
def test_boxes_are_matched_at_best(given_boxes: Any, wanted: Any) -> None:
    text = TAGS.write(json.dumps([{"bbox_2d": box, "label": label} for label, box in given_boxes]))
    target = [Detection(label, box) for label, box in wanted]
    few, many = sorted((given_boxes, wanted), key=len)
    best = max(
        sum((1 + by_shapely(one, other)) / 2 for (a, one), (b, other) in zip(few, chosen, strict=True) if a == b)
        for chosen in itertools.permutations(many, len(few))
    )
    assert detection_giou_reward(text, target) == pytest.approx(best / len(many), abs=1e-9)


@pytest.mark.parametrize(
    ("answer", "true", "expected"),
    [
        ("[0,0,10,10]", (0, 0, 10, 10), 1),
        ("[0,0,10,5]", (0, 0, 10, 10), 0.75),
        ("[20,0,30,10]", (0, 0, 10, 10), 1 / 3),  # a gap as wide as a box: GIoU -1/3
        ("[90,0,100,10]", (0, 0, 10, 10), 0.1),
        ("None", (0, 0, 10, 10), 0),
        ("None", "None", 1),
        ("[0,0,10,10]", "None", 0),
        ("hm", (0, 0, 10, 10), 0),
    ],
)
def test_giou_by_hand(answer: str, true: Any, expected: float) -> None:
    assert giou_reward(TAGS.write(answer), true) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("progress", "least"),
    [(0, 0.85), (0.099, 0.85), (0.1, 0.95), (0.249, 0.95), (0.25, 0.99), (0.9, 0.99), (1, 0.99)],
)
def test_the_threshold_rises(progress: float, least: float) -> None:
    assert least_iou(progress) == least
    target = [Detection("cat", (0.0, 0.0, 100.0, 100.0))]
    for width in (84, 86, 94, 96, 98, 100):
        overlap = width / 100
        expected = overlap if overlap >= least else 0
        box = f"[0,0,{width},100]"
        assert dynamic_iou_reward(TAGS.write(box), target[0].box, progress=progress) == pytest.approx(expected)
        listed = TAGS.write(f'[{{"bbox_2d": {box}, "label": "cat"}}]')
        assert detection_dynamic_iou_reward(listed, target, progress=progress) == pytest.approx(expected)


def test_training_tells_its_progress_to_the_terms() -> None:
    envs: Any = gymnasium.make_vec("VLM-REC-v0", num_envs=1, rewards={"dynamic_iou": 1.0}).unwrapped
    sample = envs.task.source.get(0)
    x1, y1, x2, y2 = sample.target
    text = TAGS.write(json.dumps([x1, y1, x1 + 0.9 * (x2 - x1), y2]))
    rewards = []
    for progress in (None, 0.0, 0.5):
        if progress is not None:
            envs.progress = progress
        envs.reset(options={"index": [0]})
        rewards.append(float(envs.step([text])[1][0]))
    assert rewards == pytest.approx([0, 0.9, 0])
