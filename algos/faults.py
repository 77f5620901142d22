"""What ends training before its time: a failure that all processes must know of, gradients that are not finite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from vlmenv.algos.batch import Batch, Rollouts
from vlmenv.core.errors import TrainingError

_TOGETHER: Final = "all processes stopped here"


class NonFiniteError(TrainingError):
    """Gradients or losses that were not finite in too many optimiser steps, one after the other, in all processes.

    Attributes:
        step: The step that they belong to, counted from 1; it was not finished.
        rollouts: What the last of the optimiser steps was to learn from, in this process.
        batch: The same as tensors, with advantages.
        logprobs: Its log-probabilities under the present weights, [N, L].
        gradients: The names of the parameters whose gradients were not finite.
        weights: The names of those that are not finite themselves.
    """

    def __init__(
        self,
        message: str,
        step: int,
        rollouts: Rollouts,
        batch: Batch,
        logprobs: Tensor,
        gradients: list[str],
        weights: list[str],
    ) -> None:
        super().__init__(message)
        self.step, self.rollouts, self.batch, self.logprobs = step, rollouts, batch, logprobs
        self.gradients, self.weights = gradients, weights
        self.add_note(_TOGETHER)


def nonfinite_weights(policy: nn.Module) -> list[str]:
    """The names of the parameters that are not finite."""
    named = policy.named_parameters()
    return [name.removeprefix("module.") for name, weight in named if not weight.isfinite().all()]


def nonfinite_gradients(policy: nn.Module) -> list[str]:
    """The names of the parameters whose gradients are not finite."""
    named = [(name, weight.grad) for name, weight in policy.named_parameters()]
    return [name.removeprefix("module.") for name, grad in named if grad is not None and not grad.isfinite().all()]


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
        failure.add_note(_TOGETHER)
        raise failure


def stopped_together(error: BaseException, accelerator: Accelerator) -> bool:
    """Whether an error ends all processes at the same place, so that they may still work together."""
    return accelerator.num_processes == 1 or _TOGETHER in getattr(error, "__notes__", ())


def _failures(accelerator: Accelerator, failure: Exception | None) -> list[str]:
    """What failed in any of several processes."""
    if accelerator.num_processes == 1:
        return []
    failed = torch.tensor([float(failure is not None)], device=accelerator.device)
    if not cast(Tensor, accelerator.reduce(failed)).item():
        return []
    messages = gather_object([None if failure is None else f"{type(failure).__name__}: {failure}"])
    return [f"process {process}: {message}" for process, message in enumerate(messages) if message is not None]
