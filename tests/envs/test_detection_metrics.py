from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from conftest import shared
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vlmenv.core.answers import Detection
from vlmenv.envs.metrics.detection import (
    STATISTICS,
    coco_statistics,
    detection_statistics,
    match_answers,
    nms_ap,
    paired_statistics,
    resampled_ap,
)
from vlmenv.envs.metrics.intervals import bootstrap_draws

Rows = list[list[Detection]]

A, B = (0.0, 0.0, 10.0, 10.0), (20.0, 0.0, 30.0, 10.0)
A80, A72 = (0.0, 0.0, 10.0, 8.0), (0.0, 0.0, 10.0, 7.2)  # their overlap with A
NOTHING = (math.nan, math.nan, math.nan)


def random_rows(rng: np.random.Generator, images: int, labels: str = "abcde") -> tuple[Rows, Rows]:
    """Answers and truth: shared boxes, duplicates, crowds, empty images, and labels of only one of the two."""
    answered, truth = [], []
    for _ in range(images):
        true = [random_detection(rng, labels[1:], crowd=rng.random() < 0.15) for _ in range(rng.integers(0, 6))]
        found = [random_detection(rng, labels[:-1]) for _ in range(rng.integers(0, 6))]
        found += [Detection(d.label, d.box) for d in true if rng.random() < 0.6]
        found += [found[i] for i in rng.integers(len(found), size=rng.integers(0, 3))] if found else []
        answered.append([found[i] for i in rng.permutation(len(found))])
        truth.append(true)
    return answered, truth


def random_detection(rng: np.random.Generator, labels: str, crowd: bool = False) -> Detection:
    """On a coarse grid, so that overlaps are frequent and often equal."""
    corner, sides = rng.integers(0, 8, 2), rng.integers(1, 6, 2)
    x1, y1, x2, y2 = (float(value) for value in [*corner, *(corner + sides)])
    area = float(sides.prod()) * 0.7 if rng.random() < 0.5 else None
    return Detection(str(rng.choice(list(labels))), (x1, y1, x2, y2), crowd, area)


def evaluate(answered: Rows, truth: Rows) -> COCOeval:
    """pycocotools on rows of images, one annotation for each box, scores all 1."""
    names = sorted({true.label for row in truth for true in row})

    def written(rows: Rows, **more: Any) -> list[dict[str, Any]]:
        boxes = [(image, d) for image, row in enumerate(rows, 7) for d in row if d.label in names]
        return [
            {"id": i, "image_id": image, "category_id": names.index(d.label), "iscrowd": int(d.crowd), **more}
            | {"bbox": [d.box[0], d.box[1], d.box[2] - d.box[0], d.box[3] - d.box[1]], "area": d.area or 1.0}
            for i, (image, d) in enumerate(boxes, 1)
        ]

    coco = COCO()
    images, categories = [{"id": i + 7} for i in range(len(truth))], [{"id": i} for i in range(len(names))]
    coco.dataset = {"images": images, "annotations": written(truth), "categories": categories}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(written(answered, score=1.0)), "bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def summary(aps: np.ndarray) -> np.ndarray:
    return np.array([aps.mean(), aps[0], aps[5]])


@pytest.mark.parametrize("seed", range(10))
def test_equals_pycocotools(seed: int) -> None:
    answered, truth = random_rows(np.random.default_rng(seed), images=40)
    answered[3] += [Detection("b", A)] * 130  # more than COCO's 100
    evaluation = evaluate(answered, truth)
    statistics = detection_statistics(answered, truth, resamples=2)
    np.testing.assert_allclose([s.value for s in statistics.values()], evaluation.stats[:3], rtol=0, atol=1e-12)
    own = resampled_ap(match_answers(evaluation, np.arange(40)), np.arange(40))
    np.testing.assert_allclose(summary(own), evaluation.stats[:3], rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_resample_equals_the_data_set_of_the_images_drawn(seed: int) -> None:
    """Also where a label is drawn in none of its images, and where answers of several images belong together."""
    rng = np.random.default_rng(seed)
    answered, truth = random_rows(rng, images=12, labels="abcdefghijkl")
    questions = np.array([0, 1, 2, 0, 1, 2, 3, 3, 3, 4, 4, 5])
    for owners in (np.arange(12), questions):
        matches = match_answers(evaluate(answered, truth), owners)
        for drawn in bootstrap_draws(owners.max() + 1, resamples=5, seed=seed):
            images = [image for question in drawn for image in np.flatnonzero(owners == question)]
            expected = evaluate([answered[i] for i in images], [truth[i] for i in images]).stats[:3]
            np.testing.assert_allclose(summary(resampled_ap(matches, drawn)), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("clusters", [None, list("abcdabcdab")])
def test_intervals_are_of_the_resampled_data_sets(clusters: list[str] | None) -> None:
    answered, truth = random_rows(np.random.default_rng(0), images=10)
    owners = clusters or list(range(10))
    names = list(dict.fromkeys(owners))
    values = []
    for drawn in bootstrap_draws(len(names), resamples=41, seed=2):
        images = [image for question in drawn for image in range(10) if owners[image] == names[question]]
        values.append(evaluate([answered[i] for i in images], [truth[i] for i in images]).stats[:3])
    found = detection_statistics(answered, truth, clusters=clusters, resamples=41, seed=2)
    for column, interval in zip(np.sort(np.array(values), axis=0).T, found.values(), strict=True):
        ends = column[[1, 39]] - column.mean() + interval.value
        assert interval[1:] == pytest.approx(np.clip(ends, 0, 1).tolist(), abs=1e-9)
        assert interval.low <= interval.value <= interval.high


def test_paired_differences_are_of_the_same_drawn_images() -> None:
    rng = np.random.default_rng(1)
    before, truth = random_rows(rng, images=8)
    after = [row[: len(row) // 2] for row in before]
    values = []
    for drawn in bootstrap_draws(8, resamples=41, seed=2):
        sets = [evaluate([one[i] for i in drawn], [truth[i] for i in drawn]).stats[:3] for one in (before, after)]
        values.append(sets[1] - sets[0])
    found = paired_statistics(before, after, truth, resamples=41, seed=2)
    whole = [evaluate(one, truth).stats[:3] for one in (before, after)]
    assert [one.value for one in found.values()] == pytest.approx((whole[1] - whole[0]).tolist(), abs=1e-12)
    for column, interval in zip(np.sort(np.array(values), axis=0).T, found.values(), strict=True):
        ends = column[[1, 39]] - column.mean() + interval.value
        assert interval[1:] == pytest.approx(ends.tolist(), abs=1e-9)
    assert set(paired_statistics(before, before, truth).values()) == {(0, 0, 0)}


def test_the_order_of_images_and_answers_is_their_rank() -> None:
    right, wrong = [Detection("cat", A)], [Detection("cat", B)]
    truth = [right, right]
    assert detection_statistics([right, wrong], truth)["AP"].value == pytest.approx(51 / 101)
    assert detection_statistics([wrong, right], truth)["AP"].value == pytest.approx(51 / 101 / 2)
    assert detection_statistics([right + wrong, wrong], truth)["AP"].value == pytest.approx(51 / 101)
    assert detection_statistics([wrong + right, wrong], truth)["AP"].value == pytest.approx(51 / 101 / 2)


def test_what_counts_where() -> None:
    """IoU .8 is right at seven of ten thresholds; answers on crowds and with labels that are nowhere count for nil."""
    cat, near, dog = Detection("cat", A), Detection("cat", A80), Detection("dog", A)
    found = detection_statistics([[near], [dog]], [[cat], []])
    assert [found[name].value for name in ("AP", "AP50", "AP75")] == pytest.approx([0.7, 1, 1])
    mixed = detection_statistics([[Detection("cat", A72)], [cat]] * 5, [[cat]] * 10)
    assert mixed["AP50"] == pytest.approx((1, 1, 1))
    assert mixed["AP75"].low < mixed["AP75"].value < mixed["AP75"].high
    crowded = [[cat, Detection("cat", B, crowd=True)]]
    assert detection_statistics([[Detection("cat", B)] * 5 + [cat]], crowded)["AP"].value == pytest.approx(1)


def test_with_nothing_to_measure() -> None:
    cat = Detection("cat", A)
    for empty in (
        detection_statistics([], []),
        detection_statistics([[cat]] * 3, [[]] * 3),
        detection_statistics([[cat]] * 3, [[Detection("cat", A, crowd=True)]] * 3),
        detection_statistics([[cat]] * 3, [[Detection("cat", A, area=2e10)]] * 3),  # beyond COCO's greatest area
        {"": nms_ap([[]], [[]])},
    ):
        assert list(empty.values()) == [pytest.approx(NOTHING, nan_ok=True)] * len(empty)
    assert set(detection_statistics([[]] * 3, [[cat]] * 3).values()) == {(0, 0, 0)}
    assert detection_statistics([[cat]], [[cat]])["AP"] == pytest.approx((1, math.nan, math.nan), nan_ok=True)


def test_intervals_stay_in_range() -> None:
    """Few images of each label and nearly all right: moved to their mean, the greatest values go beyond 1."""
    truth = [[Detection(str(i % 5), A)] for i in range(20)]
    assert detection_statistics([*truth[:-1], []], truth, resamples=100)["AP"].high == 1


def test_rows_must_belong_together() -> None:
    with pytest.raises(ValueError, match="zip"):
        detection_statistics([[]], [])
    with pytest.raises(ValueError, match="3 clusters for 2 images"):
        detection_statistics([[], []], [[], []], clusters=["a", "b", "c"])


def test_a_box_with_every_label_counts_once() -> None:
    truth = [[Detection("cat", A)], [Detection("dog", A)]]
    every = [Detection(label, A) for label in ("cat", "dog", "cow")]
    assert detection_statistics([every, every], truth)["AP"].value == pytest.approx((1 + 1 / 2) / 2)
    assert nms_ap([every, every], truth).value == pytest.approx((1 + 0) / 2)
    assert nms_ap([every[2:] + every] * 2, truth).value == 0
    assert nms_ap([every[:1], every[1:]], truth).value == pytest.approx(1)


def test_of_overlapping_boxes_the_first_is_kept() -> None:
    cat, dog, cow = Detection("cat", A), Detection("dog", A80), Detection("cow", B)
    truth = [[cat, dog, cow]]
    assert nms_ap(truth, truth).value == pytest.approx(2 / 3)  # without the dog
    assert nms_ap(truth, truth, iou=0.8).value == pytest.approx(1)
    assert nms_ap(truth, truth, iou=0.79).value == pytest.approx(2 / 3)
    # what an earlier box suppresses suppresses no other: the third overlaps the second alone
    chain = [Detection(label, (x, 0.0, x + 10, 10.0)) for label, x in (("a", 0.0), ("b", 3.0), ("c", 6.0))]
    assert nms_ap([chain], [chain]).value == pytest.approx(2 / 3)
    assert nms_ap([[chain[1], chain[0], chain[2]]], [chain]).value == pytest.approx(1 / 3)


def test_nms_ap_has_the_interval_of_what_is_left() -> None:
    cat, dog = Detection("cat", A), Detection("dog", A)
    truth = [[cat]] * 4 + [[dog]] * 4
    left = [[cat]] * 6 + [[dog]] * 2
    clusters = [0, 1, 2, 3] * 2
    expected = detection_statistics(left, truth, clusters=clusters, resamples=50, seed=1)["AP"]
    both = [[cat, dog]] * 6 + [[dog, cat]] * 2
    assert nms_ap(both, truth, clusters=clusters, resamples=50, seed=1) == expected
    assert expected.low < expected.value < expected.high


def test_published_statistics() -> None:
    folder = shared("data/eval_reference/coco_val2014_100")
    truth = json.loads((folder / "instances_val2014_100.json").read_text())
    results = json.loads((folder / "instances_val2014_fakebbox100_results.json").read_text())
    expected = json.loads((folder / "expected.json").read_text())["bbox"]
    found = coco_statistics(truth, results)
    assert tuple(found) == STATISTICS
    np.testing.assert_allclose(list(found.values()), expected, rtol=0, atol=1e-9)


def small_coco() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One object of 40 x 40, found exactly; the id is one that COCO's matching would take for none."""
    row = {"image_id": 5, "category_id": 3, "bbox": [0.0, 0.0, 40.0, 40.0]}
    annotation = {**row, "id": 0, "area": 1600.0, "iscrowd": 0}
    return {"images": [{"id": 5}], "annotations": [annotation], "categories": [{"id": 3}]}, [{**row, "score": 0.5}]


def test_coco_statistics_of_one_box() -> None:
    truth, results = small_coco()
    absent = {"APs", "APl", "ARs", "ARl"}
    for given, score in ((results, 1.0), ([], 0.0)):
        expected = {name: math.nan if name in absent else score for name in STATISTICS}
        assert coco_statistics(truth, given) == pytest.approx(expected, nan_ok=True)


def test_coco_statistics_leave_all_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    truth, results = small_coco()
    before = copy.deepcopy((truth, results))
    coco_statistics(truth, results)
    assert (truth, results) == before
    assert capsys.readouterr() == ("", "")


def test_threads_keep_their_stdout() -> None:
    stdout = sys.stdout
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: coco_statistics(*small_coco())["AP"], range(40)))
    assert found == pytest.approx([1.0] * 40)
    assert sys.stdout is stdout
