"""Entropy control: a bonus, and limits for the tokens that lower the entropy most (arXiv 2505.22617).

A policy loses entropy where log-probability and advantage have a positive covariance: likely tokens that are rewarded
become likelier. A few tokens hold most of this covariance. Clip-Cov takes their gradient away; KL-Cov, which has no
clip range, adds a KL penalty to them.

They are chosen once per batch, by the policy before the update, so that neither micro-batches nor their number change
the choice. With one optimizer step per batch that is the papers' choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vlmenv.algos.base import AlgorithmConfig, Scored
from vlmenv.core.errors import require, require_weight


@dataclass(frozen=True)
class EntropyConfig(AlgorithmConfig):
    """Hyperparameters of entropy control."""

    entropy_bonus: float = 0.0
    """Weight of the policy's entropy, in nats per token, in the objective."""
    entropy_control: Literal["none", "clip_cov", "kl_cov"] = "none"
    """Control of the tokens that lower the entropy most, by the covariance of log-probability and advantage: no
    gradient for some of them (clip_cov), or a KL penalty in place of the clip range (kl_cov)."""
    cov_share: float = 0.0002
    """Share of the batch's tokens that entropy control concerns, at least one token per rank."""
    cov_low: float = 1.0
    """Smallest covariance of tokens that clip_cov draws from."""
    cov_high: float = 5.0
    """Largest covariance of tokens that clip_cov draws from."""
    cov_weight: float = 1.0
    """Weight of kl_cov's penalty."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_weight("entropy_bonus", self.entropy_bonus)
        require_weight("cov_weight", self.cov_weight)
        require(0 < self.cov_share <= 1, f"cov_share must be a share above 0, not {self.cov_share}")
        require(self.cov_low < self.cov_high, "cov_low must be below cov_high")
        wanted = {"cov_share": ("clip_cov", "kl_cov"), "cov_low": ("clip_cov",), "cov_high": ("clip_cov",)}
        for name, kinds in (wanted | {"cov_weight": ("kl_cov",)}).items():
            unused = self.entropy_control not in kinds and getattr(self, name) != getattr(EntropyConfig, name)
            require(not unused, f"{name} goes with entropy_control {' or '.join(kinds)}")
        idle = self.entropy_control == "kl_cov" and self.mu * self.minibatches == 1
        require(not idle, "kl_cov has no effect in the first optimizer step of a batch: give minibatches or mu above 1")


def chosen_tokens(config: EntropyConfig, scored: Scored, advantages: Tensor, mask: Tensor) -> Tensor | None:
    """The tokens that entropy control concerns.

    Args:
        config: How they are chosen.
        scored: The batch.
        advantages: [N, L] or [N, 1].
        mask: bool [N, L], the tokens to learn from.

    Returns:
        bool [N, L]; None without entropy control.
    """
    if config.entropy_control == "none":
        return None
    products = covariances(scored.old_logprobs, advantages, mask, scored.total)
    most = max(1, int(config.cov_share * int(mask.sum())))
    if config.entropy_control == "kl_cov":
        return _largest(products, mask, most)
    return _drawn(mask & (products > config.cov_low) & (products < config.cov_high), most, scored.rng)


def covariances(logprobs: Tensor, advantages: Tensor, mask: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
    """Computes each token's part of the covariance, `(log pi - mean) * (A - mean)` (arXiv 2505.22617).

    Args:
        logprobs: [N, L].
        advantages: [N, L] or [N, 1].
        mask: bool [N, L].
        total: Sums a tensor over all ranks: the means are those of all tokens.

    Returns:
        [N, L].
    """
    sums = [x.expand_as(mask)[mask].double().sum() for x in (mask.double(), logprobs, advantages)]
    count, logprob, advantage = total(torch.stack(sums)).unbind()
    return (logprobs - logprob / count) * (advantages - advantage / count)


def _largest(values: Tensor, mask: Tensor, most: int) -> Tensor:
    """Bool [N, L], True at the largest values at the mask."""
    places = values.masked_fill(~mask, -math.inf).flatten().topk(min(most, int(mask.sum()))).indices
    return torch.zeros_like(mask).flatten().index_fill(0, places, True).view_as(mask)


def _drawn(candidates: Tensor, most: int, rng: np.random.Generator) -> Tensor:
    """Bool [N, L], True at some of the candidates, drawn at random."""
    places = candidates.flatten().nonzero()[:, 0]
    drawn = torch.from_numpy(rng.permutation(len(places))[:most]).to(places.device)
    return torch.zeros_like(candidates).flatten().index_fill(0, places[drawn], True).view_as(candidates)
