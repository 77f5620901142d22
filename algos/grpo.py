"""GRPO: group relative policy optimisation (DeepSeekMath, arXiv 2402.03300), and its published variants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, Literal

from torch import Tensor

from vlmenv.algos.advantages import Scale, group_relative, overlong_penalty
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
    Estimator,
    cispo,
    clipped_surrogate,
    divergence,
    is_clipped,
    is_weight_clipped,
    sequence_ratio,
)
from vlmenv.core.errors import require, require_at_least, require_weight


@dataclass(frozen=True)
class GRPOConfig(AlgorithmConfig):
    """Options of GRPO, in the papers' letters."""

    epsilon: float = 0.2
    """The policy ratio is clipped to 1 - epsilon .. 1 + epsilon."""
    epsilon_high: float | None = None
    """Another upper bound, 1 + epsilon_high, for the ratio ("clip higher", DAPO)."""
    dual_clip: float | None = None
    """Bound, above 1, on the ratio where the advantage is negative (arXiv 1912.09729)."""
    beta: float = 0.0
    """Weight of the KL penalty against the model at the start; no copy of it is held at 0."""
    kl_estimator: Estimator = "k3"
    """Of the penalty."""
    scale: Scale = "group"
    """Standard deviation that advantages are divided by: the group's, the batch's, or none (Dr. GRPO)."""
    aggregation: Aggregation = "token"
    """Mean of the losses: over tokens (DAPO), over completions of means over tokens (the paper), or by a constant."""
    ratio: Literal["token", "sequence"] = "token"
    """Importance ratios of tokens, or of whole completions (GSPO)."""
    objective: Literal["clip", "cispo"] = "clip"
    """PPO's clipped objective, or REINFORCE with clipped importance weights (CISPO)."""
    mask_truncated: bool = False
    """Learn nothing from completions that the limit cut off."""
    overlong_share: float = 0.0
    """Share of the limit, at its end, over which the reward falls by up to 1 (DAPO's soft punishment)."""
    most_rounds: int = 1
    """Batches rolled out, at most, to fill one with groups whose rewards differ (DAPO's dynamic sampling)."""

    replay: int = 0
    """Groups whose rewards differed to keep, the newest; where a group teaches nothing one of these takes its place,
    drawn by the size of its advantages and weighted by importance (selective sample replay, arXiv 2504.08837)."""

    def __post_init__(self) -> None:
        AlgorithmConfig.__post_init__(self)
        require(self.group_size >= 2, f"group_size must be at least 2, not {self.group_size}: a group is compared")
        low = 0 < self.epsilon < 1 or (self.objective == "cispo" and self.epsilon == 1)
        require(low, f"epsilon must lie between 0 and 1 (for cispo it may be 1), not {self.epsilon}")
        require(self.epsilon_high is None or self.epsilon_high > 0, "epsilon_high must be above 0")
        require(self.dual_clip is None or self.dual_clip > 1, "dual_clip must be above 1")
        plain = self.dual_clip is None and self.ratio == "token"
        require(self.objective == "clip" or plain, "cispo has neither dual_clip nor a ratio of sequences")
        require(0 <= self.overlong_share < 1, "overlong_share must be a share of the limit, from 0 to below 1")
        require_at_least(1, most_rounds=self.most_rounds)
        require_at_least(0, replay=self.replay)
        require_weight("beta", self.beta)


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
}
"""The options of each published variant."""


class GRPO(Algorithm):
    """Advantages are rewards against those of the same prompt's other completions; there is no critic."""

    name: ClassVar[str] = "grpo"

    def __init__(self, config: GRPOConfig) -> None:
        self.config: GRPOConfig = config
        self.aggregation = config.aggregation
        self.wants_reference = config.beta > 0
        self.most_rounds, self.replay = config.most_rounds, config.replay

    def credit(self, scored: Scored) -> Credit:
        """Rewards, less the soft punishment of length, against the group's; one advantage a completion, [N, 1]."""
        config, rewards = self.config, scored.rewards
        if config.overlong_share:
            buffer = max(1, round(config.overlong_share * scored.max_tokens))
            rewards = rewards + overlong_penalty(scored.mask.sum(dim=1), scored.max_tokens, buffer)
        everyone = scored.gather(rewards) if config.scale == "batch" else None
        advantages = group_relative(rewards, config.group_size, config.scale, batch=everyone)
        mask = scored.mask & ~scored.truncated[:, None] if config.mask_truncated else scored.mask
        return Credit(advantages[:, None], mask)

    def loss(self, inputs: LossInputs) -> LossOutput:
        """Equation 3 of the paper, with `aggregation` as its mean over tokens."""
        config, mask = self.config, inputs.mask
        logratio = inputs.logprobs - inputs.old_logprobs
        ratio = logratio.exp() if config.ratio == "token" else sequence_ratio(logratio, mask)
        per_token, clipped = self._surrogate(inputs, ratio)
        sums = ratio_sums(logratio, clipped, mask)
        if inputs.ref_logprobs is not None:
            kl = divergence(inputs.logprobs, inputs.ref_logprobs, config.kl_estimator)
            per_token = per_token + config.beta * kl
            sums["policy/kl"] = kl.detach()[mask].sum()
        return LossOutput((inputs.weights * per_token).sum(), sums)

    def _surrogate(self, inputs: LossInputs, ratio: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        bounds = config.epsilon, config.epsilon if config.epsilon_high is None else config.epsilon_high
        if config.objective == "cispo":
            loss = cispo(inputs.logprobs, ratio, inputs.advantages, *bounds)
            return loss, is_weight_clipped(ratio, *bounds)
        loss = clipped_surrogate(ratio, inputs.advantages, *bounds, config.dual_clip)
        return loss, is_clipped(ratio, inputs.advantages, *bounds, config.dual_clip)
