"""Selective sample replay (SSR, VL-Rethinker, arXiv 2504.08837).

A group with equal rewards has no advantage. The better a model gets, the more of its groups have equal rewards. Replay
replaces them by groups of earlier steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vlmenv.algos.batch import Rollouts


class Replay:
    """The newest groups with differing rewards, on this rank.

    Earlier weights sampled the replayed groups. So `fill` marks its batch as another policy's, and the trainer applies
    importance weights (`vlmenv.algos.correction`).

    Args:
        capacity: Number of groups to keep.
        group_size: G.
    """

    def __init__(self, capacity: int, group_size: int) -> None:
        self._size = group_size
        self._kept: deque[tuple[Rollouts, float]] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self._kept)

    def fill(self, rollouts: Rollouts, rng: np.random.Generator) -> tuple[Rollouts, NDArray[np.bool_]]:
        """Replaces groups with equal rewards by kept groups.

        No group is drawn twice. A group's probability is proportional to its mean absolute advantage.

        Args:
            rollouts: Completions of P groups.
            rng: Random generator of the draws.

        Returns:
            Completions of P groups; and bool [P], True for replayed groups.
        """
        uniform = (~rollouts.informative_groups(self._size)).numpy()
        drawn = self._draw(int(uniform.sum()), rng)
        replayed = np.zeros_like(uniform)
        replayed[np.flatnonzero(uniform)[: len(drawn)]] = True
        if drawn:
            left = iter(drawn)
            groups = [next(left) if again else rollouts[self._rows(i)] for i, again in enumerate(replayed)]
            rollouts = Rollouts.joined(groups)
        return replace(rollouts, rollout=replace(rollouts.rollout, from_trainer=False)), replayed

    def keep(self, rollouts: Rollouts, advantages: Tensor, mask: Tensor, replayed: NDArray[np.bool_]) -> None:
        """Keeps the groups with differing rewards and nonzero advantages; the oldest beyond the capacity go.

        Advantages alone do not tell: a teacher's are nonzero in groups with equal rewards too.

        Args:
            rollouts: Completions of P groups, as `fill` returned them.
            advantages: [N, L] or [N, 1].
            mask: bool [N, L], True at the tokens to learn from.
            replayed: bool [P], True for groups that are kept already.
        """
        means = (advantages.abs() * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        sizes = means.view(-1, self._size).mean(dim=1).tolist()
        differ = rollouts.informative_groups(self._size).tolist()
        for i, size in enumerate(sizes):
            if differ[i] and size > 0 and not replayed[i]:
                self._kept.append((_afresh(rollouts[self._rows(i)]), size))

    def _rows(self, group: int) -> slice:
        return slice(group * self._size, (group + 1) * self._size)

    def _draw(self, wanted: int, rng: np.random.Generator) -> list[Rollouts]:
        count = min(wanted, len(self._kept))
        if not count:
            return []
        sizes = np.array([size for _, size in self._kept])
        chosen = rng.choice(len(sizes), count, replace=False, p=sizes / sizes.sum())
        return [_afresh(self._kept[i][0]) for i in chosen]

    def snapshot(self) -> list[tuple[Rollouts, float]]:
        """The groups that are kept now. No group is copied, because groups do not change."""
        return list(self._kept)

    @staticmethod
    def state_dict(snapshot: list[tuple[Rollouts, float]]) -> dict[str, Any]:
        """Converts a snapshot to plain containers and tensors."""
        return {"groups": [(rollouts.state_dict(), size) for rollouts, size in snapshot]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._kept.clear()
        self._kept.extend((Rollouts.from_state(rollouts), size) for rollouts, size in state["groups"])


def _afresh(rollouts: Rollouts) -> Rollouts:
    """A copy with new prompts and completions, so that no features of a frozen vision tower stay cached."""
    rollout = rollouts.rollout
    prompts = [replace(prompt) for prompt in rollout.prompts]
    completions = [replace(one) if one.images else one for one in rollout.completions]
    return replace(rollouts, rollout=replace(rollout, prompts=prompts, completions=completions))
