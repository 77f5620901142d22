"""Corrects for completions that another policy sampled than the one that learns.

An engine with weights a step old, or of another precision, samples from a policy `mu` that is not quite `pi_old`, the
policy before the update. Each token's loss is then weighted by pi_old / mu, which makes its expectation that under
pi_old again. To bound the variance, weights are truncated at a cap, as in IMPALA (arXiv 1802.01561, section 4.1), or
left out beyond it.

All tensors are [N, L] with a bool mask, True at the completions' tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Correction = Literal["none", "token", "sequence", "token-mask", "sequence-mask"]


@torch.no_grad()
def importance_weights(logratio: Tensor, mask: Tensor, how: Correction, cap: float) -> Tensor:
    """What the loss of each token is multiplied by.

    Args:
        logratio: log pi_old - log mu.
        mask: The completions' tokens.
        how: "token", `min(ratio, cap)` of each token by itself; "sequence", the same of the ratio of whole
            completions, the product over their tokens, which alone makes the expectation exact but varies more the
            longer they are. The masks take ratios as they are, and 0 outside 1 / cap .. cap. "none" is 1.
        cap: Above 1.
    """
    if how == "none":
        return torch.ones_like(logratio)
    ratio = _logs(logratio, mask, how).exp()
    if how.endswith("mask"):
        return ratio.where((ratio >= 1 / cap) & (ratio <= cap), 0)  # a product with 0 is NaN where it is infinite
    return ratio.clamp(max=cap)


@torch.no_grad()
def mismatch(logratio: Tensor, mask: Tensor, how: Correction, cap: float) -> dict[str, float]:
    """How far the sampler is from the policy, by logged names.

    Args:
        logratio: log pi_old - log mu.
        mask: The completions' tokens.
        how: See `importance_weights`.
        cap: See there.

    Returns:
        `policy/sampler_kl`: KL(mu || pi_old) a token, in nats, estimated from what mu sampled by `exp(d) - 1 - d`
        (k3), which is never negative. `policy/correction_clipped`: share of tokens whose ratio is outside the cap.
        `policy/effective_samples`: Kish's effective sample size of the ratios as they are, `sum(w)^2 / sum(w^2)`, as a
        share of the tokens.
    """
    logs = _logs(logratio, mask, how)[mask].double()
    ratio, weights = logs.exp(), (logs - logs.max()).exp()  # whose scale does not matter
    outside = (ratio > cap) | ((ratio < 1 / cap) if how.endswith("mask") else False)
    tokens = logratio[mask].double()
    return {
        "policy/sampler_kl": float((torch.expm1(tokens) - tokens).mean()),
        "policy/correction_clipped": 0.0 if how == "none" else float(outside.double().mean()),
        "policy/effective_samples": float(weights.sum().square() / weights.square().sum() / len(weights)),
    }


def _logs(logratio: Tensor, mask: Tensor, how: Correction) -> Tensor:
    logratio = logratio.masked_fill(~mask, 0)
    if how.startswith("sequence"):
        logratio = logratio.sum(dim=1, keepdim=True).expand_as(logratio)
    return logratio
