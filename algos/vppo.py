"""VPPO: GRPO that learns from the tokens that depend on the image (arXiv 2510.09285)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from vlmenv.algos.base import LossInputs, LossOutput, Scored
from vlmenv.algos.grpo import GRPO, GRPOConfig, check_by_token
from vlmenv.algos.losses import visual_dependence
from vlmenv.core.errors import require, require_weight

_ROUNDING: Final = 1e-6
"""Nats of visual dependence by which rounding in float32 sets completions apart."""


@dataclass(frozen=True)
class VPPOConfig(GRPOConfig):
    """Hyperparameters of VPPO, beside those of GRPO."""

    visual_share: float = 0.4
    """Share of a completion's tokens, those that depend most on the image, that have a gradient."""
    visual_floor: float = 0.9
    """Factor of the advantage of the completion that depends least on its image, 0 to 1. The mean factor is 1."""
    entropy_loss: float = 0.06
    """Weight of the entropy, estimated from the sampled tokens, which is lowered."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.visual_share <= 1, f"visual_share must be a share above 0, not {self.visual_share}")
        require(0 <= self.visual_floor <= 1, f"visual_floor must lie between 0 and 1, not {self.visual_floor}")
        require_weight("entropy_loss", self.entropy_loss)
        check_by_token(self, "vppo")


class VPPO(GRPO):
    """VPPO: advantages by a completion's visual dependence, and none for tokens of little dependence."""

    name: ClassVar[str] = "vppo"
    wants_masked: ClassVar[bool] = True

    def __init__(self, config: VPPOConfig) -> None:
        super().__init__(config)
        self.config: VPPOConfig = config

    def advantages(self, scored: Scored) -> Tensor:
        """Computes advantages of tokens, [N, L], by their visual dependence.

        A completion after a text alone, without images or videos, depends on none, and keeps those of all tokens.
        """
        config = self.config
        assert scored.masked_logprobs is not None
        assert scored.sees is not None
        blind = ~scored.sees[:, None]
        dependence = visual_dependence(scored.old_logprobs, scored.masked_logprobs).masked_fill(~scored.mask | blind, 0)
        means = dependence.sum(dim=1) / scored.mask.sum(dim=1).clamp(min=1)
        factors = shaping_factors(means, config.visual_floor, scored.gather)
        pivotal = top_tokens(dependence, scored.mask, config.visual_share) | blind
        return super().advantages(scored) * factors[:, None] * pivotal

    def loss(self, inputs: LossInputs) -> LossOutput:
        """Computes GRPO's loss, less the sampled tokens' log-probabilities as the authors' code has them."""
        output = super().loss(inputs)
        entropy = -(inputs.weights * inputs.logprobs).sum()
        return LossOutput(output.loss + self.config.entropy_loss * entropy, output.sums)


def shaping_factors(means: Tensor, floor: float, gather: Callable[[Tensor], Tensor]) -> Tensor:
    """Computes factors of completions' advantages: linear in their visual dependence, with mean 1 over the batch.

    Args:
        means: [N], mean dependence of each completion's tokens.
        floor: Factor of the least dependent completion of the batch.
        gather: Concatenates a tensor's rows over all ranks.

    Returns:
        [N]; 1 if all depend alike.
    """
    everyone = gather(means)
    low, span = everyone.min(), everyone.max() - everyone.min()
    if span <= _ROUNDING:
        return torch.ones_like(means)
    slope = (1 - floor) * span / (everyone - low).mean()
    return floor + slope * (means - low) / span


def top_tokens(values: Tensor, mask: Tensor, share: float) -> Tensor:
    """Bool [N, L], True at the share of each row's tokens with the largest values, rounded up."""
    order = values.masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
    ranks = order.argsort(dim=1)
    wanted = mask.sum(dim=1, keepdim=True).double() * share
    return (ranks < torch.ceil(wanted - 1e-9)) & mask  # rounding, as in .3 * 50 > 15, adds no token
