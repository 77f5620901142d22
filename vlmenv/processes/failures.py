"""A block that fails on one rank fails on all, so that no rank waits for a collective that another never enters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from vlmenv.core.errors import TrainingError

FAILED_ON_ALL_RANKS: Final = "all processes stopped here"
"""Note on an error that all ranks raised at the same place."""


@contextmanager
def shared_failure(accelerator: Accelerator) -> Iterator[None]:
    """Makes a block that fails on one rank fail on all ranks, so that none waits in a later collective.

    A collective: all ranks must enter it. The block itself must contain no collective.

    Raises:
        TrainingError: The block failed on another rank. This rank's own error is raised as it is.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    others = _failures(accelerator, failure)
    if failure is None and others:
        failure = TrainingError(others[0])
    if failure is not None:
        failure.add_note(FAILED_ON_ALL_RANKS)
        raise failure


def failed_on_all_ranks(error: BaseException, accelerator: Accelerator) -> bool:
    """True if all ranks raised the error at the same place, so that collectives still work."""
    return accelerator.num_processes == 1 or FAILED_ON_ALL_RANKS in getattr(error, "__notes__", ())


def _failures(accelerator: Accelerator, failure: Exception | None) -> list[str]:
    """The error messages of all ranks."""
    if accelerator.num_processes == 1:
        return []
    failed = torch.tensor([float(failure is not None)], device=accelerator.device)
    if not cast(Tensor, accelerator.reduce(failed)).item():
        return []
    messages = gather_object([None if failure is None else f"{type(failure).__name__}: {failure}"])
    return [f"rank {process}: {message}" for process, message in enumerate(messages) if message is not None]
