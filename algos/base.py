"""What an algorithm is to the trainer: credit assignment and a loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmenv.algos.losses import Aggregation
from vlmenv.core.errors import require_at_least


@dataclass(frozen=True)
class AlgorithmConfig:
    """Options of every algorithm."""

    group_size: int = 8
    """G: completions of each prompt."""
    mu: int = 1
    """Passes over each batch of completions."""
    minibatches: int = 1
    """Parts of a batch, each an optimiser step; every pass divides the groups anew."""

    def __post_init__(self) -> None:
        require_at_least(1, group_size=self.group_size, mu=self.mu, minibatches=self.minibatches)


@dataclass(slots=True)
class Scored:
    """A batch of N completions of up to L tokens in this process, before any update."""

    rewards: Tensor
    """[N], the members of a group next to one another"""
    mask: Tensor
    """[N, L] bool, True at the completions' tokens"""
    old_logprobs: Tensor
    """[N, L], of the policy before the update"""
    ref_logprobs: Tensor | None
    """[N, L], of the reference policy; None where the algorithm wants none"""
    values: Tensor | None
    """[N, L], of the critic; None where the algorithm has none"""
    truncated: Tensor
    """[N] bool, whether the limit cut the completion off"""
    max_tokens: int
    """the most tokens that a completion may have"""
    gather: Callable[[Tensor], Tensor]
    """concatenates a tensor's rows over all processes"""
    total: Callable[[Tensor], Tensor]
    """adds a tensor up over all processes"""


@dataclass(slots=True)
class Credit:
    """What each token is to be pushed by."""

    advantages: Tensor
    """[N, L] or [N, 1]"""
    mask: Tensor
    """[N, L] bool, the tokens to learn from"""
    returns: Tensor | None = None
    """[N, L], what the critic is to predict"""


@dataclass(slots=True)
class LossInputs:
    """A micro-batch of N completions of up to L tokens."""

    logprobs: Tensor
    """[N, L], with gradient"""
    old_logprobs: Tensor
    """[N, L], of the policy before the update"""
    advantages: Tensor
    """[N, L] or [N, 1]"""
    mask: Tensor
    """[N, L] bool, the tokens to learn from"""
    weights: Tensor
    """[N, L], by which the loss of the whole batch is the sum of per-token losses; 0 outside the mask"""
    ref_logprobs: Tensor | None = None
    """[N, L], of the reference policy"""
    values: Tensor | None = None
    """[N, L], of the critic, with gradient"""
    old_values: Tensor | None = None
    """[N, L], of the policy before the update"""
    returns: Tensor | None = None
    """[N, L], what the critic is to predict"""


@dataclass(slots=True)
class LossOutput:
    """A loss, and sums over tokens of what is to be logged."""

    loss: Tensor
    """scalar"""
    sums: dict[str, Tensor]
    """scalars without gradient; divided by the tokens of the whole batch they are means per token"""


@torch.no_grad()
def ratio_sums(logratio: Tensor, clipped: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What is logged of importance ratios: the divergence of the old policy from the new (k3), and how much is clipped.

    Args:
        logratio: log pi - log pi_old, [N, L].
        clipped: Where the objective is clipped, bool [N, L].
        mask: [N, L].
    """
    divergence = torch.expm1(logratio) - logratio
    return {
        "policy/approx_kl": divergence[mask].sum(),
        "policy/clip_frac": clipped[mask].float().sum(),
    }


class Algorithm(ABC):
    """One way to learn from scored completions."""

    name: ClassVar[str]
    config: AlgorithmConfig
    aggregation: Aggregation = "token"
    """How per-token losses are averaged."""
    wants_reference: bool = False
    """Whether log-probabilities of the reference policy are needed."""
    wants_values: ClassVar[bool] = False
    """Whether the policy needs a value head."""
    imitates: ClassVar[bool] = False
    """Whether the completions are the true answers, and not the policy's own."""
    most_rounds: int = 1
    """Batches that may be rolled out to find groups whose rewards differ; 1 takes the first as it is."""
    replay: int = 0
    """Groups that are kept to take the place of ones whose rewards do not differ."""

    @abstractmethod
    def credit(self, scored: Scored) -> Credit:
        """Advantages of scored completions."""

    @abstractmethod
    def loss(self, inputs: LossInputs) -> LossOutput:
        """The loss of a micro-batch, such that those of all micro-batches and processes add up to the whole."""
