"""The base class of algorithms: credit assignment and a loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from vlmenv.algos.losses import BOUND, Aggregation, bounded
from vlmenv.core.errors import require_at_least
from vlmenv.core.rollout import Observation, Rollout


@dataclass(frozen=True)
class AlgorithmConfig:
    """Hyperparameters of every algorithm."""

    group_size: int = 8
    """Completions per prompt, G."""
    mu: int = 1
    """Passes over each batch of completions."""
    minibatches: int = 1
    """Minibatches per pass, each an optimizer step. Every pass divides the groups at random."""

    @classmethod
    def shared(cls) -> tuple[str, ...]:
        """The options with one meaning over all algorithms, such as `group_size`, that this one takes from another."""
        return (*(field.name for field in fields(AlgorithmConfig)), *(["beta"] if hasattr(cls, "beta") else []))

    @property
    def equal_rewards_teach(self) -> bool:
        """True if a group whose rewards are equal is not passed over: something else is compared."""
        return False

    def __post_init__(self) -> None:
        require_at_least(1, group_size=self.group_size, mu=self.mu, minibatches=self.minibatches)


class Teacher(Protocol):
    """A teacher elsewhere, such as on a server. A teacher in this process is an agent."""

    def logprobs(self, rollout: Rollout, observations: Sequence[Observation]) -> Tensor:
        """[N, L], the log-probabilities of N completions, which answer the observations; 0 after their ends."""


@dataclass(slots=True)
class Scored:
    """N scored completions of up to L tokens on this rank, before any update."""

    rewards: Tensor
    """float32 [N]; the members of a group are neighbours"""
    mask: Tensor
    """[N, L] bool, True at the completions' tokens"""
    old_logprobs: Tensor
    """[N, L], of the policy before the update"""
    ref_logprobs: Tensor | None
    """[N, L], of the reference policy; None unless `wants_reference`"""
    values: Tensor | None
    """[N, L], of the critic; None unless `wants_values`"""
    truncated: Tensor
    """bool [N], True if the length limit cut the completion off"""
    max_tokens: int
    """length limit of completions, in tokens"""
    gather: Callable[[Tensor], Tensor]
    """concatenates a tensor's rows over all ranks"""
    total: Callable[[Tensor], Tensor]
    """sums a tensor over all ranks"""
    terms: Tensor
    """[N, K], the reward terms, unweighted; NaN where a completion does not have one"""
    term_weights: Tensor
    """[N, K], their weights, with which they sum to the rewards"""
    rng: np.random.Generator
    """random generator of this step on this rank"""
    turn_rewards: Tensor | None = None
    """float32 [N, T], the parts of `rewards` by turn; None if each episode has one"""
    masked_logprobs: Tensor | None = None
    """[N, L], of the policy before the update with masked images; None unless `wants_masked`"""
    teacher_logprobs: Tensor | None = None
    """[N, L], of the teacher; None unless `wants_teacher`"""
    sees: Tensor | None = None
    """bool [N], True if the completion follows images or videos; None unless `wants_masked`"""


@dataclass(slots=True)
class Credit:
    """Per-token advantages."""

    advantages: Tensor
    """[N, L] or [N, 1]"""
    mask: Tensor
    """bool [N, L], True at the tokens to learn from"""
    returns: Tensor | None = None
    """[N, L], targets of the critic"""
    chosen: Tensor | None = None
    """bool [N, L], tokens that the loss treats in a way of their own"""


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
    """bool [N, L], True at the tokens to learn from"""
    weights: Tensor
    """[N, L], weights with which per-token losses sum to the loss of the whole minibatch; 0 outside the mask"""
    ref_logprobs: Tensor | None = None
    """[N, L], of the reference policy"""
    values: Tensor | None = None
    """[N, L], of the critic, with gradient"""
    old_values: Tensor | None = None
    """[N, L], of the critic before the update"""
    returns: Tensor | None = None
    """[N, L], targets of the critic"""
    chosen: Tensor | None = None
    """bool [N, L], tokens that `Credit.chosen` named"""
    entropy: Tensor | None = None
    """[N, L], of the policy at each token, in nats, with gradient"""
    masked_logprobs: Tensor | None = None
    """[N, L], of the policy with masked images, with gradient; None unless `learns_masked`"""


@dataclass(slots=True)
class LossOutput:
    """A loss, and sums over tokens of the metrics to log."""

    loss: Tensor
    """scalar"""
    sums: dict[str, Tensor]
    """scalars without gradient; the trainer divides them by the tokens of the whole minibatch"""


@torch.no_grad()
def ratio_sums(
    logratio: Tensor, clipped: Tensor, mask: Tensor, of_sequences: Tensor | None = None
) -> dict[str, Tensor]:
    """Metrics of the importance ratios.

    They are the KL divergence from the old to the new policy (k3), the share of tokens that are clipped, and the share
    whose log-ratio is so far off that it is bounded before `exp`; see `token_ratio`.

    Args:
        logratio: log pi - log pi_old, [N, L].
        clipped: bool [N, L], True where the objective is clipped.
        mask: bool [N, L].
        of_sequences: bool [N, L], True where the ratio of a whole completion is bounded. Default: nowhere.

    Returns:
        Sums over the tokens at the mask.
    """
    far = logratio.abs() > BOUND
    far = far if of_sequences is None else far | of_sequences
    near = bounded(logratio)
    divergence = torch.expm1(near) - near
    return {
        "policy/approx_kl": divergence[mask].sum(),
        "policy/clip_frac": clipped[mask].float().sum(),
        "policy/bounded": far[mask].float().sum(),
    }


class Algorithm(ABC):
    """An algorithm: how scored completions become a gradient.

    Attributes:
        name: Name in messages.
        config: Hyperparameters.
    """

    name: ClassVar[str]
    config: AlgorithmConfig
    aggregation: Aggregation = "token"
    """Average over per-token losses."""
    wants_reference: bool = False
    """True if `credit` or `loss` needs log-probabilities of the reference policy."""
    credits_reference: bool = False
    """True if `credit` compares the policy's log-probabilities with the reference's."""
    wants_values: ClassVar[bool] = False
    """True if the policy needs a value head."""
    wants_teacher: ClassVar[bool] = False
    """True if `credit` needs log-probabilities of a teacher, another model that `config.teacher` names."""
    wants_masked: ClassVar[bool] = False
    """True if `credit` needs log-probabilities of the policy with masked images."""
    learns_masked: ClassVar[bool] = False
    """True if `loss` needs log-probabilities of the policy with masked images, with gradient."""
    imitates: ClassVar[bool] = False
    """True if the completions are the true answers instead of samples of the policy."""
    most_rounds: int = 1
    """Maximum rounds of rollouts per step to find groups with differing rewards."""
    replay: int = 0
    """Earlier groups to keep, which take the places of groups with equal rewards."""

    @abstractmethod
    def credit(self, scored: Scored) -> Credit:
        """Computes advantages of scored completions, without gradient."""

    @abstractmethod
    def loss(self, inputs: LossInputs) -> LossOutput:
        """Computes the loss of a micro-batch.

        The losses of all micro-batches and ranks must sum to the loss of the minibatch: use `inputs.weights`.
        """
