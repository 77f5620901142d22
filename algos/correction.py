"""Importance-sampling correction for the mismatch between engine and trainer.

An engine with older weights or another precision samples from a policy `mu`. It differs from `pi_old`, the trainer's
policy before the update. The weight pi_old / mu of each token's loss restores the expectation under pi_old. To bound
the variance, weights are truncated at a cap, as in IMPALA (arXiv 1802.01561, section 4.1), or set to 0 beyond it.

All tensors are [N, L], with a bool mask that is True at the completions' tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vlmenv.algos.losses import bounded
from vlmenv.algos.means import Mean

Correction = Literal["none", "token", "sequence", "token-mask", "sequence-mask"]


@torch.no_grad()
def importance_weights(logratio: Tensor, mask: Tensor, how: Correction, cap: float) -> Tensor:
    """Computes the weight of each token's loss.

    Args:
        logratio: log pi_old - log mu.
        mask: The completions' tokens.
        how: "token": `min(ratio, cap)` of each token. "sequence": the same of a completion's ratio, the product over
            its tokens. Only this makes the expectation exact, but its variance grows with the length. "token-mask"
            and "sequence-mask": the ratio, or 0 outside 1 / cap to cap. "none": 1.
        cap: Largest weight, above 1.

    Returns:
        [N, L].
    """
    if how == "none":
        return torch.ones_like(logratio)
    ratio = _logs(logratio, mask, how).exp()
    if how.endswith("mask"):
        return ratio.where((ratio >= 1 / cap) & (ratio <= cap), 0)  # a product with 0 is NaN where it is infinite
    return ratio.clamp(max=cap)


@torch.no_grad()
def mismatch(logratio: Tensor, mask: Tensor, how: Correction, cap: float) -> dict[str, float]:
    """Measures how far the sampler is from the policy.

    Args:
        logratio: log pi_old - log mu.
        mask: The completions' tokens.
        how: See `importance_weights`.
        cap: See there.

    Returns:
        Metrics by their logged names. `policy/sampler_kl`: KL(mu || pi_old) per token, in nats, by the estimator k3,
        `exp(d) - 1 - d`. `policy/correction_clipped`: share of tokens with a ratio outside the cap.
        `policy/effective_samples`: Kish's effective sample size of the untruncated ratios, `sum(w)^2 / sum(w^2)`, as
        a share of the tokens.
    """
    logs = _logs(logratio, mask, how)[mask].double()
    ratio, weights = logs.exp(), (logs - logs.max()).exp()  # whose scale does not matter
    outside = (ratio > cap) | ((ratio < 1 / cap) if how.endswith("mask") else False)
    tokens = bounded(logratio[mask].double())
    found = {
        "policy/sampler_kl": float((torch.expm1(tokens) - tokens).mean()),
        "policy/correction_clipped": 0.0 if how == "none" else float(outside.double().mean()),
        "policy/effective_samples": float(weights.sum().square() / weights.square().sum() / len(weights)),
    }
    return {name: Mean(value, len(tokens)) for name, value in found.items()}


def _logs(logratio: Tensor, mask: Tensor, how: Correction) -> Tensor:
    logratio = logratio.masked_fill(~mask, 0)
    if how.startswith("sequence"):
        logratio = logratio.sum(dim=1, keepdim=True).expand_as(logratio)
    return logratio
