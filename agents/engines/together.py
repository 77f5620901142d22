"""What engines of several training processes do together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import distributed

from vlmenv.core.errors import EngineError

T = TypeVar("T")


def num_processes() -> int:
    """Processes that train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def from_main(work: Callable[[], T]) -> T:
    """What comes of some work in the main process, given to all; it begins when all have come to it.

    Raises:
        EngineError: It failed, in all of them.
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
