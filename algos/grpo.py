"""GRPO: group relative policy optimisation (DeepSeekMath, arXiv 2402.03300)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmenv.algos.advantages import group_relative
from vlmenv.algos.base import Algorithm, LossInputs, LossOutput
from vlmenv.algos.losses import clipped_surrogate, is_clipped, k3_divergence
from vlmenv.core.errors import ConfigError


@dataclass(frozen=True)
class GRPOConfig:
    """Options of GRPO, in the paper's letters."""

    group_size: int = 8
    """G: completions of each prompt, which are compared with one another."""
    mu: int = 1
    """Optimiser steps on each batch of completions."""
    epsilon: float = 0.2
    """The policy ratio is clipped to 1 - epsilon .. 1 + epsilon."""
    epsilon_high: float | None = None
    """Another upper bound, 1 + epsilon_high, for the ratio ("clip higher", arXiv 2503.14476)."""
    beta: float = 0.0
    """Weight of the KL penalty against the model at the start; no copy of it is held at 0."""

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ConfigError(f"group_size must be at least 2, not {self.group_size}: advantages compare a group")
        if self.mu < 1:
            raise ConfigError(f"mu must be at least 1, not {self.mu}")
        if not 0 < self.epsilon < 1 or not (self.epsilon_high is None or self.epsilon_high > 0):
            raise ConfigError("epsilon must lie between 0 and 1, and epsilon_high above 0")
        if not 0 <= self.beta < math.inf:
            raise ConfigError(f"beta must be a number from 0 up, not {self.beta}")


class GRPO(Algorithm):
    """Advantages are rewards against those of the same prompt's other completions; there is no critic."""

    name: ClassVar[str] = "grpo"

    def __init__(self, config: GRPOConfig) -> None:
        self.config = config
        self.group_size = config.group_size
        self.updates_per_rollout = config.mu
        self.wants_reference = config.beta > 0

    def advantages(self, rewards: Tensor) -> Tensor:
        return group_relative(rewards, self.group_size)

    def loss(self, inputs: LossInputs, num_tokens: int) -> LossOutput:
        """Equation 3 of the paper, averaged over all tokens alike."""
        config, mask = self.config, inputs.mask
        epsilon_high = config.epsilon if config.epsilon_high is None else config.epsilon_high
        advantages = inputs.advantages[:, None]
        logratio = inputs.logprobs - inputs.old_logprobs
        ratio = logratio.exp()
        per_token = clipped_surrogate(ratio, advantages, config.epsilon, epsilon_high)
        with torch.no_grad():
            sums = {
                "policy/approx_kl": (ratio - 1 - logratio)[mask].sum(),
                "policy/clip_frac": is_clipped(ratio, advantages, config.epsilon, epsilon_high)[mask].float().sum(),
            }
        if inputs.ref_logprobs is not None:
            kl = k3_divergence(inputs.logprobs, inputs.ref_logprobs)
            per_token = per_token + config.beta * kl
            sums["policy/kl"] = kl.detach()[mask].sum()
        return LossOutput(per_token[mask].sum() / num_tokens, sums)
