"""From rewards to advantages."""

from __future__ import annotations

from torch import Tensor


def group_relative(rewards: Tensor, group_size: int, epsilon: float = 1e-4) -> Tensor:
    """Rewards against their group: `A_i = (r_i - mean(r)) / (std(r) + epsilon)`.

    GRPO (arXiv 2402.03300, section 4.1.2), with the sample standard deviation.

    Args:
        rewards: [N], the G members of a group next to one another.
        group_size: G, at least 2.
        epsilon: Keeps groups of equal rewards at zero.

    Returns:
        [N].
    """
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    return (centred / (groups.std(dim=1, keepdim=True) + epsilon)).view(-1)


def zero_variance_share(rewards: Tensor, group_size: int) -> float:
    """Share of groups in which all rewards are equal: such groups teach nothing."""
    groups = rewards.view(-1, group_size)
    return (groups == groups[:, :1]).all(dim=1).float().mean().item()
