"""Means over rows or tokens, which ranks hold in different numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Self

import numpy as np
from torch import Tensor

_EXTREMES: Final[dict[str, Callable[[Any], float]]] = {"completion/min_length": min, "completion/max_length": max}
"""Metrics that are no means, by the end of their names."""


class Mean(float):
    """A mean, or a standard deviation, of a number of values.

    Args:
        value: The mean.
        count: Number of the values, at least 1.
    """

    count: int

    def __new__(cls, value: float, count: int) -> Self:
        made = super().__new__(cls, value)
        made.count = count
        return made

    def __reduce__(self) -> tuple[type[Self], tuple[float, int]]:
        return type(self), (float(self), self.count)


def told_mean(name: str, values: Tensor) -> dict[str, float]:
    """The mean of values by its logged name; nothing without values."""
    return {name: Mean(float(values.mean()), values.numel())} if values.numel() else {}


def over_ranks(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metrics over the values of all ranks together.

    Each `Mean` weighs by its count, and another number by 1. Ranks without a metric are left out of it. `reward/std` is
    the deviation from the mean over all ranks. Minima and maxima are those of all ranks.

    Args:
        metrics: By rank, numbers by their logged names. A `reward/std` has a `reward/mean` beside it.
    """
    if len(metrics) == 1:
        return {name: float(value) for name, value in metrics[0].items()}
    names = dict.fromkeys(name for own in metrics for name in own)  # a term may be in the rows of one rank only
    return {name: _over(name, [own for own in metrics if name in own]) for name in names}


def _over(name: str, metrics: Sequence[Mapping[str, float]]) -> float:
    """One metric over the ranks that have it."""
    values = np.array([own[name] for own in metrics], np.float64)
    counts = [getattr(own[name], "count", 1) for own in metrics]
    kind = "/".join(name.split("/")[-2:])  # without the task of a mix
    if kind in _EXTREMES:
        return float(_EXTREMES[kind](values))
    if kind == "reward/std":
        means = np.array([own[f"{name.removesuffix('std')}mean"] for own in metrics], np.float64)
        distances = means - np.average(means, weights=counts)
        return math.sqrt(np.average(values**2 + distances**2, weights=counts))
    return float(np.average(values, weights=counts))
