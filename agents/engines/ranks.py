"""Work of engines on several ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import distributed

from vlmenv.core.errors import EngineError

T = TypeVar("T")


def num_processes() -> int:
    """Number of ranks."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def broadcast_from_main(work: Callable[[], T]) -> T:
    """Runs a function on the main rank, after all ranks have arrived, and broadcasts its result.

    Raises:
        EngineError: The function failed; raised on all ranks.
    """
    if num_processes() == 1:
        return work()
    distributed.all_gather_object([None] * num_processes(), None)
    made: list[tuple[T | None, str | None]] = [(None, None)]
    if distributed.get_rank() == 0:
        try:
            made = [(work(), None)]
        except EngineError as error:
            made = [(None, str(error))]
    distributed.broadcast_object_list(made)
    result, fault = made[0]
    if fault is not None:
        raise EngineError(fault)
    return result  # type: ignore[return-value]
