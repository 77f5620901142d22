"""Trials of faster ways to compute, each against the way that it replaces."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor


class Trial(NamedTuple):
    """The result of a trial."""

    fault: str
    """why the faster way is not taken; empty if it is right"""
    difference: float = math.nan
    """largest difference of its results; see `largest_difference`. NaN if it has none"""


def largest_difference(found: Iterable[Tensor], right: Iterable[Tensor]) -> float:
    """The largest difference of tensors from the right ones, as a share of each one's largest number."""
    return max(_share(a, b) for a, b in zip(found, right, strict=True))


def _share(found: Tensor, right: Tensor) -> float:
    wide = right.double()
    return float((found.double() - wide).abs().max() / (wide.abs().max() or 1))


def kind_of(error: Exception) -> str:
    """An error in a line: its class and the first line of its message."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
