"""An independent edit distance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table_distance(a: Sequence[Any], b: Sequence[Any]) -> int:
    """The Levenshtein distance by Wagner and Fischer's table."""
    row = list(range(len(b) + 1))
    for i, one in enumerate(a, 1):
        above, row = row, [i]
        for j, other in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (one != other)))
    return row[-1]
