"""REINFORCE++: REINFORCE with advantages normalised over the whole batch (arXiv 2501.03262)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmenv.algos.advantages import moments, reinforce_plus_plus, whiten
from vlmenv.algos.base import (
    Algorithm,
    AlgorithmConfig,
    Credit,
    LossInputs,
    LossOutput,
    Scored,
    ratio_sums,
)
from vlmenv.algos.losses import clipped_surrogate, divergence, is_clipped, token_ratio
from vlmenv.core.errors import require, require_weight


@dataclass(frozen=True)
class ReinforcePlusPlusConfig(AlgorithmConfig):
    """Hyperparameters of REINFORCE++."""

    baseline: bool = False
    """Baseline variant: subtracts the group's mean reward, and puts the KL penalty (k2) into the loss."""
    epsilon: float = 0.2
    """Clip range of the importance ratio: 1 - epsilon to 1 + epsilon."""
    gamma: float = 1.0
    """Discount factor, 0 to 1."""
    beta: float = 0.0
    """Weight of the KL penalty. With 0 no reference model is held in memory."""

    def __post_init__(self) -> None:
        AlgorithmConfig.__post_init__(self)
        require(self.group_size >= 1 + self.baseline, "group_size must be at least 2 with baseline")
        require(0 < self.epsilon < 1, f"epsilon must lie between 0 and 1, not {self.epsilon}")
        require(0 <= self.gamma <= 1, f"gamma must lie between 0 and 1, not {self.gamma}")
        require_weight("beta", self.beta)


class ReinforcePlusPlus(Algorithm):
    """REINFORCE++: per-token returns, whitened over all tokens of the batch. There is no critic."""

    name: ClassVar[str] = "reinforce++"

    def __init__(self, config: ReinforcePlusPlusConfig) -> None:
        self.config: ReinforcePlusPlusConfig = config
        self.wants_reference = config.beta > 0
        self.credits_reference = self.wants_reference and not config.baseline

    def credit(self, scored: Scored) -> Credit:
        """Computes equations 4 and 5; with a baseline, 6 and 7."""
        config, kl = self.config, None
        if scored.ref_logprobs is not None and not config.baseline:
            kl = divergence(scored.old_logprobs, scored.ref_logprobs, "k1")
        group_size = config.group_size if config.baseline else None
        returns = reinforce_plus_plus(scored.rewards, scored.mask, kl, config.beta, config.gamma, group_size)
        advantages = whiten(returns, scored.mask, scored.total(moments(returns, scored.mask)))
        return Credit(advantages, scored.mask)

    def loss(self, inputs: LossInputs) -> LossOutput:
        """Computes PPO's clipped objective; with a baseline, plus `beta` times the KL divergence (equation 8)."""
        config, mask = self.config, inputs.mask
        logratio = inputs.logprobs - inputs.old_logprobs
        ratio = token_ratio(logratio)
        per_token = clipped_surrogate(ratio, inputs.advantages, config.epsilon, config.epsilon)
        clipped = is_clipped(ratio, inputs.advantages, config.epsilon, config.epsilon)
        sums = ratio_sums(logratio, clipped, mask)
        if inputs.ref_logprobs is not None:
            kl = divergence(inputs.logprobs, inputs.ref_logprobs, "k2")
            sums["policy/kl"] = kl.detach()[mask].sum()
            per_token = per_token + config.beta * kl if config.baseline else per_token
        return LossOutput((inputs.weights * per_token).sum(), sums)
