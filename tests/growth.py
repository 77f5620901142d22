"""How the time of computing grows with the size of a task, which a busy machine does not change as it does the clock."""

from __future__ import annotations

import time
from collections.abc import Callable


def growth(task: Callable[[int], object], small: int, factor: int = 8, tries: int = 3) -> float:
    """How many times as long a task takes at `factor` times the size: as many for one in linear time, squared for more.

    The least processor time of some tries counts.
    """
    least = [min(_seconds(task, size) for _ in range(tries)) for size in (small, factor * small)]
    return least[1] / max(least[0], 1e-4)


def _seconds(task: Callable[[int], object], size: int) -> float:
    started = time.thread_time()
    task(size)
    return time.thread_time() - started
