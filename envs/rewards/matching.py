"""Matches answers with truths one to one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def best_pairs(values: NDArray[np.float64]) -> list[tuple[int, int]]:
    """Pairs (row, column), none used twice, with the greatest sum of values [A, B] (the Hungarian method)."""
    from scipy.optimize import linear_sum_assignment  # takes a while to import, and not all tasks need it

    rows, columns = linear_sum_assignment(values, maximize=True)
    return list(zip(rows.tolist(), columns.tolist(), strict=True))
