"""RLOO: REINFORCE with a leave-one-out baseline (arXiv 2402.14740)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmenv.algos.advantages import leave_one_out
from vlmenv.algos.base import (
    Algorithm,
    AlgorithmConfig,
    Credit,
    LossInputs,
    LossOutput,
    Scored,
    ratio_sums,
)
from vlmenv.algos.losses import (
    Aggregation,
    clipped_surrogate,
    divergence,
    is_clipped,
    is_sequence_bounded,
    sequence_ratio,
)
from vlmenv.core.errors import require, require_weight


@dataclass(frozen=True)
class RLOOConfig(AlgorithmConfig):
    """Hyperparameters of RLOO."""

    epsilon: float = 0.2
    """Clip range of a completion's importance ratio: 1 - epsilon to 1 + epsilon."""
    beta: float = 0.0
    """Weight of the KL penalty in the reward. With 0 no reference model is held in memory."""

    def __post_init__(self) -> None:
        AlgorithmConfig.__post_init__(self)
        require(self.group_size >= 2, f"group_size must be at least 2, not {self.group_size}: a group is compared")
        require(0 < self.epsilon < 1, f"epsilon must lie between 0 and 1, not {self.epsilon}")
        require_weight("beta", self.beta)


class RLOO(Algorithm):
    """RLOO: a completion is one action, and its baseline is the mean reward of the other members of its group."""

    name: ClassVar[str] = "rloo"
    aggregation: Aggregation = "sequence"

    def __init__(self, config: RLOOConfig) -> None:
        self.config: RLOOConfig = config
        self.wants_reference = self.credits_reference = config.beta > 0

    def credit(self, scored: Scored) -> Credit:
        """Computes leave-one-out advantages of the rewards minus `beta` times the KL divergence (section 2.1)."""
        rewards = scored.rewards
        if scored.ref_logprobs is not None:
            kl = divergence(scored.old_logprobs, scored.ref_logprobs, "k1").masked_fill(~scored.mask, 0)
            rewards = rewards - self.config.beta * kl.sum(dim=1)
        return Credit(leave_one_out(rewards, self.config.group_size)[:, None], scored.mask)

    def loss(self, inputs: LossInputs) -> LossOutput:
        """Computes section 2.2 with a completion's importance ratio. At ratio 1 the gradient is REINFORCE's."""
        epsilon, mask = self.config.epsilon, inputs.mask
        logratio = inputs.logprobs - inputs.old_logprobs
        ratio = sequence_ratio(logratio, mask, length_normalised=False)
        per_token = clipped_surrogate(ratio, inputs.advantages, epsilon, epsilon)
        clipped = is_clipped(ratio, inputs.advantages, epsilon, epsilon)
        far = is_sequence_bounded(logratio, mask, length_normalised=False)
        sums = ratio_sums(logratio, clipped, mask, far)
        return LossOutput((inputs.weights * per_token).sum(), sums)
