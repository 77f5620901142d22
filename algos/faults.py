"""Gradients, losses and weights that are not finite."""

from __future__ import annotations

from torch import Tensor, nn

from vlmenv.algos.batch import Batch, Rollouts
from vlmenv.core.errors import TrainingError
from vlmenv.processes.together import STOPPED_TOGETHER


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
        self.add_note(STOPPED_TOGETHER)


def nonfinite_weights(policy: nn.Module) -> list[str]:
    """The names of the parameters that are not finite."""
    named = policy.named_parameters()
    return [name.removeprefix("module.") for name, weight in named if not weight.isfinite().all()]


def nonfinite_gradients(policy: nn.Module) -> list[str]:
    """The names of the parameters whose gradients are not finite."""
    named = [(name, weight.grad) for name, weight in policy.named_parameters()]
    return [name.removeprefix("module.") for name, grad in named if grad is not None and not grad.isfinite().all()]
