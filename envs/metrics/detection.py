"""COCO's metrics of detection over a data set, by pycocotools, with bootstrap intervals."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlmenv.core.answers import Detection
from vlmenv.core.coordinates import Box
from vlmenv.envs.metrics.intervals import Interval, bootstrap_draws, number_clusters, percentile_interval
from vlmenv.envs.rewards.detection import IOU_THRESHOLDS, folded, pairwise_iou

STATISTICS: Final = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""In pycocotools' order; s, m and l are objects of up to 32², of up to 96² and of more squared pixels."""
RESAMPLES: Final = 500
"""Of AP: some 3 ms each for 1,000 images with 10 answers, and in proportion to the answers."""
_RECALLS: Final = np.linspace(0, 1, 101)
_TINY: Final = float(np.spacing(1))
_STDOUT: Final = threading.Lock()  # all threads have the same one, and swaps of it must be undone in order


class Matches(NamedTuple):
    """Matches of all answers: by question, then by label, then in COCO's order."""

    starts: NDArray[np.int64]
    """[Q + 1], start of the answers to each question"""
    labels: NDArray[np.int64]
    """[D], the label of each answer"""
    hits: NDArray[np.bool_]
    """[T, D], at each IoU threshold"""
    counted: NDArray[np.bool_]
    """[T, D], hits and misses; an answer on a crowd is neither"""
    true_questions: NDArray[np.int64]
    """[G], the question of each true box outside crowds"""
    true_labels: NDArray[np.int64]
    """[G]"""


def coco_statistics(truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """pycocotools' 12 COCO statistics of detected boxes, under the names of `STATISTICS`.

    Args:
        truth: COCO's `images`, `annotations` and `categories`.
        results: Rows of `image_id`, `category_id`, `bbox` (x, y, width, height) and `score`, maybe none.

    Returns:
        Numbers in [0, 1], NaN if there are no such true boxes, for example no small ones.
    """
    return _named(_evaluate(truth, results))


def detection_statistics(
    answered: Sequence[Sequence[Detection]],
    truth: Sequence[Sequence[Detection]],
    *,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """COCO's AP (IoU .50:.95), AP50 and AP75 of answers without scores, with 95 % intervals.

    All scores are equal, so an answer's rank is its position: image after image, each as listed. The labels are those
    of the true boxes. COCO leaves out answers with a label that no image has.

    A resample ranks its images in the order in which they are drawn. It repeats some images, so its labels are in fewer
    different images. This raises AP, the more so the rarer the labels are. The interval is shifted back by the mean
    difference.

    Args:
        answered: Boxes of N images.
        truth: True boxes of these images, in the same coordinates.
        clusters: [N], the question of each image, if several answers belong to one question. Default: each has its own.
        resamples: Number of resamples.
        seed: Seed of the draws.

    Returns:
        pycocotools' values with intervals, NaN if there is no true box outside crowds.
    """
    values, samples = _resampled(answered, truth, clusters, resamples, seed)
    found = {name: percentile_interval(values[name], samples[name], centred=True) for name in samples}
    return {name: Interval(*np.clip(interval, 0, 1).tolist()) for name, interval in found.items()}


def paired_statistics(
    before: Sequence[Sequence[Detection]],
    after: Sequence[Sequence[Detection]],
    truth: Sequence[Sequence[Detection]],
    *,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """The differences of AP, AP50 and AP75 between two sets of answers to the same images, later minus earlier.

    Each resample draws the same images for both. Intervals are shifted as in `detection_statistics`.

    Args:
        before: Boxes of N images.
        after: Other boxes of these images.
        truth: True boxes of these images.
        clusters: See `detection_statistics`.
        resamples: Number of resamples.
        seed: Seed of the draws.
    """
    (first, earlier), (last, later) = (_resampled(one, truth, clusters, resamples, seed) for one in (before, after))
    return {
        name: percentile_interval(last[name] - first[name], later[name] - earlier[name], centred=True) for name in later
    }


def _resampled(
    answered: Sequence[Sequence[Detection]],
    truth: Sequence[Sequence[Detection]],
    clusters: Sequence[Hashable] | None,
    resamples: int,
    seed: int,
) -> tuple[dict[str, float], dict[str, NDArray[np.float64]]]:
    """pycocotools' values of the data set, and those [B] of its resamples."""
    evaluation = _evaluate(*_coco_form(answered, truth), areas=1)
    matches = match_answers(evaluation, number_clusters(range(len(truth)) if clusters is None else clusters))
    draws = bootstrap_draws(len(matches.starts) - 1, resamples, seed)
    aps = np.array([resampled_ap(matches, drawn) for drawn in draws]).reshape(-1, len(IOU_THRESHOLDS))
    return _named(evaluation), {"AP": aps.mean(axis=1), "AP50": aps[:, 0], "AP75": aps[:, 5]}


def coco_metrics(
    answered: Sequence[Sequence[Detection]],
    truth: Sequence[Sequence[Detection]],
    *,
    clusters: Sequence[Hashable] | None = None,
) -> dict[str, Interval]:
    """All 12 COCO statistics of answers without scores; AP, AP50 and AP75 with intervals, as `detection_statistics`."""
    values = coco_statistics(*_coco_form(answered, truth))
    alone = {name: Interval(value, float("nan"), float("nan")) for name, value in values.items()}
    return alone | detection_statistics(answered, truth, clusters=clusters)


def nms_ap(
    answered: Sequence[Sequence[Detection]],
    truth: Sequence[Sequence[Detection]],
    iou: float = 0.5,
    *,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """NMS-AP (OVDEval, arXiv 2308.13177): AP of the answers after suppression across labels.

    If answered boxes overlap by more than `iou`, the first one is kept, whatever the labels. So it does not pay to give
    a box every label. OVDEval's own script suppresses only among answers on the same true box. Here suppression ignores
    the truth. Otherwise as `detection_statistics`.
    """
    kept = [suppress(row, iou) for row in answered]
    return detection_statistics(kept, truth, clusters=clusters, resamples=resamples, seed=seed)["AP"]


def suppress(detections: Sequence[Detection], iou: float = 0.5) -> list[Detection]:
    """The detections without those that overlap an earlier kept one by more than `iou`, whatever the labels."""
    boxes = np.array([detection.box for detection in detections], dtype=np.float64).reshape(-1, 4)
    kept, left = [], np.arange(len(boxes))
    while left.size:
        first, left = left[:1], left[1:]
        kept.append(detections[first[0]])
        left = left[pairwise_iou(boxes[first], boxes[left])[0] <= iou]
    return kept


def resampled_ap(matches: Matches, drawn: NDArray[np.int64]) -> NDArray[np.float64]:
    """COCO's AP [T] at each IoU threshold over a data set of the questions drawn [n], in their order.

    Equal to what pycocotools accumulates over such a data set. NaN where it has no true box.
    """
    copies = np.bincount(drawn, minlength=len(matches.starts) - 1)
    wanted = np.bincount(matches.true_labels, weights=copies[matches.true_questions])
    if not wanted.any():
        return np.full(len(matches.hits), np.nan)
    found = _concatenated(matches.starts, drawn)
    found = found[np.argsort(matches.labels[found], kind="stable")]
    labels = matches.labels[found]
    rows, places = np.nonzero(matches.hits[:, found])
    curves = rows * len(wanted) + labels[places]  # ascending: one for each threshold and label
    tp = np.arange(1, len(curves) + 1) - np.searchsorted(curves, curves)
    precision = _best_from_here(tp / (_seen(matches.counted[:, found], labels)[rows, places] + _TINY), curves)
    reached = np.searchsorted(_RECALLS, tp / wanted[labels[places]], side="right")
    gained = reached - np.where(tp > 1, np.roll(reached, 1), 0)  # of the 101 recalls, by each hit
    sums = np.bincount(rows, weights=gained * precision, minlength=len(matches.hits))
    return sums / (len(_RECALLS) * np.count_nonzero(wanted))


def _concatenated(starts: NDArray[np.int64], drawn: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions of the members of groups, one group drawn after the other; group q begins at `starts[q]`."""
    sizes = np.diff(starts)[drawn]
    positions: NDArray[np.int64] = np.arange(sizes.sum()) + np.repeat(starts[drawn] - (sizes.cumsum() - sizes), sizes)
    return positions


def _seen(counted: NDArray[np.bool_], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many [T, D] have counted up to and with each answer, among those of its label; labels [D] ascend."""
    running = np.zeros((len(counted), len(labels) + 1), dtype=np.int64)
    counted.cumsum(axis=1, out=running[:, 1:])
    return running[:, 1:] - running[:, np.searchsorted(labels, labels)]


def _best_from_here(precision: NDArray[np.float64], curves: NDArray[np.int64]) -> NDArray[np.float64]:
    """The greatest precision [H] at each point of its curve or after it; the numbers of the curves [H] ascend."""
    lift = 2 * (curves[-1:] - curves)  # sets each curve above those after it, as none goes beyond 1
    best: NDArray[np.float64] = np.maximum.accumulate((precision + lift)[::-1])[::-1] - lift
    return best


def match_answers(evaluation: Any, questions: NDArray[np.int64]) -> Matches:
    """pycocotools' matches over all areas, grouped by question.

    Args:
        evaluation: A `COCOeval` after the evaluation of N images.
        questions: [N], the question of each image, 0 to Q - 1.
    """
    if len(questions) != len(evaluation.params.imgIds):
        raise ValueError(f"{len(questions)} clusters for {len(evaluation.params.imgIds)} images")
    found = [(*divmod(i, len(questions)), row) for i, row in enumerate(evaluation.evalImgs) if row]
    labels = np.array([label for label, _, _ in found], dtype=np.int64)
    owners = questions[np.array([image for _, image, _ in found], dtype=np.int64)]
    answers = np.array([len(row["dtIds"]) for _, _, row in found], dtype=np.int64)
    truths = np.array([np.count_nonzero(row["gtIgnore"] == 0) for _, _, row in found], dtype=np.int64)
    matched = _side_by_side([row["dtMatches"] > 0 for _, _, row in found])
    counted = ~_side_by_side([row["dtIgnore"] for _, _, row in found])
    owner = np.repeat(owners, answers)
    order = np.argsort(owner, kind="stable")
    return Matches(
        starts=np.searchsorted(owner[order], np.arange(questions.max(initial=-1) + 2)),
        labels=np.repeat(labels, answers)[order],
        hits=(matched & counted)[:, order],
        counted=counted[:, order],
        true_questions=np.repeat(owners, truths),
        true_labels=np.repeat(labels, truths),
    )


def _side_by_side(parts: Sequence[NDArray[np.bool_]]) -> NDArray[np.bool_]:
    """Parts [T, d] as one [T, D], also if there are none."""
    return np.concatenate([np.zeros((len(IOU_THRESHOLDS), 0), dtype=np.bool_), *parts], axis=1)


def _evaluate(truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], *, areas: int = 4) -> Any:
    """pycocotools' evaluation, summarised, over the first of its ranges of area (all, small, medium, large)."""
    from pycocotools.cocoeval import COCOeval

    # It writes into what it is given, takes an annotation of id 0 for none, and cannot load results without any.
    annotations = [{**annotation, "id": i} for i, annotation in enumerate(truth["annotations"], 1)]
    with _STDOUT, contextlib.redirect_stdout(io.StringIO()):
        true = _indexed({**truth, "annotations": annotations})
        found = true.loadRes([dict(row) for row in results]) if results else _indexed({"annotations": []})
        evaluation = COCOeval(true, found, "bbox")
        params = evaluation.params
        params.areaRng, params.areaRngLbl = params.areaRng[:areas], params.areaRngLbl[:areas]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def _indexed(dataset: dict[str, Any]) -> Any:
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _named(evaluation: Any) -> dict[str, float]:
    """An evaluation's statistics by name, -1 as NaN."""
    values = [float(value) if value >= 0 else float("nan") for value in evaluation.stats]
    return dict(zip(STATISTICS, values, strict=True))


def _coco_form(
    answered: Sequence[Sequence[Detection]], truth: Sequence[Sequence[Detection]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Truth and answers in COCO's form, without answers whose label no image has."""
    answered, truth = [folded(row) for row in answered], [folded(row) for row in truth]
    numbers = {label: i for i, label in enumerate(sorted({true.label for row in truth for true in row}), 1)}
    annotations, results = [], []
    for image, (found, trues) in enumerate(zip(answered, truth, strict=True)):
        for true in trues:
            area = _area(true.box) if true.area is None else true.area
            annotations.append(_row(image, numbers[true.label], true.box) | {"iscrowd": int(true.crowd), "area": area})
        results += [_row(image, numbers[one.label], one.box) | {"score": 1.0} for one in found if one.label in numbers]
    categories = [{"id": number, "name": label} for label, number in numbers.items()]
    images = [{"id": image} for image in range(len(truth))]
    return {"images": images, "annotations": annotations, "categories": categories}, results


def _row(image: int, category: int, box: Box) -> dict[str, Any]:
    bbox = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
    return {"image_id": image, "category_id": category, "bbox": bbox}


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
