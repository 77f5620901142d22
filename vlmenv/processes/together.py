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

STOPPED_TOGETHER: Final = "all processes stopped here"
"""Note on an error that was raised on all ranks at the same place."""


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """Where the block fails in one process, it fails in all: none waits for what another will never send.

    Every process calls this. Within the block none may wait for another.

    Raises:
        TrainingError: It failed in another process. What fails in this one is raised as it is.
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
        failure.add_note(STOPPED_TOGETHER)
        raise failure


def stopped_together(error: BaseException, accelerator: Accelerator) -> bool:
    """Whether an error ends all processes at the same place, so that they may still work together."""
    return accelerator.num_processes == 1 or STOPPED_TOGETHER in getattr(error, "__notes__", ())


def _failures(accelerator: Accelerator, failure: Exception | None) -> list[str]:
    """What failed in any of several processes."""
    if accelerator.num_processes == 1:
        return []
    failed = torch.tensor([float(failure is not None)], device=accelerator.device)
    if not cast(Tensor, accelerator.reduce(failed)).item():
        return []
    messages = gather_object([None if failure is None else f"{type(failure).__name__}: {failure}"])
    return [f"process {process}: {message}" for process, message in enumerate(messages) if message is not None]
