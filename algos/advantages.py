"""Advantages from rewards.

A batch is N completions of up to L tokens. Rewards are [N], the G members of a group are neighbours. Per-token tensors
are [N, L], with a bool mask [N, L] that is True at the completions' tokens. Values outside the mask have no effect;
results are 0 there.

Some statistics are those of all ranks: `group_relative` takes the rewards of all ranks, and `whiten` takes `moments`
summed over ranks. Nothing here has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]


def group_relative(
    rewards: Tensor, group_size: int, scale: Scale = "group", batch: Tensor | None = None, epsilon: float = 1e-4
) -> Tensor:
    """Computes `A_i = (r_i - mean(group)) / (std + epsilon)`, with the sample standard deviation.

    Args:
        rewards: [N].
        group_size: G, at least 2.
        scale: Standard deviation that divides. "group": GRPO (arXiv 2402.03300, section 4.1.2). "batch": that of all
            rewards of the batch (arXiv 2508.08221). "none": no division, as in Dr. GRPO (arXiv 2503.20783, section
            3.2), because division favours questions that are too easy or too hard.
        batch: Rewards of all ranks, for the scale "batch". Default: `rewards`.
        epsilon: Bounds the advantages of nearly equal rewards.

    Returns:
        [N], exactly 0 in groups of equal rewards.
    """
    groups = rewards.view(-1, group_size)
    centred = _centred(groups)
    if scale == "none":
        return centred.view(-1)
    std = groups.std(dim=1, keepdim=True) if scale == "group" else (rewards if batch is None else batch).std()
    return (centred / (std + epsilon)).view(-1)


def term_relative(
    terms: Tensor,
    weights: Tensor,
    group_size: int,
    gather: Callable[[Tensor], Tensor] = lambda own: own,
    epsilon: float = 1e-4,
) -> Tensor:
    """Computes advantages per reward term: the weighted sum of each term's `group_relative`, normalised over the batch.

    GDPO, arXiv 2601.05242. Groups whose terms differ keep different advantages, also if the sums of
    their terms are equal. A term that is equal in a group gives exactly 0 there. TRL's formula lacks this: where all
    groups are so, it normalises what rounding leaves, to the size of 1.

    Args:
        terms: [N, K], unweighted. NaN: the completion does not have the term, so the term's mean and deviation are
            those of the others.
        weights: [N, K], weights of the terms.
        group_size: G, at least 2.
        gather: Concatenates a tensor's rows over all ranks. Default: there is one rank.
        epsilon: Keeps the advantages of equal rewards at 0.

    Returns:
        [N].
    """
    groups = terms.view(-1, group_size, terms.shape[1])
    centred = _centred(groups)
    counts = (~groups.isnan()).sum(dim=1, keepdim=True)
    std = (centred.square().nansum(dim=1, keepdim=True) / (counts - 1).clamp(min=1)).sqrt()
    sums = ((centred / (std + epsilon)).view_as(terms) * weights).nansum(dim=1)
    everyone = gather(sums)
    return (sums - everyone.mean()) / (everyone.std() + epsilon)


def _centred(groups: Tensor) -> Tensor:
    """Values less the mean of their group, [P, G, ...]; exactly 0 where a group's values are equal. NaN is left out."""
    present = ~groups.isnan()
    low = groups.where(present, torch.inf).amin(dim=1, keepdim=True)
    high = groups.where(present, -torch.inf).amax(dim=1, keepdim=True)
    centred = groups - groups.nanmean(dim=1, keepdim=True)
    return centred.where((low != high) | ~present, 0)


def leave_one_out(rewards: Tensor, group_size: int) -> Tensor:
    """Computes `A_i = r_i - sum(r_j, j != i) / (G - 1)`: the baseline is the mean of the group's other members.

    RLOO, arXiv 2402.14740, section 2.3. The baseline does not depend on the completion itself, so the gradient is
    unbiased.

    Args:
        rewards: [N]. RLOO's include the KL penalty of the whole completion.
        group_size: G, at least 2.

    Returns:
        [N].
    """
    return group_relative(rewards, group_size, scale="none") * (group_size / (group_size - 1))


def zero_variance_share(rewards: Tensor, group_size: int) -> float:
    """Share of groups with equal rewards, which have no advantage."""
    groups = rewards.view(-1, group_size)
    return (groups == groups[:, :1]).all(dim=1).float().mean().item()


def overlong_penalty(lengths: Tensor, max_tokens: int, buffer: int) -> Tensor:
    """Computes DAPO's soft overlong punishment, a term of the reward (arXiv 2503.14476, equation 13).

    Args:
        lengths: Lengths of the completions in tokens, of any shape.
        max_tokens: L_max. Longer completions get -1.
        buffer: L_cache, at least 1: the number of tokens before `max_tokens` over which the penalty falls from 0 to -1.

    Returns:
        -1 to 0, in the shape of `lengths`.
    """
    return ((max_tokens - buffer - lengths) / buffer).clamp(-1, 0)


def token_rewards(
    rewards: Tensor, mask: Tensor, kl: Tensor | None = None, beta: float = 0.0, turns: Tensor | None = None
) -> Tensor:
    """Computes per-token rewards: `-beta * kl` at each token, plus the completion's reward at its last token.

    In an episode of several turns, each turn's reward is at that turn's last token.

    PPO and REINFORCE++ (arXiv 2501.03262, equation 4) learn from these. The sum of a row is RLOO's reward.

    Args:
        rewards: [N]. The reward of a completion without tokens is lost.
        mask: [N, L].
        kl: [N, L], without gradient. In those papers: k1 between the sampling policy and the reference.
        beta: Weight of `kl`.
        turns: [N, T], the parts of `rewards` by turn. The rest of `rewards` is at the last token. Default: all of it.

    Returns:
        [N, L].
    """
    positions = mask.cumsum(dim=1)
    last = mask & (positions == positions[:, -1:])
    by_turn = torch.zeros_like(last, dtype=rewards.dtype)
    if turns is not None:
        ends = turn_ends(mask)
        number = (ends.cumsum(dim=1) - 1).clamp(0, turns.shape[1] - 1)
        by_turn = torch.where(ends, turns.gather(1, number), 0)
    at_end = by_turn + torch.where(last, (rewards - by_turn.sum(dim=1))[:, None], 0)
    return at_end if kl is None else at_end - beta * kl.masked_fill(~mask, 0)


def turn_ends(mask: Tensor) -> Tensor:
    """Bool [N, L], True at the last token of each turn. Tokens of the environment part an episode's turns."""
    return mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))


def longest_turns(mask: Tensor) -> Tensor:
    """The tokens of the longest turn of each episode, int64 [N]; the length limit is that of a turn."""
    written = mask.cumsum(dim=1)
    before = written.masked_fill(mask, 0).cummax(dim=1).values
    return (written - before).amax(dim=1)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 1.0, turn_gamma: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Computes generalised advantages, `A_t = delta_t + gamma * lam * A_{t+1}` (arXiv 1506.02438, equation 16).

    `delta_t = r_t + gamma * V_{t+1} - V_t`. Each completion is an episode that ends at its last token, also if it is
    truncated: the value after it is 0.

    Args:
        rewards: [N, L], per token.
        values: [N, L], V_t of the state in which token t is chosen.
        mask: [N, L].
        gamma: Discount factor, 0 to 1.
        lam: 0 to 1. At 0: low variance, biased by the values. At 1: unbiased returns.
        turn_gamma: Discount factor from one turn of an episode to the next, beside `gamma`, 0 to 1.

    Returns:
        Advantages [N, L], and returns `A_t + V_t` [N, L], the targets of the critic.
    """
    advantages = torch.zeros_like(values)
    advantage = next_value = values.new_zeros(len(values))
    over_turns = torch.where(turn_ends(mask), turn_gamma, 1.0).to(values.dtype)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * (over_turns[:, t] * next_value) - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * lam * (over_turns[:, t] * advantage), advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = advantage
    return advantages.masked_fill(~mask, 0), (advantages + values).masked_fill(~mask, 0)


def returns_to_go(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """Computes discounted returns, `R_t = r_t + gamma * R_{t+1}`.

    These are REINFORCE++'s advantages before whitening (arXiv 2501.03262, equation 4, with gamma = 1).

    Args:
        rewards: [N, L], per token.
        mask: [N, L].
        gamma: Discount factor, 0 to 1.

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
    """Computes REINFORCE++'s advantages before whitening. Equations 5 and 7 are `whiten`.

    Args:
        rewards: [N].
        mask: [N, L].
        kl: [N, L], without gradient. None for the baseline variant, whose penalty (k2) is in the loss.
        beta: Weight of `kl`.
        gamma: Discount factor, 0 to 1.
        group_size: G for the baseline variant, which subtracts the group's mean reward (equation 6). None: no
            baseline.

    Returns:
        [N, L].
    """
    baselined = rewards if group_size is None else _centred(rewards.view(-1, group_size)).view(-1)
    return returns_to_go(token_rewards(baselined, mask, kl, beta), mask, gamma)


def moments(values: Tensor, mask: Tensor) -> Tensor:
    """Computes number, sum and sum of squares of the values at the mask. They can be summed over ranks.

    Args:
        values: [N, L].
        mask: [N, L].

    Returns:
        float64 [3]. In float32 the variance would be lost in the difference of two large numbers.
    """
    chosen = values[mask].double()
    return torch.stack([chosen.new_tensor(len(chosen)), chosen.sum(), chosen.square().sum()])


def whiten(values: Tensor, mask: Tensor, stats: Tensor | None = None, epsilon: float = 1e-8) -> Tensor:
    """Normalises values to mean 0 and variance 1: `(x - mean) / (std + epsilon)` (arXiv 2501.03262, equations 5 and 7).

    Args:
        values: [N, L].
        mask: [N, L].
        stats: `moments` summed over ranks. Default: those of `values`.
        epsilon: Keeps equal values at 0.

    Returns:
        [N, L].
    """
    count, total, squares = (moments(values, mask) if stats is None else stats).unbind()
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    whitened = (values.double() - mean) / (std + epsilon)
    return whitened.to(values.dtype).masked_fill(~mask, 0)
