"""What the algorithms know of an agent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vlmenv.core.rollout import Observations, Rollout


@dataclass(slots=True)
class LogProbs:
    """Log-probabilities of the tokens of N completions, padded to the longest, L."""

    values: Tensor
    """[N, L], of the distribution that is sampled from; 0 where padded"""
    entropy: Tensor
    """[N, L], in nats, without gradient; 0 where padded"""
    mask: Tensor
    """[N, L] bool, True at the completions' tokens"""


class Agent(ABC):
    """A policy over free-text answers.

    Attributes:
        policy: The module that is trained. Its `forward` takes a `Rollout` and gives its `LogProbs`,
            so that it may be wrapped for distributed training and put back.
    """

    policy: nn.Module

    @abstractmethod
    def act(self, observations: Observations) -> list[str]:
        """Answers each observation greedily."""

    @abstractmethod
    def rollout(self, observations: Observations) -> Rollout:
        """Samples an answer to each observation. Neighbouring copies of one observation share its prompt.

        Raises:
            PromptError: A prompt leaves no room for the answer, or cannot be encoded.
        """

    @abstractmethod
    def frozen_copy(self) -> Agent:
        """An independent copy without gradients, as a reference for the KL penalty."""

    @abstractmethod
    def seed(self, seed: int) -> None:
        """Makes sampling repeatable."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes the weights and the processor in the published checkpoint layout."""

    def logprobs(self, rollout: Rollout) -> LogProbs:
        """Log-probabilities of a rollout's completions under the present weights, with gradient."""
        result = self.policy(rollout)
        assert isinstance(result, LogProbs)
        return result

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that are trained."""
        return [parameter for parameter in self.policy.parameters() if parameter.requires_grad]

    @property
    def device(self) -> torch.device:
        """Where the policy's weights are."""
        return next(self.policy.parameters()).device
