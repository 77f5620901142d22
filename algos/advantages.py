"""From rewards to advantages.

A batch is N completions of up to L tokens: rewards are [N], the G members of a group next to one another, and what
belongs to tokens is [N, L] beside a bool mask [N, L], True at the completions' tokens. What a tensor holds outside
the mask never matters; results are 0 there.

Some statistics are of the whole batch, over all processes: `group_relative` then takes everyone's rewards besides its
own, and `whiten` takes `moments` that were summed over processes. Nothing here is differentiated.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]


def group_relative(
    rewards: Tensor, group_size: int, scale: Scale = "group", batch: Tensor | None = None, epsilon: float = 1e-4
) -> Tensor:
    """Rewards against their group: `A_i = (r_i - mean(group)) / (std + epsilon)`, with the sample standard deviation.

    Args:
        rewards: [N].
        group_size: G, at least 2.
        scale: What the standard deviation is of. "group" is GRPO's (arXiv 2402.03300, section 4.1.2), "batch" takes
            it over all rewards of the batch (arXiv 2508.08221), and "none" does not divide: Dr. GRPO (arXiv
            2503.20783, section 3.2), for whom the division favours questions that are too easy or too hard.
        batch: Everyone's rewards, for the scale "batch"; `rewards` alone where left out.
        epsilon: Keeps groups of equal rewards at zero.

    Returns:
        [N].
    """
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    if scale == "none":
        return centred.view(-1)
    std = groups.std(dim=1, keepdim=True) if scale == "group" else (rewards if batch is None else batch).std()
    return (centred / (std + epsilon)).view(-1)


def leave_one_out(rewards: Tensor, group_size: int) -> Tensor:
    """Rewards against the mean of the group's others, `A_i = r_i - sum(r_j, j != i) / (G - 1)`.

    RLOO, arXiv 2402.14740, section 2.3. The baseline does not depend on the completion it is subtracted from, so the
    gradient is unbiased.

    Args:
        rewards: [N]; RLOO's include the KL penalty of the whole completion.
        group_size: G, at least 2.

    Returns:
        [N].
    """
    return group_relative(rewards, group_size, scale="none") * (group_size / (group_size - 1))


def zero_variance_share(rewards: Tensor, group_size: int) -> float:
    """Share of groups in which all rewards are equal: such groups teach nothing."""
    groups = rewards.view(-1, group_size)
    return (groups == groups[:, :1]).all(dim=1).float().mean().item()


def overlong_penalty(lengths: Tensor, max_tokens: int, buffer: int) -> Tensor:
    """DAPO's soft overlong punishment, to be added to the rewards (arXiv 2503.14476, equation 13).

    Args:
        lengths: Tokens of each completion, of any shape.
        max_tokens: L_max. Longer completions get -1.
        buffer: L_cache, at least 1: over this many tokens before `max_tokens` the penalty falls from 0 to -1.

    Returns:
        -1 to 0, of the shape of `lengths`.
    """
    return ((max_tokens - buffer - lengths) / buffer).clamp(-1, 0)


def token_rewards(rewards: Tensor, mask: Tensor, kl: Tensor | None = None, beta: float = 0.0) -> Tensor:
    """Rewards of single tokens: `-beta * kl` at each, and the completion's own reward at its last one.

    What PPO and REINFORCE++ (arXiv 2501.03262, equation 4) learn from; a row's sum is the reward of RLOO.

    Args:
        rewards: [N]. That of a completion without tokens is lost.
        mask: [N, L].
        kl: [N, L], without gradient; k1 between the policy that sampled and the reference, in those papers.
        beta: Weight of `kl`.

    Returns:
        [N, L].
    """
    positions = mask.cumsum(dim=1)
    last = mask & (positions == positions[:, -1:])
    at_end = torch.where(last, rewards[:, None], 0)
    return at_end if kl is None else at_end - beta * kl.masked_fill(~mask, 0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 1.0) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: `A_t = delta_t + gamma * lam * A_{t+1}` (arXiv 1506.02438, equation 16).

    `delta_t = r_t + gamma * V_{t+1} - V_t`. Each completion is an episode that ends at its last token, truncated ones
    too: the value after it is 0.

    Args:
        rewards: [N, L], of single tokens.
        values: [N, L]: V_t, of the state in which token t is chosen.
        mask: [N, L].
        gamma: Discount of later rewards, 0 to 1.
        lam: 0 to 1: from little variance, biased by the values, to the unbiased returns.

    Returns:
        The advantages, and the returns that the values are to predict, `A_t + V_t`; [N, L] each.
    """
    advantages = torch.zeros_like(values)
    advantage = next_value = values.new_zeros(len(values))
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = advantage
    return advantages.masked_fill(~mask, 0), (advantages + values).masked_fill(~mask, 0)


def returns_to_go(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """Rewards of a token and, discounted, of all that follow: `R_t = r_t + gamma * R_{t+1}`.

    REINFORCE++'s advantages before they are whitened, arXiv 2501.03262, equation 4 (with gamma = 1).

    Args:
        rewards: [N, L], of single tokens.
        mask: [N, L].
        gamma: 0 to 1.

    Returns:
        [N, L].
    """
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, lam=1.0)[1]


def reinforce_plus_plus(
    rewards: Tensor,
    mask: Tensor,
    kl: Tensor | None = None,
    beta: float = 0.0,
    gamma: float = 1.0,
    group_size: int | None = None,
) -> Tensor:
    """REINFORCE++'s advantages, still to be whitened over the whole batch: `whiten` is equations 5 and 7.

    Args:
        rewards: [N].
        mask: [N, L].
        kl: [N, L], without gradient. The variant with a baseline has none: its penalty, k2, is in the loss.
        beta: Weight of `kl`.
        gamma: 0 to 1.
        group_size: G of the variant with a baseline, which subtracts the group's mean reward first (equation 6); None
            for the plain algorithm.

    Returns:
        [N, L].
    """
    baselined = rewards if group_size is None else group_relative(rewards, group_size, scale="none")
    return returns_to_go(token_rewards(baselined, mask, kl, beta), mask, gamma)


def moments(values: Tensor, mask: Tensor) -> Tensor:
    """Number, sum and sum of squares of the values at the mask: added up over processes, those of their union.

    Args:
        values: [N, L].
        mask: [N, L].

    Returns:
        [3], in float64, in which a variance survives the subtraction of two large numbers.
    """
    chosen = values[mask].double()
    return torch.stack([chosen.new_tensor(len(chosen)), chosen.sum(), chosen.square().sum()])


def whiten(values: Tensor, mask: Tensor, stats: Tensor | None = None, epsilon: float = 1e-8) -> Tensor:
    """Values brought to mean 0 and variance 1: `(x - mean) / (std + epsilon)` (arXiv 2501.03262, equations 5 and 7).

    Args:
        values: [N, L].
        mask: [N, L].
        stats: `moments` of a larger batch that these values are part of; their own where left out.
        epsilon: Keeps equal values at zero.

    Returns:
        [N, L].
    """
    count, total, squares = (moments(values, mask) if stats is None else stats).unbind()
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    whitened = (values.double() - mean) / (std + epsilon)
    return whitened.to(values.dtype).masked_fill(~mask, 0)
