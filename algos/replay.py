"""Selective sample replay: groups that taught something, again in the place of groups that teach nothing.

SSR (VL-Rethinker, arXiv 2504.08837). A group whose rewards are all alike has no advantage; the more a model can do, the
more of its batches are such groups. Here they give way to groups of earlier steps.
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
    """The newest groups whose rewards differed, in this process.

    What is learnt from again was sampled by earlier weights. So batches are marked as another policy's, and the trainer
    weighs each of their tokens by how likely the present policy is to sample it (`vlmenv.algos.correction`).

    Args:
        capacity: Groups to keep.
        group_size: G.
    """

    def __init__(self, capacity: int, group_size: int) -> None:
        self._size = group_size
        self._kept: deque[tuple[Rollouts, float]] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self._kept)

    def fill(self, rollouts: Rollouts, rng: np.random.Generator) -> tuple[Rollouts, NDArray[np.bool_]]:
        """Puts kept groups in the place of those that teach nothing, as far as there are any.

        No group is drawn twice. The chance of each is in proportion to its mean advantage, as to size.

        Args:
            rollouts: Of P groups.
            rng: To draw from.

        Returns:
            P groups, and which of them are replayed, [P].
        """
        uniform = (~rollouts.informative_groups(self._size)).numpy()
        drawn = self._draw(int(uniform.sum()), rng)
        replayed = np.zeros_like(uniform)
        replayed[np.flatnonzero(uniform)[: len(drawn)]] = True
        if drawn:
            left = iter(drawn)
            groups = [next(left) if again else rollouts[self._rows(i)] for i, again in enumerate(replayed)]
            rollouts = Rollouts.joined(groups)
        return replace(rollouts, rollout=replace(rollouts.rollout, own=False)), replayed

    def keep(self, rollouts: Rollouts, advantages: Tensor, mask: Tensor, replayed: NDArray[np.bool_]) -> None:
        """Keeps the groups that taught something; the oldest kept ones go.

        Args:
            rollouts: Of P groups, as `fill` gave them.
            advantages: Their completions', [N, L] or [N, 1].
            mask: Tokens that were learnt from, [N, L].
            replayed: Those that are kept already, [P].
        """
        means = (advantages.abs() * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        sizes = means.view(-1, self._size).mean(dim=1).tolist()
        for i, size in enumerate(sizes):
            if size > 0 and not replayed[i]:
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
        """What is kept now; cheap, for groups do not change."""
        return list(self._kept)

    @staticmethod
    def state_dict(snapshot: list[tuple[Rollouts, float]]) -> dict[str, Any]:
        """A snapshot in plain containers and tensors."""
        return {"groups": [(rollouts.state_dict(), size) for rollouts, size in snapshot]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._kept.clear()
        self._kept.extend((Rollouts.from_state(rollouts), size) for rollouts, size in state["groups"])


def _afresh(rollouts: Rollouts) -> Rollouts:
    """A copy with prompts of its own, for which no features of a frozen vision tower are kept in memory."""
    prompts = [replace(prompt) for prompt in rollouts.rollout.prompts]
    return replace(rollouts, rollout=replace(rollouts.rollout, prompts=prompts))
