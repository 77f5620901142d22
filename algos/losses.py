"""Per-token losses, KL estimators, and the weights that average per-token losses.

A batch is N completions of up to L tokens. All tensors are [N, L] unless stated otherwise, with a bool mask that is
True at the completions' tokens. Advantages broadcast: [N, 1] is one advantage per completion. Log-probabilities are 0
outside the mask. No function here averages: the loss of a micro-batch is `(token_weights(...) * per_token).sum()`.
"""

from __future__ import annotations

from typing import Final, Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]
Aggregation = Literal["token", "sequence", "constant"]

BOUND: Final = 20.0
"""Largest distance of two log-probabilities, in nats, that goes into `exp`: beyond it float32 gradients overflow."""

_MOST_DEPENDENCE: Final = 10.0
"""Largest visual dependence of a token, in nats."""


def bounded(logratio: Tensor) -> Tensor:
    """A log-ratio within -`BOUND` to `BOUND`, of the same shape. What lies beyond has no gradient."""
    return logratio.clamp(-BOUND, BOUND)


def token_ratio(logratio: Tensor) -> Tensor:
    """Computes importance ratios of tokens, `exp(bounded(logratio))`.

    One token whose probability has changed by many orders of magnitude thus leaves the others their gradient.

    Args:
        logratio: log pi - log pi_old.

    Returns:
        [N, L].
    """
    return bounded(logratio).exp()


def sequence_ratio(logratio: Tensor, mask: Tensor, length_normalised: bool = True) -> Tensor:
    """Computes importance ratios of whole completions, `exp(mean(logratio))`.

    GSPO, arXiv 2507.18071, equation 7. With `clipped_surrogate` and `token_weights(mask, "sequence")` it is equation 5.
    If all tokens of a completion share one advantage, that equals GSPO-token (equations 13 and 14), also in gradient.

    Args:
        logratio: log pi - log pi_old.
        mask: bool [N, L].
        length_normalised: If false, takes the sum instead of the mean. The result is the ratio of the completions'
            probabilities, as in RLOO (arXiv 2402.14740, section 2.2).

    Returns:
        [N, L], the same at all tokens of a row.
    """
    return bounded(_sequence_logs(logratio, mask, length_normalised)).exp().expand_as(logratio)


def is_sequence_bounded(logratio: Tensor, mask: Tensor, length_normalised: bool = True) -> Tensor:
    """Bool [N, L], True at the tokens of completions whose `sequence_ratio` is bounded, and has no gradient."""
    return (_sequence_logs(logratio, mask, length_normalised).abs() > BOUND).expand_as(logratio)


def _sequence_logs(logratio: Tensor, mask: Tensor, length_normalised: bool) -> Tensor:
    """The logarithms of ratios of whole completions, [N, 1]."""
    sums = logratio.masked_fill(~mask, 0).sum(dim=1, keepdim=True)
    return sums / mask.sum(dim=1, keepdim=True).clamp(min=1) if length_normalised else sums


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float, dual_clip: float | None = None
) -> Tensor:
    """Computes PPO's clipped loss, `-min(ratio * A, clip(ratio) * A)` (arXiv 1707.06347, equation 7).

    Args:
        ratio: pi / pi_old.
        advantages: [N, L] or [N, 1].
        epsilon_low: Lower clip range: the ratio is at least `1 - epsilon_low`.
        epsilon_high: Upper clip range: the ratio is at most `1 + epsilon_high`. DAPO's "clip higher" sets it apart
            (arXiv 2503.14476, equation 10).
        dual_clip: Bound c above 1: with a negative advantage the objective is at least `c * A` (arXiv 1912.09729,
            equation 5). None: no bound.

    Returns:
        [N, L].
    """
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    return -objective


def is_clipped(
    ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float, dual_clip: float | None = None
) -> Tensor:
    """Bool [N, L], True where `clipped_surrogate` has no gradient although the advantage is not 0."""
    too_low = ratio < 1 - epsilon_low
    if dual_clip is not None:
        too_low = too_low | (ratio > dual_clip)
    return ((ratio > 1 + epsilon_high) & (advantages > 0)) | (too_low & (advantages < 0))


def cispo(logprobs: Tensor, ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float) -> Tensor:
    """Computes REINFORCE's loss with clipped importance weights, `-sg(clip(ratio)) * A * log pi`.

    CISPO, arXiv 2506.13585, equations 4 and 5. No token is dropped.

    Args:
        logprobs: log pi. The gradient flows through it alone.
        ratio: pi / pi_old.
        advantages: [N, L] or [N, 1].
        epsilon_low: Lower clip range of the weight, `1 - epsilon_low`. 1: no lower bound, as in the paper.
        epsilon_high: Upper clip range of the weight, `1 + epsilon_high`.

    Returns:
        [N, L].
    """
    weight = ratio.detach().clamp(1 - epsilon_low, 1 + epsilon_high)
    return -weight * advantages * logprobs


def is_weight_clipped(ratio: Tensor, epsilon_low: float, epsilon_high: float) -> Tensor:
    """Bool [N, L], True where `cispo` clips the weight."""
    return (ratio < 1 - epsilon_low) | (ratio > 1 + epsilon_high)


def sapo(ratio: Tensor, advantages: Tensor, tau_positive: float, tau_negative: float) -> Tensor:
    """Computes the softly gated loss, `-sigmoid(tau * (ratio - 1)) * 4 / tau * A`.

    SAPO, arXiv 2511.20347. The gate takes the place of the clip range: at ratio 1 the gradient is
    REINFORCE's, and it fades with the distance from there.

    Args:
        ratio: pi / pi_old.
        advantages: [N, L] or [N, 1].
        tau_positive: Temperature with a positive advantage, above 0. A larger one fades faster.
        tau_negative: Temperature with any other advantage, above 0.

    Returns:
        [N, L].
    """
    tau = torch.where(advantages > 0, tau_positive, tau_negative)
    return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages


def geometric_mean_ratio(
    logratio: Tensor, advantages: Tensor, mask: Tensor, epsilon_low: float, epsilon_high: float
) -> Tensor:
    """Computes importance ratios of whole completions from clipped log-ratios of tokens, `exp(mean(clip(logratio)))`.

    GMPO, arXiv 2507.20673: the geometric mean of the tokens' ratios, each clipped as in PPO on the side
    that its advantage would leave. `-ratio * A` with `token_weights(mask, "sequence")` is the loss.

    Args:
        logratio: log pi - log pi_old.
        advantages: [N, L] or [N, 1].
        mask: bool [N, L].
        epsilon_low: Lower clip range of log-ratios, `-epsilon_low`, for advantages that are not positive.
        epsilon_high: Upper clip range of log-ratios, for positive advantages.

    Returns:
        [N, L], the same at all tokens of a row.
    """
    return sequence_ratio(clip_logs(logratio, advantages, epsilon_low, epsilon_high), mask)


def clip_logs(logratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float) -> Tensor:
    """The log-ratios whose mean `geometric_mean_ratio` takes, clipped, [N, L]."""
    return torch.where(advantages > 0, logratio.clamp(max=epsilon_high), logratio.clamp(min=-epsilon_low))


def divergence(logprobs: Tensor, ref_logprobs: Tensor, estimator: Estimator) -> Tensor:
    """Estimates KL(pi || ref) from tokens of pi by one of Schulman's estimators; `d = log pi - log ref`.

    - k1, `d`: unbiased, with high variance, of either sign. In the reward it alone has KL's gradient. In the loss its
      gradient has mean 0, so it has no effect.
    - k2, `d^2 / 2`: biased, but its gradient in the loss is KL's (arXiv 2501.03262, equation 8).
    - k3, `exp(-d) - 1 + d` with d at least -`BOUND`: unbiased up to that and never negative (GRPO, arXiv 2402.03300,
      equation 4). Its gradient in the loss is that of the reverse divergence, KL(ref || pi), which is close for close
      policies.

    This holds for tokens that pi sampled. Multiplied by the ratio pi / pi_old, k1 and k3 have KL's gradient in the loss
    too, also for old tokens (arXiv 2512.02556). A penalty in the loss concerns each token's own distribution. Only a
    penalty in the reward also credits a token for the tokens after it.

    Args:
        logprobs: log pi.
        ref_logprobs: log ref.
        estimator: The estimator.

    Returns:
        [N, L].
    """
    difference = logprobs - ref_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    return torch.expm1(-difference.clamp(min=-BOUND)) + difference.clamp(min=-BOUND)


def visual_dependence(logprobs: Tensor, masked_logprobs: Tensor) -> Tensor:
    """Estimates KL(pi with the image || pi with the masked image) of each token by k3, at most 10 nats.

    PAPO (arXiv 2507.06448) and VPPO (arXiv 2510.09285); the bound is that of the authors' codes. Tokens beyond it have
    no gradient.

    Args:
        logprobs: [N, L], with the image.
        masked_logprobs: [N, L], with the masked image.

    Returns:
        [N, L].
    """
    return divergence(logprobs, masked_logprobs, "k3").clamp(0, _MOST_DEPENDENCE)


def is_dependence_bounded(logprobs: Tensor, masked_logprobs: Tensor) -> Tensor:
    """Bool [N, L], True where `visual_dependence` is bounded."""
    return divergence(logprobs, masked_logprobs, "k3") > _MOST_DEPENDENCE


def is_bounded(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Bool [N, L], True where `divergence` bounds the estimator k3."""
    return logprobs - ref_logprobs < -BOUND


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, epsilon: float) -> Tensor:
    """Computes PPO's critic loss, `max((V - R)^2, (clip(V) - R)^2) / 2`.

    The squared error is arXiv 1707.06347, equation 9. The clip of V, to `epsilon` around its old value, and the factor
    1/2 are from the authors' code (arXiv 2005.12729, section 3).

    Args:
        values: V.
        old_values: V before the update.
        returns: R, the targets.
        epsilon: Clip range, above 0, in units of the reward.

    Returns:
        [N, L].
    """
    return torch.maximum(*_value_errors(values, old_values, returns, epsilon)) / 2


def is_value_clipped(values: Tensor, old_values: Tensor, returns: Tensor, epsilon: float) -> Tensor:
    """Bool [N, L], True where `clipped_value_loss` has no gradient although the error is not 0."""
    error, clipped_error = _value_errors(values, old_values, returns, epsilon)
    return clipped_error > error


def _value_errors(values: Tensor, old_values: Tensor, returns: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    clipped = values.clamp(old_values - epsilon, old_values + epsilon)
    return (values - returns).square(), (clipped - returns).square()


def token_weights(mask: Tensor, how: Aggregation, *, num_tokens: int, num_sequences: int, max_tokens: int) -> Tensor:
    """Computes the weights with which per-token losses sum to the loss of a micro-batch.

    The counts are those of the minibatch over all micro-batches and ranks. So the gradient does not depend on the
    division into micro-batches.

    Args:
        mask: bool [N, L], of this micro-batch.
        how: "token": all tokens count alike, as in DAPO's code (arXiv 2503.14476, equation 8, has it per group).
            "sequence": the mean over completions of the mean over their tokens, as in GRPO (arXiv 2402.03300, equation
            3). "constant": the sum over tokens, divided by a number without lengths, as in Dr. GRPO (arXiv
            2503.20783, section 3.2).
        num_tokens: Number of tokens at the masks of the minibatch.
        num_sequences: Number of completions of the minibatch.
        max_tokens: Length limit of completions.

    Returns:
        [N, L], 0 outside the mask.
    """
    if how == "token":
        return mask / max(num_tokens, 1)
    if how == "constant":
        return mask / (num_sequences * max_tokens)
    lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
    return mask / (num_sequences * lengths)
