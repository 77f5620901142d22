from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest
from growth import growth
from hypothesis import given
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vlmenv.core.answers import Detection, parse_detections, write_detections
from vlmenv.envs.metrics.detection import detection_statistics
from vlmenv.envs.rewards.detection import (
    IOU_THRESHOLDS,
    average_precision,
    detection_format_reward,
    map50_reward,
    map_reward,
    match_greedily,
    od_length_reward,
    repetition_reward,
    weighted_sum_reward,
)


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """On a coarse grid, so that overlaps are frequent and often equal."""
    corners, sides = rng.integers(0, 8, (count, 2)), rng.integers(1, 6, (count, 2))
    return np.concatenate([corners, corners + sides], axis=1).astype(np.float64)


def coco_aps(cases: list[dict[str, Any]]) -> np.ndarray:
    """pycocotools' AP of each case, by making each a category of its own in one image."""
    truths, answers = [], []
    for category, case in enumerate(cases, 1):
        for box, crowd in zip(case["target"], case["crowd"], strict=True):
            x1, y1, x2, y2 = box.tolist()
            area = (x2 - x1) * (y2 - y1)
            truths.append(
                {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": area, "iscrowd": int(crowd), "category_id": category}
            )
        for box, score in zip(case["answered"], case["scores"], strict=True):
            x1, y1, x2, y2 = box.tolist()
            answers.append({"bbox": [x1, y1, x2 - x1, y2 - y1], "score": score, "category_id": category, "image_id": 1})
    coco = COCO()
    annotations = [{"id": i, "image_id": 1} | truth for i, truth in enumerate(truths, 1)]
    categories = [{"id": category} for category in range(1, len(cases) + 1)]
    coco.dataset = {"info": {}, "images": [{"id": 1}], "annotations": annotations, "categories": categories}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(answers), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, 2]  # thresholds, recalls, categories; all areas; 100
    found = precision.mean(axis=(0, 1))
    return np.where((precision == -1).any(axis=(0, 1)), np.nan, found)


@pytest.mark.slow
@pytest.mark.parametrize("equal_scores", [True, False])
def test_average_precision_equals_pycocotools(equal_scores: bool) -> None:
    """On 1,000 random cases each, crowds, empty sets and more than 100 answers among them."""
    rng = np.random.default_rng(int(equal_scores))
    cases = []
    for i in range(1000):
        answered = random_boxes(rng, 120 if i % 100 == 0 else int(rng.integers(0, 9)))
        target = random_boxes(rng, int(rng.integers(0, 7)))
        exact = rng.random(len(answered)) < 0.4
        if len(target):
            answered[exact] = target[rng.integers(len(target), size=exact.sum())]
        scores = np.ones(len(answered)) if equal_scores else rng.integers(1, 5, len(answered)) / 5
        cases.append(
            {"answered": answered, "target": target, "scores": scores, "crowd": rng.random(len(target)) < 0.15}
        )
    ours = [
        average_precision(c["answered"], c["target"], scores=None if equal_scores else c["scores"], crowd=c["crowd"])
        for c in cases
    ]
    theirs = coco_aps(cases)
    assert 30 < np.isnan(theirs).sum() < 500
    np.testing.assert_allclose(ours, theirs, atol=1e-9)


def answered(*detections: Detection) -> str:
    return f"<think>t</think><answer>{write_detections(detections)}</answer>"


A = Detection("cat", (0, 0, 10, 10))
B = Detection("cat", (20, 0, 30, 10))
C = Detection("dog", (50, 50, 60, 70))


@pytest.mark.parametrize(
    ("text", "target", "ap", "with_length"),
    [
        (answered(A, B), [A, B], 1.0, 1.0),
        (answered(A, B, *[A] * 20), [A, B], 1.0, 2 / 22),
        (answered(A, B, C), [A, B], 0.5, 0.5 * 2 / 3),  # nobody asked for dogs
        (answered(A), [A, C], 0.5, 0.5),
        (answered(Detection("cat", (0, 0, 10, 5.0))), [A], 0.1, 0.1),  # IoU .5: right at the first of ten thresholds
        (answered(Detection("dog", A.box)), [A], 0.0, 0.0),
        (answered(), [A], 0.0, 0.0),
        (answered(), [], 1.0, 1.0),
        (answered(A), [], 0.0, 0.0),
        ("", [], 0.0, 0.0),
        ("<think>t</think><answer>nothing here</answer>", [], 0.0, 0.0),
    ],
)
def test_rewards_by_hand(text: str, target: list[Detection], ap: float, with_length: float) -> None:
    assert map_reward(text, target) == pytest.approx(ap, abs=1e-9)
    assert od_length_reward(text, target) == pytest.approx(with_length, abs=1e-9)


def test_labels_are_compared_whatever_their_case() -> None:
    text = answered(Detection("CAT ", A.box), Detection("Traffic  light", C.box))
    target = [Detection("cat", A.box), Detection("traffic Light", C.box)]
    for reward in (map_reward, map50_reward, od_length_reward, weighted_sum_reward):
        assert reward(text, target) == pytest.approx(1)
    assert match_greedily(parse_detections(text[29:-9]) or (), target) == 2
    assert detection_statistics([[Detection("Cat", A.box)]], [[A]])["AP"].value == pytest.approx(1)


def test_map50_by_hand() -> None:
    assert map50_reward(answered(Detection("cat", (0, 0, 10, 5))), [A]) == pytest.approx(1)
    assert map50_reward(answered(Detection("cat", (0, 0, 10, 4))), [A]) == 0


@pytest.mark.parametrize(
    ("text", "target", "expected"),
    [
        (answered(A, C), [A, C], 1.0),
        (answered(Detection("cat", (0, 0, 10, 6))), [A], 0.7 * 0.6 + 0.3),
        (answered(Detection("dog", A.box)), [A], 0.0),  # well placed, but nobody asked for dogs
        (answered(A), [A, C], 0.7 / 2 + 0.3 * 0.75),
        (answered(A, B), [A], 0.7 + 0.3 * 0.75),
        (answered(Detection("cat", (0, 0, 10, 4))), [A], 0.0),
        (answered(), [A], 0.0),
        (answered(), [], 1.0),
        (answered(A), [], 0.0),
        ("hm", [], 0.0),
    ],
)
def test_weighted_sum_by_hand(text: str, target: list[Detection], expected: float) -> None:
    assert weighted_sum_reward(text, target) == pytest.approx(expected)


def test_repetition_by_hand() -> None:
    assert repetition_reward(answered(A, B), []) == 0
    assert repetition_reward(answered(A, A, A, B), []) == -0.5
    assert repetition_reward("a b c d e f " * 4, []) == 6 / 19 - 1
    assert repetition_reward("hm", []) == 0


def test_greedy_matching_takes_the_best_overlap_first() -> None:
    near = Detection("cat", (1, 0, 11, 10))
    assert match_greedily([near, A], [A]) == 1
    assert match_greedily([near, A, B, C], [A, B]) == 2
    assert match_greedily([Detection("dog", A.box)], [A]) == 0


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[{"bbox_2d": [1, 2, 3, 4], "label": "a"}]', (Detection("a", (1, 2, 3, 4)),)),
        ('```json\n[{"bbox_2d": [1.5, 2, 3, 4,], "label": " a "},]\n```', (Detection("a", (1.5, 2, 3, 4)),)),
        ('{"bbox_2d": [1, 2, 3, 4], "label": "a"}', (Detection("a", (1, 2, 3, 4)),)),
        ("None", ()),
        ("[]", ()),
        ('[{"bbox_2d": [1, 2, 3, 4]}]', None),
        ('[{"bbox_2d": [3, 2, 1, 4], "label": "a"}]', None),
        ('[{"bbox_2d": [1, 2, 3, 4, 5], "label": "a"}]', None),
        ('[{"bbox_2d": ["1", 2, 3, 4], "label": "a"}]', (Detection("a", (1, 2, 3, 4)),)),
        ('[{"bbox_2d": [1, 2, 3, 4], "label": "a"}, {"bbox_2d": [1, 2, 3, 4]}]', None),
        ('[{"bbox_2d": [true, 2, 3, 4], "label": "a"}]', None),
        ('[{"bbox_2d": [NaN, 2, 3, 4], "label": "a"}]', None),
        ('[{"bbox_2d": [0, 0, 1e308, 1e999], "label": "a"}]', None),
        (f'[{{"bbox_2d": [0, 0, 1{"0" * 400}, 1], "label": "a"}}]', None),
        (f'[{{"bbox_2d": [0, 0, 1{"0" * 5000}, 1], "label": "a"}}]', None),
        ('[[{"bbox_2d": [1, 2, 3, 4], "label": "a"}]]', (Detection("a", (1, 2, 3, 4)),)),
        ("[" * 50_000, None),
        ("{}", None),
        ("7", None),
        ("", None),
    ],
)
def test_parse_detections(content: str, expected: tuple[Detection, ...] | None) -> None:
    assert parse_detections(content) == expected


@given(st.text(st.characters()) | st.text(st.sampled_from('[]{}":,0123456789.eE-NanblocxI_ \n')))
def test_any_text_is_scored_within_range(text: str) -> None:
    for candidate in (text, f"<think>t</think><answer>{text}</answer>"):
        for target in ([], [A, C]):
            assert 0 <= map_reward(candidate, target) <= 1
            assert 0 <= od_length_reward(candidate, target) <= map_reward(candidate, target)
            assert 0 <= weighted_sum_reward(candidate, target) <= 1
            assert -1 < repetition_reward(candidate, target) <= 0
            assert detection_format_reward(candidate, target) in (0, 1)


def test_thresholds_are_cocos() -> None:
    np.testing.assert_allclose(IOU_THRESHOLDS, [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95])


@pytest.mark.slow
@pytest.mark.parametrize("size", [1500, 100_000], ids=["as long as is read", "longer"])
def test_lists_of_many_boxes_do_not_hold_up_a_step(size: int) -> None:
    """Many true boxes, and answers of up to 100,000 boxes on top of one another or each of its own label."""
    target = [Detection("cat", (float(i), 0.0, i + 10.0, 10.0)) for i in range(200)]
    rewards = (map_reward, od_length_reward, weighted_sum_reward, repetition_reward, detection_format_reward)
    for label in ("cat", "cat{}"):

        def score(boxes: int, label: str = label) -> None:
            rows = ",".join(
                f'{{"bbox_2d":[{i % 200},0,{i % 200 + 10},10],"label":"{label.format(i)}"}}' for i in range(boxes)
            )
            for reward in rewards:
                reward(f"<think>t</think><answer>[{rows}]</answer>", target)

        assert growth(score, size // 8, tries=2) < 32
