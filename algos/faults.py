"""Non-finite gradients, losses and weights."""

from __future__ import annotations

from torch import Tensor, nn

from vlmenv.algos.batch import Batch, Rollouts
from vlmenv.core.errors import TrainingError
from vlmenv.processes.failures import FAILED_ON_ALL_RANKS


class NonFiniteError(TrainingError):
    """Gradients or losses were not finite in too many optimizer steps in a row, on all ranks.

    Attributes:
        step: Number of the unfinished step, counted from 1.
        rollouts: Completions of this rank in the last of these optimizer steps.
        batch: The same completions as tensors, with advantages.
        logprobs: [N, L], their log-probabilities under the present weights.
        gradients: Names of the parameters with non-finite gradients.
        weights: Names of the parameters with non-finite values.
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
        self.add_note(FAILED_ON_ALL_RANKS)


def nonfinite_weights(policy: nn.Module) -> list[str]:
    """Names of the parameters with non-finite values."""
    named = policy.named_parameters()
    return [name.removeprefix("module.") for name, weight in named if not weight.isfinite().all()]


def nonfinite_gradients(policy: nn.Module) -> list[str]:
    """Names of the parameters with non-finite gradients."""
    named = [(name, weight.grad) for name, weight in policy.named_parameters()]
    return [name.removeprefix("module.") for name, grad in named if grad is not None and not grad.isfinite().all()]
