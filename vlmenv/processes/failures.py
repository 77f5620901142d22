"""A block that fails on one rank fails on all, so that no rank waits for a collective that another never enters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from accelerate import Accelerator
from torch import distributed

from vlmenv.core.errors import TrainingError

FAILED_ON_ALL_RANKS: Final = "all processes stopped here"
"""Note on an error that all ranks raised at the same place."""


@contextmanager
def shared_failure(accelerator: Accelerator, group: Any = None) -> Iterator[None]:
    """Makes a block that fails on one rank fail on all ranks, so that none waits in a later collective.

    A collective: all ranks must enter it. The block itself must contain no collective.

    Args:
        accelerator: The ranks.
        group: Process group of the collective, for a thread other than the main one. Default: that of all ranks.

    Raises:
        TrainingError: The block failed on another rank. This rank's own error is raised as it is.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    others = _failures(accelerator, failure, group)
    if failure is None and others:
        failure = TrainingError(others[0])
    if failure is not None:
        failure.add_note(FAILED_ON_ALL_RANKS)
        raise failure


def failed_on_all_ranks(error: BaseException, accelerator: Accelerator) -> bool:
    """True if all ranks raised the error at the same place, so that collectives still work."""
    return accelerator.num_processes == 1 or FAILED_ON_ALL_RANKS in getattr(error, "__notes__", ())


def on_any_rank(flag: bool, accelerator: Accelerator, group: Any = None) -> bool:
    """True if the flag is true on any rank. A collective."""
    if accelerator.num_processes == 1:
        return flag
    found = torch.tensor(float(flag), device=accelerator.device if group is None else "cpu")
    distributed.all_reduce(found, group=group)
    return bool(found.item())


def _failures(accelerator: Accelerator, failure: Exception | None, group: Any) -> list[str]:
    """The error messages of all ranks."""
    if not on_any_rank(failure is not None, accelerator, group) or accelerator.num_processes == 1:
        return []
    messages: list[str | None] = [None] * accelerator.num_processes
    own = None if failure is None else f"{type(failure).__name__}: {failure}"
    distributed.all_gather_object(messages, own, group=group)
    return [f"rank {rank}: {message}" for rank, message in enumerate(messages) if message is not None]
