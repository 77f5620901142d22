"""Per-token losses and divergences, and the weights that average them.

A batch is N completions of up to L tokens. All tensors are [N, L] unless stated otherwise, with a bool mask, True at
the completions' tokens; advantages broadcast, so [N, 1] serves where all tokens of a completion share one. No
function averages: the loss of a micro-batch is `(token_weights(...) * per_token).sum()`. Log-probabilities are 0
outside the mask, as agents give them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]
Aggregation = Literal["token", "sequence", "constant"]


def sequence_ratio(logratio: Tensor, mask: Tensor, length_normalised: bool = True) -> Tensor:
    """Importance ratios of whole completions, `exp(mean(logratio))`, in place of those of single tokens.

    GSPO, arXiv 2507.18071, equation 7; inside `clipped_surrogate`, with `token_weights(mask, "sequence")`, equation 5.
    While all tokens of a completion share one advantage, that equals GSPO-token (equations 13 and 14), in gradient too.

    Args:
        logratio: log pi - log pi_old.
        mask: The completions' tokens.
        length_normalised: False sums instead of taking the mean: the ratio of the completions' probabilities, in
            which they are single actions, as in RLOO (arXiv 2402.14740, section 2.2).

    Returns:
        [N, L], the same at all tokens of a row.
    """
    sums = logratio.masked_fill(~mask, 0).sum(dim=1, keepdim=True)
    lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
    return (sums / lengths if length_normalised else sums).exp().expand_as(logratio)


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float, dual_clip: float | None = None
) -> Tensor:
    """PPO's pessimistic objective as a loss, `-min(ratio * A, clip(ratio) * A)` (arXiv 1707.06347, equation 7).

    Args:
        ratio: pi / pi_old.
        advantages: [N, L] or [N, 1].
        epsilon_low: The ratio is clipped below at `1 - epsilon_low`.
        epsilon_high: The ratio is clipped above at `1 + epsilon_high`; DAPO's "clip higher" sets it apart
            (arXiv 2503.14476, equation 10).
        dual_clip: c, above 1: where the advantage is negative the objective is no less than `c * A`, however large
            the ratio (arXiv 1912.09729, equation 5).
    """
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    return -objective


def is_clipped(
    ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float, dual_clip: float | None = None
) -> Tensor:
    """Where `clipped_surrogate` gives no gradient although the advantage is not 0; bool."""
    too_low = ratio < 1 - epsilon_low
    if dual_clip is not None:
        too_low = too_low | (ratio > dual_clip)
    return ((ratio > 1 + epsilon_high) & (advantages > 0)) | (too_low & (advantages < 0))


def cispo(logprobs: Tensor, ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float) -> Tensor:
    """REINFORCE with clipped importance weights, `-sg(clip(ratio)) * A * log pi`, so that no token is dropped.

    CISPO, arXiv 2506.13585, equations 4 and 5.

    Args:
        logprobs: log pi, through which alone the gradient flows.
        ratio: pi / pi_old.
        advantages: [N, L] or [N, 1].
        epsilon_low: The weight is clipped below at `1 - epsilon_low`; from 1 up not at all, as in the paper.
        epsilon_high: The weight is clipped above at `1 + epsilon_high`.
    """
    weight = ratio.detach().clamp(1 - epsilon_low, 1 + epsilon_high)
    return -weight * advantages * logprobs


def is_weight_clipped(ratio: Tensor, epsilon_low: float, epsilon_high: float) -> Tensor:
    """Where `cispo` clips its weight; bool."""
    return (ratio < 1 - epsilon_low) | (ratio > 1 + epsilon_high)


def divergence(logprobs: Tensor, ref_logprobs: Tensor, estimator: Estimator) -> Tensor:
    """An estimate of KL(pi || ref) from tokens of pi, one of Schulman's three; `d = log pi - log ref`.

    - k1, `d`: unbiased, of high variance, of either sign. The one for the reward, where alone of the three it has KL's
      gradient; in the loss its gradient has mean 0, so it does nothing.
    - k2, `d^2 / 2`: biased, but its gradient in the loss is KL's (arXiv 2501.03262, equation 8).
    - k3, `exp(-d) - 1 + d`: unbiased and never negative (GRPO, arXiv 2402.03300, equation 4). Its gradient in the
      loss is that of the opposite divergence, KL(ref || pi), which is close while the policies are.

    All this holds for tokens that pi sampled. Multiplied by the ratio pi / pi_old, with its gradient, k1 and k3 have
    KL's gradient in the loss too, also on old tokens (arXiv 2512.02556). KL in the loss is that of each token's own
    distribution; only in the reward does a token answer for what it leads to.

    Args:
        logprobs: log pi.
        ref_logprobs: log ref.
        estimator: Which one.
    """
    difference = logprobs - ref_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    return torch.expm1(-difference) + difference


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, epsilon: float) -> Tensor:
    """PPO's loss of the critic, pessimistic like its policy's: `max((V - R)^2, (clip(V) - R)^2) / 2`.

    The squared error is arXiv 1707.06347, equation 9; that V is clipped, to `epsilon` around its old value, is from
    the authors' code (arXiv 2005.12729, section 3), and so is the half.

    Args:
        values: V.
        old_values: V at the time of sampling.
        returns: R, which is to be predicted.
        epsilon: Above 0, in the units of the rewards.
    """
    return torch.maximum(*_value_errors(values, old_values, returns, epsilon)) / 2


def is_value_clipped(values: Tensor, old_values: Tensor, returns: Tensor, epsilon: float) -> Tensor:
    """Where `clipped_value_loss` gives no gradient although the value is not right; bool."""
    error, clipped_error = _value_errors(values, old_values, returns, epsilon)
    return clipped_error > error


def _value_errors(values: Tensor, old_values: Tensor, returns: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    clipped = values.clamp(old_values - epsilon, old_values + epsilon)
    return (values - returns).square(), (clipped - returns).square()


def token_weights(mask: Tensor, how: Aggregation, *, num_tokens: int, num_sequences: int, max_tokens: int) -> Tensor:
    """Weights by which the loss of a micro-batch is the sum of its per-token losses.

    The counts are of the whole batch, over all micro-batches and processes, so that the gradient does not depend on
    how the batch was cut up.

    Args:
        mask: [N, L], of this micro-batch.
        how: "token", each token alike: DAPO (arXiv 2503.14476, equation 8, which says so of a group; over the batch
            as in its code). "sequence", the mean over completions of the mean over their tokens: GRPO (arXiv
            2402.03300, equation 3). "constant", the sum over tokens by a number that no length enters into: Dr. GRPO
            (arXiv 2503.20783, section 3.2).
        num_tokens: Tokens at the masks of the whole batch.
        num_sequences: Completions of the whole batch.
        max_tokens: The most tokens a completion may have.

    Returns:
        [N, L], 0 outside the mask.
    """
    if how == "token":
        return mask / max(num_tokens, 1)
    if how == "constant":
        return mask / (num_sequences * max_tokens)
    lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
    return mask / (num_sequences * lengths)
