"""What an algorithm is to the trainer: credit assignment and a loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(slots=True)
class LossInputs:
    """A micro-batch of N completions of up to L tokens."""

    logprobs: Tensor
    """[N, L], with gradient"""
    old_logprobs: Tensor
    """[N, L], at the time of sampling"""
    ref_logprobs: Tensor | None
    """[N, L], of the reference policy; None where the algorithm wants none"""
    advantages: Tensor
    """[N]"""
    mask: Tensor
    """[N, L] bool, True at the completions' tokens"""


@dataclass(slots=True)
class LossOutput:
    """A loss, and sums over tokens of what is to be logged."""

    loss: Tensor
    """scalar"""
    sums: dict[str, Tensor]
    """scalars without gradient; divided by the tokens of the whole batch they are means per token"""


class Algorithm(ABC):
    """One way to learn from scored completions."""

    name: ClassVar[str]
    group_size: int
    """Completions of each prompt."""
    updates_per_rollout: int
    """Optimiser steps on each batch of completions."""
    wants_reference: bool
    """Whether `loss` needs log-probabilities of the reference policy."""

    @abstractmethod
    def advantages(self, rewards: Tensor) -> Tensor:
        """Credit [N] of completions with these rewards [N], groups next to one another."""

    @abstractmethod
    def loss(self, inputs: LossInputs, num_tokens: int) -> LossOutput:
        """The loss of a micro-batch.

        Args:
            inputs: The micro-batch.
            num_tokens: Completion tokens of the whole batch, over all micro-batches and processes: the
                denominator, so that the gradient does not depend on how the batch was cut up.
        """
