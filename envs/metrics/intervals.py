"""95 % intervals of metrics over the rows of a data set, by the percentile bootstrap.

Each resample draws as many questions as there are, with replacement, and gives one value of the metric. The interval
has the middle 95 % of these values (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). It
covers other questions of the same kind, not other seeds of a training run. With few questions it is too narrow. If all
rows score alike it has no width.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES: Final = 1000
_LIMITS: Final = (0.025, 0.975)


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
    rows = np.stack(np.broadcast_arrays(np.asarray(numerators, dtype=np.float64), denominators))
    sums = rows if clusters is None else _sums(rows, number_clusters(clusters))
    draws = bootstrap_draws(sums.shape[1], resamples, seed)
    values = [_ratio(sums.take(drawn, axis=1).sum(axis=1)) for drawn in draws]
    return percentile_interval(_ratio(rows.sum(axis=1)), values)


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
