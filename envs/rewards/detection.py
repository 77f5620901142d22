"""Rewards for answers that are lists of labelled boxes.

An unreadable answer scores 0. If nothing is to be found, the answer "None" scores 1 and any box 0. Boxes with absent
labels count against an answer. Boxes within a crowd of their label, which COCO marks for regions of many objects, count
neither way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from vlmenv.core.answers import Detection, fold_label, is_exact_detections, parse_detections
from vlmenv.core.coordinates import Box
from vlmenv.core.formats import AnswerFormat
from vlmenv.envs.rewards.boxes import least_iou
from vlmenv.envs.rewards.matching import best_pairs
from vlmenv.envs.rewards.terms import RewardTerm
from vlmenv.envs.rewards.text import cosine_length, count_words

IOU_THRESHOLDS: Final = np.linspace(0.5, 0.95, 10)
"""COCO's .50:.05:.95."""
MAX_DETECTIONS: Final = 100
"""Detections of a label that COCO takes into account."""
LONGEST_ANSWER: Final = 1024
"""Tokens after which the length reward falls no further."""
MOST_MATCHED: Final = 1_000
"""Boxes of an answer that are matched one to one; later ones count as boxes beside the true ones."""
_RECALLS: Final = np.linspace(0, 1, 101)
_ROWS: Final = np.arange(len(IOU_THRESHOLDS))
_TINY: Final = float(np.spacing(1))


def parse_detected_answer(text: str, answer_format: AnswerFormat = AnswerFormat.TAGS) -> tuple[Detection, ...] | None:
    """The detections in a completion; None if unreadable."""
    content = answer_format.extract(text)
    return None if content is None else parse_detections(content)


def map_reward(text: str, target: Sequence[Detection], answer_format: AnswerFormat = AnswerFormat.TAGS) -> float:
    """COCO's AP at IoU .50:.05:.95 over the labels of this image, all scores equal, in [0, 1].

    An answered label that is absent has AP 0; COCO itself leaves it out.

    Args:
        text: A completion.
        target: The true boxes in the coordinates that the prompt asks for.
        answer_format: How the completion sets its answer apart.
    """
    return _mean_ap(parse_detected_answer(text, answer_format), target, IOU_THRESHOLDS)


def map50_reward(text: str, target: Sequence[Detection], answer_format: AnswerFormat = AnswerFormat.TAGS) -> float:
    """As `map_reward`, at IoU .50 alone."""
    return _mean_ap(parse_detected_answer(text, answer_format), target, IOU_THRESHOLDS[:1])


def od_length_reward(text: str, target: Sequence[Detection], answer_format: AnswerFormat = AnswerFormat.TAGS) -> float:
    """`map_reward` times min(1, true boxes / answered boxes), against surplus boxes.

    VLM-R1 (arXiv 2504.07615, section 3.2). AP alone ignores duplicates after the last true box.
    """
    answered = parse_detected_answer(text, answer_format)
    ap = _mean_ap(answered, target, IOU_THRESHOLDS)
    given, wanted = countable(answered or (), target)
    return ap * min(1.0, len(wanted) / len(given)) if given else ap


def countable(
    answered: Sequence[Detection], target: Sequence[Detection]
) -> tuple[Sequence[Detection], Sequence[Detection]]:
    """The answers and true boxes that count: without crowds, and without what lies within one alone.

    Their labels are folded, as they are compared.
    """
    answered, target = folded(answered), folded(target)
    crowds = [one for one in target if one.crowd]
    if not crowds:
        return answered, target
    wanted = [one for one in target if not one.crowd]
    return [one for one in answered if not _excused(one, crowds, wanted)], wanted


def folded(detections: Sequence[Detection]) -> Sequence[Detection]:
    """Detections with labels as they are compared."""
    labels = [fold_label(one.label) for one in detections]
    return [
        one if one.label == label else one._replace(label=label) for one, label in zip(detections, labels, strict=True)
    ]


def _excused(one: Detection, crowds: Sequence[Detection], wanted: Sequence[Detection]) -> bool:
    own = _boxes([one])
    around, others = _boxes(crowds, one.label), _boxes(wanted, one.label)
    within = pairwise_iou(own, around, np.ones(len(around), dtype=np.bool_))
    return bool((within >= 0.5).any() and not (pairwise_iou(own, others) >= 0.5).any())


def detection_length_reward(
    text: str,
    target: Sequence[Detection],
    count_tokens: Callable[[str], int] = count_words,
    answer_format: AnswerFormat = AnswerFormat.TAGS,
) -> float:
    """The cosine length reward, for answers that are right as far as `od_length_reward` says so; in [-0.5, 1]."""
    correct = od_length_reward(text, target, answer_format)
    return cosine_length(correct, count_tokens(text), LONGEST_ANSWER)


def repetition_reward(text: str, target: Sequence[Detection], answer_format: AnswerFormat = AnswerFormat.TAGS) -> float:
    """-(1 - distinct / all) over the detections or, where there is no list of them, over runs of six words."""
    answered = parse_detected_answer(text, answer_format)
    items: Sequence[object] = answered if answered is not None else _six_grams(text)
    return len(set(items)) / len(items) - 1 if items else 0.0


def detection_format_reward(
    text: str, target: Sequence[Detection], answer_format: AnswerFormat = AnswerFormat.TAGS
) -> float:
    """1 for a text in the answer format and nothing else, whose answer is exactly a list or "None"; else 0."""
    return float(answer_format.is_followed(text) and is_exact_detections(answer_format.extract(text) or ""))


def weighted_sum_reward(
    text: str, target: Sequence[Detection], answer_format: AnswerFormat = AnswerFormat.TAGS
) -> float:
    """0.7 · (sum of overlaps of rightly labelled pairs / true boxes) + 0.3 · (1 - (misses + false alarms) / 2).

    Pairs are formed greedily at IoU 0.5 among boxes with true labels. Boxes with other labels are false alarms. Misses
    and false alarms are shares of the true and of the answered boxes. An answer without boxes scores 0 if there are
    true ones.
    """
    answered = parse_detected_answer(text, answer_format)
    given, wanted = countable(answered or (), target)
    if not given or not wanted:
        return float(answered is not None and not given and not wanted)
    overlaps = pairwise_iou(_boxes(given), _boxes(wanted))
    overlaps[~np.isin([one.label for one in given], [one.label for one in wanted])] = 0  # nobody asked for these
    pairs = greedy_pairs(overlaps)
    position = sum(overlaps[a, t] for a, t in pairs if given[a].label == wanted[t].label) / len(wanted)
    missed, false = 1 - len(pairs) / len(wanted), 1 - len(pairs) / len(given)
    return float(0.7 * position + 0.3 * (1 - (missed + false) / 2))


def detection_giou_reward(
    text: str, target: Sequence[Detection], answer_format: AnswerFormat = AnswerFormat.TAGS
) -> float:
    """Sum of (1 + generalised IoU) / 2 over boxes matched within their labels, by the greater number of boxes.

    In [0, 1]. Boxes are matched one to one; missed boxes and boxes beside the true ones count as 0.
    """
    return _mean_of_pairs(parse_detected_answer(text, answer_format), target, _scaled_gious)


def detection_dynamic_iou_reward(
    text: str,
    target: Sequence[Detection],
    answer_format: AnswerFormat = AnswerFormat.TAGS,
    progress: float = 1.0,
) -> float:
    """As `detection_giou_reward`, of IoUs that reach `least_iou` (V-Triune, arXiv 2505.18129).

    Args:
        text: A completion.
        target: The true boxes in the coordinates that the prompt asks for.
        answer_format: How the completion sets its answer apart.
        progress: Part of the training steps that are done, in [0, 1].
    """
    least = least_iou(progress)

    def counted(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
        overlaps = pairwise_iou(a, b)
        return np.where(overlaps >= least, overlaps, 0.0)

    return _mean_of_pairs(parse_detected_answer(text, answer_format), target, counted)


def _scaled_gious(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """(1 + generalised IoU) / 2 of boxes [A, 4] and [B, 4]."""
    overlaps = pairwise_iou(a, b)
    hulls = np.maximum(a[:, None, 2:], b[:, 2:]) - np.minimum(a[:, None, :2], b[:, :2])
    hull = hulls[..., 0] * hulls[..., 1]
    union = (_areas(a)[:, None] + _areas(b)) / (1 + overlaps)
    scaled: NDArray[np.float64] = (1 + overlaps - (hull - union) / hull) / 2
    return scaled


def _mean_of_pairs(
    answered: Sequence[Detection] | None,
    target: Sequence[Detection],
    measure: Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]],
) -> float:
    """The greatest sum of a measure over pairs of boxes with the same label, by the greater number of boxes."""
    if answered is None:
        return 0.0
    given, wanted = countable(answered, target)
    if not given or not wanted:
        return float(not given and not wanted)
    given, wanted = folded(given), folded(wanted)
    most, first = max(len(given), len(wanted)), given[:MOST_MATCHED]
    values = measure(_boxes(first), _boxes(wanted))
    values[np.array([one.label for one in first])[:, None] != np.array([one.label for one in wanted])] = 0
    return float(sum(values[pair] for pair in best_pairs(values))) / most


def count_boxes(answered: Sequence[Detection], target: Sequence[Detection]) -> dict[str, float]:
    """The numbers of answered boxes, of true boxes, and of matches by `match_greedily`."""
    given, wanted = countable(answered, target)
    counts = {"matched": match_greedily(given, wanted), "answered": len(given), "true": len(wanted)}
    return {f"boxes/{name}": float(count) for name, count in counts.items()}


def match_greedily(answered: Sequence[Detection], target: Sequence[Detection]) -> int:
    """Number of answered boxes that can be paired with a true one of their label at IoU 0.5, best overlaps first."""
    answered, target = folded(answered), folded(target)
    labels = {one.label for one in target}
    return sum(len(greedy_pairs(pairwise_iou(_boxes(answered, label), _boxes(target, label)))) for label in labels)


def greedy_pairs(overlaps: NDArray[np.float64], threshold: float = 0.5) -> list[tuple[int, int]]:
    """Pairs (row, column) of overlaps [A, B] of at least the threshold, the best first, none used twice."""
    left, pairs = overlaps.copy(), []
    while left.size and left.max() >= threshold:
        row, column = divmod(int(left.argmax()), left.shape[1])
        left[row], left[:, column] = -1, -1
        pairs.append((row, column))
    return pairs


def average_precision(
    answered: NDArray[np.float64],
    target: NDArray[np.float64],
    thresholds: NDArray[np.float64] = IOU_THRESHOLDS,
    *,
    scores: NDArray[np.float64] | None = None,
    crowd: NDArray[np.bool_] | None = None,
) -> float:
    """COCO's average precision for one label in one image, averaged over IoU thresholds.

    Equal to what pycocotools' `COCOeval` accumulates over a data set of this one image and label.

    Args:
        answered: Boxes [D, 4].
        target: True boxes [G, 4].
        thresholds: [T], ascending, at most ten.
        scores: [D]. Default: all equal, so that the order decides.
        crowd: [G], regions in which answers count neither way. Default: none.

    Returns:
        A number in [0, 1], or NaN if there is no true box outside crowds.
    """
    count = len(target) if crowd is None else int((~crowd).sum())
    if count == 0:
        return float("nan")
    if scores is not None:
        answered = answered[np.argsort(-scores, kind="stable")]
    overlaps = pairwise_iou(answered[:MAX_DETECTIONS], target, crowd)
    hits, misses = _match(overlaps, thresholds, crowd)
    tp, fp = hits.cumsum(axis=1), misses.cumsum(axis=1)
    precision = tp / (tp + fp + _TINY)
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    return _mean_at_recalls(tp, precision, count)


def pairwise_iou(
    a: NDArray[np.float64], b: NDArray[np.float64], crowd: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """Overlaps [A, B] of boxes [A, 4] and [B, 4]; against a crowd, the share of the first box inside it."""
    low = np.maximum(a[:, None, :2], b[:, :2])
    sides = np.maximum(np.minimum(a[:, None, 2:], b[:, 2:]) - low, 0)
    inside = sides[..., 0] * sides[..., 1]
    area_a, area_b = _areas(a)[:, None], _areas(b)
    whole = area_a + area_b - inside if crowd is None else np.where(crowd, area_a, area_a + area_b - inside)
    overlaps: NDArray[np.float64] = inside / whole
    return overlaps


def _areas(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    areas: NDArray[np.float64] = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return areas


def _match(
    overlaps: NDArray[np.float64], thresholds: NDArray[np.float64], crowd: NDArray[np.bool_] | None
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """COCO's matching: in order, each answer takes the best free true box, or else a crowd.

    Returns:
        Hits and misses, [T, D] each; answers that a crowd took are neither.
    """
    fits = overlaps[:, None] >= np.minimum(thresholds, 1 - 1e-10)[:, None]  # [D, T, G]
    hits = np.zeros((len(thresholds), len(overlaps)), dtype=np.bool_)
    free = np.ones(fits.shape[1:], dtype=np.bool_)
    if crowd is not None:
        free[:, crowd] = False
    last = overlaps.shape[1] - 1
    for d in np.flatnonzero(fits[:, 0].any(axis=1)):  # those that fit at the least threshold
        own = np.where(fits[d] & free, overlaps[d], -1.0)
        best = last - own[:, ::-1].argmax(axis=1)  # of equals the last, as in COCO
        found = np.flatnonzero(own[_ROWS[: len(own)], best] >= 0)
        free[found, best[found]] = False
        hits[found, d] = True
    misses = ~hits
    if crowd is not None:
        misses &= ~(fits & crowd).any(axis=2).T
    return hits, misses


def _mean_at_recalls(tp: NDArray[np.int64], precision: NDArray[np.float64], count: int) -> float:
    """Mean of the precision [T, D] at COCO's 101 recalls, `tp / count`; 0 beyond the greatest recall."""
    wanted = np.searchsorted(np.arange(count + 1) / count, _RECALLS, side="left")  # true positives for each recall
    step = _ROWS[: len(tp), None] * (count + 1)  # makes of all rows a single ascending one
    places = np.searchsorted((tp + step).ravel(), (wanted + step).ravel(), side="left").reshape(len(tp), -1)
    padded = np.concatenate([precision, np.zeros((len(tp), 1))], axis=1)
    found = padded[_ROWS[: len(tp), None], places - _ROWS[: len(tp), None] * tp.shape[1]]
    return float(found.mean())


def _mean_ap(
    answered: Sequence[Detection] | None, target: Sequence[Detection], thresholds: NDArray[np.float64]
) -> float:
    if answered is None:
        return 0.0
    given, wanted = countable(answered, target)
    if not wanted:
        return float(not given)
    answered, target = folded(answered), folded(target)
    labels = {one.label for one in wanted}
    extra = {one.label for one in given} - labels
    scores = [_label_ap(answered, target, label, thresholds) for label in labels]
    return float(np.sum(scores)) / (len(labels) + len(extra))


def _label_ap(
    answered: Sequence[Detection], target: Sequence[Detection], label: str, thresholds: NDArray[np.float64]
) -> float:
    crowd = np.array([one.crowd for one in target if one.label == label])
    boxes = _boxes(answered, label), _boxes(target, label)
    return average_precision(*boxes, thresholds, crowd=crowd if crowd.any() else None)


def _boxes(detections: Sequence[Detection], label: str | None = None) -> NDArray[np.float64]:
    """Boxes [D, 4] of the detections, or of those with a label."""
    chosen: list[Box] = [one.box for one in detections if label in (None, one.label)]
    return np.array(chosen, dtype=np.float64).reshape(-1, 4)


def _six_grams(text: str) -> list[tuple[str, ...]]:
    words = text[:100_000].lower().split()
    return [tuple(words[i : i + 6]) for i in range(len(words) - 5)]


TERMS: Final[Mapping[str, RewardTerm]] = {
    "od_length": od_length_reward,
    "map": map_reward,
    "map50": map50_reward,
    "weighted_sum": weighted_sum_reward,
    "length": detection_length_reward,
    "repetition": repetition_reward,
    "giou": detection_giou_reward,
    "dynamic_iou": detection_dynamic_iou_reward,
    "format": detection_format_reward,
}
"""The terms of this file by name."""

NAMES_IN_ROWS: Final[Mapping[str, str]] = {
    "odLength": "od_length",
    "od_length": "od_length",
    "map": "map",
    "od_ap": "map",
    "map50": "map50",
    "od_ap50": "map50",
    "weighted_sum": "weighted_sum",
    "giou": "giou",
    "dynamic_iou": "dynamic_iou",
}
"""Names that rows have for the terms, those of VLM-R1 among them."""
