"""Per-token losses and divergences. All tensors are [N, L] unless stated otherwise."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_surrogate(ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float) -> Tensor:
    """PPO's pessimistic objective as a loss, `-min(ratio * A, clip(ratio) * A)` (arXiv 1707.06347, equation 7).

    Args:
        ratio: pi / pi_old at each token.
        advantages: Broadcasts against `ratio`.
        epsilon_low: The ratio is clipped below at `1 - epsilon_low`.
        epsilon_high: The ratio is clipped above at `1 + epsilon_high`.
    """
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def is_clipped(ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float) -> Tensor:
    """Where `clipped_surrogate` gives no gradient."""
    return ((ratio > 1 + epsilon_high) & (advantages > 0)) | ((ratio < 1 - epsilon_low) & (advantages < 0))


def k3_divergence(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(pi || ref), `exp(d) - d - 1` with `d = ref - pi`; never negative.

    GRPO, arXiv 2402.03300, equation 4.
    """
    difference = ref_logprobs - logprobs
    return difference.exp() - difference - 1
