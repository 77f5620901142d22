"""PPO: proximal policy optimisation with a critic (arXiv 1707.06347)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmenv.algos.advantages import gae, moments, token_rewards, whiten
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
    Estimator,
    clipped_surrogate,
    clipped_value_loss,
    divergence,
    is_bounded,
    is_clipped,
    is_value_clipped,
    token_ratio,
)
from vlmenv.core.errors import require, require_weight


@dataclass(frozen=True)
class PPOConfig(AlgorithmConfig):
    """Hyperparameters of PPO, named as in the papers."""

    minibatches: int = 2
    """Minibatches per pass, each an optimizer step. Every pass divides the groups at random."""
    epsilon: float = 0.2
    """Clip range of the importance ratio: 1 - epsilon to 1 + epsilon."""
    dual_clip: float | None = None
    """Bound, above 1, on the ratio of tokens with a negative advantage (arXiv 1912.09729). Default: no bound."""
    value_epsilon: float = 0.2
    """Clip range of the values around those before the update."""
    value_weight: float = 0.5
    """Weight of the critic's loss, c1."""
    gamma: float = 1.0
    """Discount factor, 0 to 1."""
    lam: float = 1.0
    """Lambda of generalised advantage estimation (arXiv 1506.02438), 0 to 1. Below 1 the first tokens learn little from
    a reward at the end until the critic predicts it (arXiv 2503.01491, section 3)."""
    turn_gamma: float = 1.0
    """Discount factor between the turns of an episode, beside gamma between tokens, 0 to 1."""
    beta: float = 0.0
    """Weight of the KL penalty in the reward. With 0 no reference model is held in memory."""
    kl_estimator: Estimator = "k1"
    """KL estimator of the penalty."""

    def __post_init__(self) -> None:
        AlgorithmConfig.__post_init__(self)
        require(0 < self.epsilon < 1, f"epsilon must lie between 0 and 1, not {self.epsilon}")
        require(self.dual_clip is None or self.dual_clip > 1, "dual_clip must be above 1")
        require(self.value_epsilon > 0, f"value_epsilon must be above 0, not {self.value_epsilon}")
        shares = self.gamma, self.lam, self.turn_gamma
        require(all(0 <= one <= 1 for one in shares), "gamma, lam and turn_gamma must lie between 0 and 1")
        require_weight("value_weight", self.value_weight)
        require_weight("beta", self.beta)


class PPO(Algorithm):
    """PPO with a critic that shares the policy's hidden states."""

    name: ClassVar[str] = "ppo"
    wants_values: ClassVar[bool] = True

    def __init__(self, config: PPOConfig) -> None:
        self.config: PPOConfig = config
        self.wants_reference = self.credits_reference = config.beta > 0

    def credit(self, scored: Scored) -> Credit:
        """Computes generalised advantages, whitened over the batches of all ranks, and the returns for the critic."""
        config, kl = self.config, None
        assert scored.values is not None
        if scored.ref_logprobs is not None:
            kl = divergence(scored.old_logprobs, scored.ref_logprobs, config.kl_estimator)
        rewards = token_rewards(scored.rewards, scored.mask, kl, config.beta, scored.turn_rewards)
        advantages, returns = gae(rewards, scored.values, scored.mask, config.gamma, config.lam, config.turn_gamma)
        stats = scored.total(moments(advantages, scored.mask))
        return Credit(whiten(advantages, scored.mask, stats), scored.mask, returns)

    def loss(self, inputs: LossInputs) -> LossOutput:
        """Computes equations 7 and 9, without the entropy bonus."""
        config, mask = self.config, inputs.mask
        assert inputs.values is not None
        assert inputs.old_values is not None
        assert inputs.returns is not None
        logratio = inputs.logprobs - inputs.old_logprobs
        ratio = token_ratio(logratio)
        policy = clipped_surrogate(ratio, inputs.advantages, config.epsilon, config.epsilon, config.dual_clip)
        critic = clipped_value_loss(inputs.values, inputs.old_values, inputs.returns, config.value_epsilon)
        clipped = is_clipped(ratio, inputs.advantages, config.epsilon, config.epsilon, config.dual_clip)
        value_clipped = is_value_clipped(inputs.values, inputs.old_values, inputs.returns, config.value_epsilon)
        sums = ratio_sums(logratio, clipped, mask) | {
            "value/loss": critic.detach()[mask].sum(),
            "value/clip_frac": value_clipped[mask].float().sum(),
            "value/mean": inputs.values.detach()[mask].sum(),
        }
        if inputs.ref_logprobs is not None and config.kl_estimator == "k3":
            sums["policy/kl_bounded"] = is_bounded(inputs.old_logprobs, inputs.ref_logprobs)[mask].float().sum()
        return LossOutput((inputs.weights * (policy + config.value_weight * critic)).sum(), sums)
