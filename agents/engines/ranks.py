"""Work that the main rank does for all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import distributed

from vlmenv.core.errors import EngineError, ModelError

T = TypeVar("T")


def num_processes() -> int:
    """Number of ranks."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def broadcast_from_main(work: Callable[[], T]) -> T:
    """Runs a function on the main rank, after all ranks have arrived, and broadcasts its result.

    Raises:
        EngineError: The function failed with it; raised on all ranks.
        ModelError: Likewise.
    """
    if num_processes() == 1:
        return work()
    distributed.all_gather_object([None] * num_processes(), None)
    made: list[tuple[T | None, EngineError | ModelError | None]] = [(None, None)]
    if distributed.get_rank() == 0:
        try:
            made = [(work(), None)]
        except EngineError as error:
            made = [(None, EngineError(str(error)))]
        except ModelError as error:
            made = [(None, ModelError(str(error)))]
    distributed.broadcast_object_list(made)
    result, fault = made[0]
    if fault is not None:
        raise fault
    return result  # type: ignore[return-value]
