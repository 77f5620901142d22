"""GRPO: group relative policy optimisation (DeepSeekMath, arXiv 2402.03300), and its published variants."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

import torch
from torch import Tensor

from vlmenv.algos.advantages import Scale, group_relative, longest_turns, overlong_penalty, term_relative
from vlmenv.algos.base import (
    Algorithm,
    Credit,
    LossInputs,
    LossOutput,
    Scored,
    ratio_sums,
)
from vlmenv.algos.entropy import EntropyConfig, chosen_tokens
from vlmenv.algos.losses import (
    Aggregation,
    Estimator,
    cispo,
    clip_logs,
    clipped_surrogate,
    divergence,
    geometric_mean_ratio,
    is_bounded,
    is_clipped,
    is_sequence_bounded,
    is_weight_clipped,
    sapo,
    sequence_ratio,
    token_ratio,
)
from vlmenv.core.errors import require, require_at_least, require_weight


@dataclass(frozen=True)
class GRPOConfig(EntropyConfig):
    """Hyperparameters of GRPO, named as in the papers."""

    epsilon: float = 0.2
    """Clip range of the importance ratio: 1 - epsilon to 1 + epsilon."""
    epsilon_high: float | None = None
    """Upper clip range, 1 + epsilon_high ("clip higher", DAPO). Default: epsilon."""
    dual_clip: float | None = None
    """Bound, above 1, on the ratio of tokens with a negative advantage (arXiv 1912.09729). Default: no bound."""
    beta: float = 0.0
    """Weight of the KL penalty in the loss. With 0 no reference model is held in memory."""
    kl_estimator: Estimator = "k3"
    """KL estimator of the penalty."""
    scale: Scale = "group"
    """Standard deviation that divides the advantages: the group's, the batch's, or none (Dr. GRPO)."""
    aggregation: Aggregation = "token"
    """Average of the loss: over tokens (DAPO), over completions of their means (the paper), or by a constant."""
    ratio: Literal["token", "sequence"] = "token"
    """Importance ratio: per token, or per sequence (GSPO)."""
    objective: Literal["clip", "cispo", "sapo", "gmpo"] = "clip"
    """Objective: PPO's clipped one, REINFORCE with clipped importance weights (CISPO), a soft gate in place of the clip
    range (SAPO), or the geometric mean of clipped ratios (GMPO), where epsilon is a range of log-ratios."""
    tau_positive: float = 1.0
    """Temperature of SAPO's gate for positive advantages. A larger one lets the gradient fade faster."""
    tau_negative: float = 1.05
    """Temperature of SAPO's gate for negative advantages."""
    per_term: bool = False
    """Advantages per reward term (GDPO): each term is normalised within its group before the weighted sum, which is
    normalised over the batch."""
    mask_truncated: bool = False
    """Mask of truncated completions: if true, they give no gradient."""
    overlong_share: float = 0.0
    """Share of the length limit, at its end, over which the reward falls by up to 1 (DAPO's soft punishment)."""
    most_rounds: int = 1
    """Maximum rounds of rollouts to fill a batch with groups of differing rewards (DAPO's dynamic sampling)."""

    replay: int = 0
    """Groups kept for selective sample replay (arXiv 2504.08837). They replace groups with equal rewards, and are drawn
    by the size of their advantages."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.group_size >= 2, f"group_size must be at least 2, not {self.group_size}: a group is compared")
        low = 0 < self.epsilon < 1 or (self.objective == "cispo" and self.epsilon == 1)
        low = low or (self.objective == "gmpo" and 0 < self.epsilon < math.inf)
        require(low, f"epsilon must lie between 0 and 1 (for cispo it may be 1, for gmpo more), not {self.epsilon}")
        require(self.epsilon_high is None or self.epsilon_high > 0, "epsilon_high must be above 0")
        require(self.dual_clip is None or self.dual_clip > 1, "dual_clip must be above 1")
        plain = self.dual_clip is None and self.ratio == "token"
        require(self.objective == "clip" or plain, f"{self.objective} has neither dual_clip nor a ratio of sequences")
        self._check_gate()
        self._check_control()
        self._check_terms()
        require(0 <= self.overlong_share < 1, "overlong_share must be a share of the limit, from 0 to below 1")
        require_at_least(1, most_rounds=self.most_rounds)
        require_at_least(0, replay=self.replay)
        require_weight("beta", self.beta)

    @property
    def equal_rewards_teach(self) -> bool:
        """True if the terms of equal rewards may differ, and are compared."""
        return self.per_term

    def _check_gate(self) -> None:
        """Raises ConfigError if options of SAPO's gate are out of range, or have no use."""
        taus = self.tau_positive, self.tau_negative
        require(all(0 < tau < math.inf for tau in taus), f"tau_positive and tau_negative must be above 0, not {taus}")
        if self.objective == "sapo":
            clips = self.epsilon != GRPOConfig.epsilon or self.epsilon_high is not None
            require(not clips, "sapo has no clip range: leave out epsilon and epsilon_high, or change tau_positive")
        else:
            given = taus != (GRPOConfig.tau_positive, GRPOConfig.tau_negative)
            require(not given, f"tau_positive and tau_negative go with objective sapo, not with {self.objective}")

    def _check_control(self) -> None:
        """Raises ConfigError if options do not go with entropy control, which singles tokens out.

        The penalty of KL-Cov takes the place of the clip range.
        """
        if self.entropy_control == "clip_cov":
            by_token = self.objective != "gmpo" and self.ratio == "token"
            require(
                by_token,
                "clip_cov takes single tokens' gradients: it goes with ratio token, and not with objective gmpo",
            )
        if self.entropy_control == "kl_cov":
            clips = self.epsilon != GRPOConfig.epsilon or self.epsilon_high is not None or self.dual_clip is not None
            plain = self.objective == "clip" and self.ratio == "token" and not clips
            require(plain, "kl_cov has no clip range: it goes with objective clip and ratio token, without epsilon")

    def _check_terms(self) -> None:
        """Raises ConfigError if options do not go with advantages per term."""
        if self.per_term:
            require(self.scale == "group", f"per_term goes with scale group, not with {self.scale}")
            whole = self.most_rounds > 1 or self.replay > 0
            require(not whole, "per_term goes with neither most_rounds nor replay, which compare whole rewards")


def check_by_token(config: GRPOConfig, name: str) -> None:
    """Raises ConfigError if an algorithm with advantages of tokens has ratios of whole completions."""
    has = f"{name} has advantages of tokens, which"
    require(config.objective != "gmpo", f"{has} gmpo's geometric mean does not take")
    require(config.ratio == "token", f"{has} do not go with a ratio of sequences")


PRESETS: Final[dict[str, GRPOConfig]] = {
    "grpo": GRPOConfig(),
    # arXiv 2503.20783: no division by the deviation, none by the length.
    "dr_grpo": GRPOConfig(scale="none", aggregation="constant"),
    # arXiv 2503.14476: its four techniques, and completions that were cut off left out.
    "dapo": GRPOConfig(epsilon_high=0.28, mask_truncated=True, overlong_share=0.2, most_rounds=4),
    # arXiv 2507.18071, section 5.1.
    "gspo": GRPOConfig(ratio="sequence", epsilon=3e-4, epsilon_high=4e-4, aggregation="sequence"),
    # arXiv 2506.13585: no lower bound; weights of up to 5, as in arXiv 2510.13786.
    "cispo": GRPOConfig(objective="cispo", epsilon=1.0, epsilon_high=4.0),
    # arXiv 2511.20347: the mean over completions of the means over their tokens.
    "sapo": GRPOConfig(objective="sapo", aggregation="sequence"),
    # arXiv 2507.20673: clip range e^-0.4 to e^0.4.
    "gmpo": GRPOConfig(objective="gmpo", aggregation="sequence", epsilon=0.4),
    # arXiv 2601.05242.
    "gdpo": GRPOConfig(per_term=True),
}
"""Hyperparameters of each published variant."""


class GRPO(Algorithm):
    """GRPO: advantages compare a completion's reward with its group. There is no critic."""

    name: ClassVar[str] = "grpo"

    def __init__(self, config: GRPOConfig) -> None:
        self.config: GRPOConfig = config
        self.aggregation = config.aggregation
        self.wants_reference = config.beta > 0
        self.most_rounds, self.replay = config.most_rounds, config.replay

    def credit(self, scored: Scored) -> Credit:
        """Computes advantages, and which tokens to learn from."""
        mask = scored.mask & ~scored.truncated[:, None] if self.config.mask_truncated else scored.mask
        advantages = self.advantages(scored)
        return Credit(advantages, mask, chosen=chosen_tokens(self.config, scored, advantages, mask))

    def advantages(self, scored: Scored) -> Tensor:
        """Computes one advantage per completion, [N, 1], from the rewards and the soft punishment of length."""
        config, size = self.config, self.config.group_size
        penalty = torch.zeros_like(scored.rewards)
        if config.overlong_share:
            buffer = max(1, round(config.overlong_share * scored.max_tokens))
            penalty = overlong_penalty(longest_turns(scored.mask), scored.max_tokens, buffer)
        if config.per_term:
            terms = torch.cat([scored.terms, penalty[:, None]], dim=1)
            weights = torch.cat([scored.term_weights, torch.ones_like(penalty)[:, None]], dim=1)
            return term_relative(terms, weights, size, scored.gather)[:, None]
        rewards = scored.rewards + penalty
        everyone = scored.gather(rewards) if config.scale == "batch" else None
        return group_relative(rewards, size, config.scale, batch=everyone)[:, None]

    def loss(self, inputs: LossInputs) -> LossOutput:
        """Computes equation 3 of the paper, averaged by `aggregation`."""
        config, mask = self.config, inputs.mask
        logratio = inputs.logprobs - inputs.old_logprobs
        per_token, clipped = self._surrogate(inputs, logratio)
        sums = ratio_sums(logratio, clipped, mask, self._bounds(inputs, logratio))
        if inputs.chosen is not None:
            penalty = config.cov_weight * logratio.abs() if config.entropy_control == "kl_cov" else -per_token
            per_token = per_token + penalty.where(inputs.chosen, 0)
            sums["policy/chosen"] = inputs.chosen[mask].float().sum()
        if config.entropy_bonus:
            assert inputs.entropy is not None
            per_token = per_token - config.entropy_bonus * inputs.entropy
        if inputs.ref_logprobs is not None:
            kl = divergence(inputs.logprobs, inputs.ref_logprobs, config.kl_estimator)
            per_token = per_token + config.beta * kl
            sums["policy/kl"] = kl.detach()[mask].sum()
            if config.kl_estimator == "k3":
                sums["policy/kl_bounded"] = is_bounded(inputs.logprobs, inputs.ref_logprobs)[mask].float().sum()
        return LossOutput((inputs.weights * per_token).sum(), sums)

    def _bounds(self, inputs: LossInputs, logratio: Tensor) -> Tensor | None:
        """Where the ratio of a whole completion is bounded, bool [N, L]; None for ratios of tokens."""
        if self.config.objective == "gmpo":
            logratio = clip_logs(logratio, inputs.advantages, *self._clip_range)
        elif self.config.ratio == "token":
            return None
        return is_sequence_bounded(logratio, inputs.mask)

    @property
    def _clip_range(self) -> tuple[float, float]:
        config = self.config
        return config.epsilon, config.epsilon if config.epsilon_high is None else config.epsilon_high

    def _surrogate(self, inputs: LossInputs, logratio: Tensor) -> tuple[Tensor, Tensor]:
        """The objective's loss, and where it is clipped: [N, L] and bool [N, L]."""
        config, advantages, ratio = self.config, inputs.advantages, token_ratio(logratio)
        low, high = self._clip_range
        if config.objective == "cispo":
            return cispo(inputs.logprobs, ratio, advantages, low, high), is_weight_clipped(ratio, low, high)
        if config.objective == "sapo":
            gated = sapo(ratio, advantages, config.tau_positive, config.tau_negative)
            return gated, torch.zeros_like(inputs.mask)
        if config.objective == "gmpo":
            means = geometric_mean_ratio(logratio, advantages, inputs.mask, low, high)
            return -means * advantages, is_clipped(ratio, advantages, -math.expm1(-low), math.expm1(high))
        if config.entropy_control == "kl_cov":
            return -ratio * advantages, torch.zeros_like(inputs.mask)
        ratio = ratio if config.ratio == "token" else sequence_ratio(logratio, inputs.mask)
        loss = clipped_surrogate(ratio, advantages, low, high, config.dual_clip)
        return loss, is_clipped(ratio, advantages, low, high, config.dual_clip)
