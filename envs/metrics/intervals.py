"""95 % intervals of metrics over the rows of a data set, and of paired differences between two measurements.

Proportions have Wilson's score interval, which holds at small counts and at 0 and 1 too (Wilson, JASA 22, 1927). Other
metrics have the percentile bootstrap. Each resample draws as many questions as there are, with replacement, and gives
one value of the metric. The interval has the middle 95 % of these values (Efron and Tibshirani, An Introduction to the
Bootstrap, 1993, chapter 13). It covers other questions of the same kind, not other seeds of a training run. With few
questions it is too narrow. If all rows score alike it has no width.

A difference is of answers to the same questions. For proportions its interval is Newcombe's tenth (Statistics in
Medicine 17, 1998, page 2635), which joins the Wilson intervals of both by their correlation. Otherwise each resample
draws the same questions for both.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES: Final = 1000
_LIMITS: Final = (0.025, 0.975)
_Z: Final = 1.959963984540054
"""The normal quantile of 0.975."""
_FEW: Final = 10
"""Questions with the rarer outcome below which a bootstrap of proportions is too narrow."""


class Interval(NamedTuple):
    """A metric's value and the ends of its 95 % interval; NaN if there are no data for them."""

    value: float
    low: float
    high: float


def ratio_interval(
    numerators: ArrayLike,
    denominators: ArrayLike = 1.0,
    *,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The sum of the numerators over the sum of the denominators; with denominators of 1, the mean.

    Args:
        numerators: [N], one per answer.
        denominators: [N], not negative, or one number for all.
        clusters: [N], the question of each answer. All answers to a question are drawn together. Default: each answer
            has its own question.
        resamples: Number of resamples.
        seed: Seed of the draws. Metrics over the same clusters use the same resamples.

    Returns:
        The ratio with its interval; NaN if the denominators add up to 0. Resamples whose denominators do so are left
        out. With a single question the ends of the interval are NaN.
    """
    rows = _rows(numerators, denominators)
    sums = rows if clusters is None else _sums(rows, number_clusters(clusters))
    draws = bootstrap_draws(sums.shape[1], resamples, seed)
    values = [_ratio(sums.take(drawn, axis=1).sum(axis=1)) for drawn in draws]
    return percentile_interval(_ratio(rows.sum(axis=1)), values)


def metric_interval(
    numerators: ArrayLike, denominators: ArrayLike = 1.0, *, clusters: Sequence[Hashable] | None = None
) -> Interval:
    """The interval of a ratio: Wilson's for a proportion, the bootstrap's otherwise.

    A proportion has only numerators and denominators of 0 and 1. With several answers to a question it has Wilson's
    interval only where the rarer outcome is that of few questions; then their number counts, and not that of answers,
    which makes the interval rather too wide.

    Args:
        numerators: [N], one per answer.
        denominators: [N], or one number for all.
        clusters: [N], the question of each answer. Default: each answer has its own question.
    """
    rows = _rows(numerators, denominators)
    share, questions = _share(rows, clusters)
    if share is None:
        return ratio_interval(numerators, denominators, clusters=clusters)
    is_single = questions == int(rows[1].sum())
    if is_single or min(share, 1 - share) * questions < _FEW:
        return wilson_interval(share * questions, questions)
    return ratio_interval(numerators, denominators, clusters=clusters)


def wilson_interval(hits: float, count: int) -> Interval:
    """Wilson's score interval of a proportion.

    Args:
        hits: Number of successes, 0 to `count`.
        count: Number of independent trials. With 0 all is NaN.
    """
    if not count:
        return Interval(math.nan, math.nan, math.nan)
    share, square = hits / count, _Z**2 / count
    centre = (share + square / 2) / (1 + square)
    half = math.sqrt(square * (share * (1 - share) + square / 4)) / (1 + square)
    return Interval(share, 0.0 if hits == 0 else centre - half, 1.0 if hits == count else centre + half)


def paired_interval(
    before: tuple[ArrayLike, ArrayLike],
    after: tuple[ArrayLike, ArrayLike],
    *,
    clusters: Sequence[Hashable] | None = None,
) -> Interval:
    """The difference of a ratio between two measurements of the same questions, later minus earlier.

    Args:
        before: Numerators and denominators [N], one per answer, as for `ratio_interval`.
        after: Those of the other measurement, in the same order of questions.
        clusters: [N], the question of each answer. Default: each answer has its own question.
    """
    first, second = _rows(*before), _rows(*after)
    shares = [_share(rows, clusters) for rows in (first, second)]
    is_single = clusters is None or len(set(clusters)) == len(clusters)
    if is_single and None not in (shares[0][0], shares[1][0]) and np.array_equal(first[1], second[1]):
        counted = first[1] == 1
        return _newcombe(first[0][counted] == 1, second[0][counted] == 1)
    numbers = number_clusters(range(first.shape[1]) if clusters is None else clusters)
    sums = [_sums(rows, numbers) for rows in (first, second)]
    values = [
        _ratio(sums[1].take(drawn, axis=1).sum(axis=1)) - _ratio(sums[0].take(drawn, axis=1).sum(axis=1))
        for drawn in bootstrap_draws(sums[0].shape[1])
    ]
    return percentile_interval(_ratio(second.sum(axis=1)) - _ratio(first.sum(axis=1)), values)


def _newcombe(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> Interval:
    """Newcombe's tenth interval of the difference of two paired proportions [N]."""
    count = len(before)
    first, second = (wilson_interval(int(one.sum()), count) for one in (before, after))
    if not count:
        return first
    both, neither = int((before & after).sum()), int((~before & ~after).sum())
    lost, won = int((before & ~after).sum()), int((~before & after).sum())
    margins = (both + lost) * (won + neither) * (both + won) * (lost + neither)
    product = both * neither - lost * won
    corrected = max(product - count / 2, 0.0) if product > 0 else float(product)
    phi = corrected / math.sqrt(margins) if margins else 0.0
    below = _hypotenuse(second.value - second.low, first.high - first.value, phi)
    above = _hypotenuse(second.high - second.value, first.value - first.low, phi)
    difference = (won - lost) / count
    return Interval(difference, difference - below, difference + above)


def _hypotenuse(one: float, other: float, correlation: float) -> float:
    return math.sqrt(max(0.0, one**2 - 2 * correlation * one * other + other**2))


def _rows(numerators: ArrayLike, denominators: ArrayLike) -> NDArray[np.float64]:
    """Numerators and denominators [2, N]."""
    return np.stack(np.broadcast_arrays(np.asarray(numerators, dtype=np.float64), denominators)).astype(np.float64)


def _share(rows: NDArray[np.float64], clusters: Sequence[Hashable] | None) -> tuple[float | None, int]:
    """The proportion in rows [2, N], and the number of questions that count; None if they are no proportion."""
    counted = rows[1] == 1
    if not (np.isin(rows, (0, 1)).all() and counted.any()) or rows[0][~counted].any():
        return None, 0
    if clusters is not None and len(clusters) != rows.shape[1]:
        raise ValueError(f"{len(clusters)} clusters for {rows.shape[1]} answers: the lengths differ")
    questions = int(counted.sum()) if clusters is None else len({clusters[i] for i in np.flatnonzero(counted).tolist()})
    return float(rows[0].sum() / counted.sum()), questions


def percentile_interval(value: float, values: ArrayLike, *, centred: bool = False) -> Interval:
    """A metric's value with the middle 95 % of its values in resamples.

    Args:
        value: Value on the data set itself. If it is NaN, so are the ends.
        values: [B], values on the resamples; NaN values are left out.
        centred: If true, values are shifted so that their mean is `value`. This is for a metric whose repetitions in
            resamples raise or lower it.
    """
    found = np.asarray(values, dtype=np.float64)
    found = found[~np.isnan(found)]
    if math.isnan(value) or not len(found):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(found, _LIMITS) + (value - found.mean() if centred else 0.0)
    return Interval(value, float(low), float(high))


def bootstrap_draws(count: int, resamples: int = RESAMPLES, seed: int = 0) -> Iterator[NDArray[np.int64]]:
    """Resamples of `count` questions: the numbers [count] of the drawn ones, in their order.

    With fewer than two questions there are none.
    """
    rng = np.random.default_rng(seed)
    for _ in range(resamples if count > 1 else 0):
        yield rng.integers(count, size=count)


def number_clusters(clusters: Sequence[Hashable]) -> NDArray[np.int64]:
    """The clusters [N] as numbers from 0, in the order in which they first occur."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], dtype=np.int64)


def _sums(rows: NDArray[np.float64], clusters: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sums [2, C] of the rows [2, N] over each cluster."""
    return np.stack([np.bincount(clusters, weights=row) for row in rows])


def _ratio(sums: NDArray[np.float64]) -> float:
    return float(sums[0] / sums[1]) if sums[1] else float("nan")
