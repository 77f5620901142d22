"""Metrics of several ranks are those of all their completions together."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch

from vlmenv.algos.batch import Rollouts
from vlmenv.algos.correction import mismatch
from vlmenv.algos.means import Mean, over_ranks, told_mean
from vlmenv.core.rollout import Completion, Prompt, Rollout


def rollouts(lengths: list[int], rewards: list[float], tasks: list[str], terms: list[dict[str, float]]) -> Rollouts:
    prompts = [Prompt(np.zeros(3, np.int64), np.zeros((3, 3), np.int64), {}) for _ in lengths]
    texts = [Completion("", np.arange(n) % 3, np.zeros(n, np.float32), "stop" if n < 9 else "length") for n in lengths]
    records: list[dict[str, Any]] = [
        {"task": task, "index": i, "rewards": own, "traits": own}
        for i, (task, own) in enumerate(zip(tasks, terms, strict=True))
    ]
    return Rollouts(Rollout(prompts, np.arange(len(lengths)), texts, 1.0), torch.tensor(rewards), records)


FIRST = rollouts([2, 9, 7, 12], [0.0, 1.0, 0.5, 0.5], ["a", "a", "a", "b"], [{"t": 1.0}, {}, {}, {"t": 0.0}])
SECOND = rollouts([5, 1, 3, 9], [2.0, 3.0, 2.5, 9.0], ["b", "b", "a", "b"], [{"t": 0.3}, {"t": 0.2}, {"t": 0.0}, {}])


def test_ranks_weigh_by_what_they_hold() -> None:
    """Terms that few rows have, tasks with other numbers of rows, the deviation over all, and extremes of each task."""
    second = SECOND[np.arange(4)]
    for record in second.records:
        record["index"] += 4
    together = Rollouts.joined([FIRST, second]).metrics()
    assert over_ranks([FIRST.metrics(), second.metrics()]) == pytest.approx(together)
    assert together["task/a/completion/min_length"] == 2
    assert together["reward/t"] == pytest.approx(1.5 / 5)


def test_tokens_weigh_alike() -> None:
    """Between an engine and the trainer, too."""
    generator = torch.Generator().manual_seed(0)
    far, near = torch.randn(3, 4, generator=generator), torch.randn(3, 4, generator=generator) / 10
    masks = torch.ones(3, 4, dtype=torch.bool), torch.arange(12).view(3, 4) < 2
    found = over_ranks([mismatch(far, masks[0], "token", 2.0), mismatch(near, masks[1], "token", 2.0)])
    together = mismatch(torch.cat([far, near]), torch.cat(masks), "token", 2.0)
    for name in ("policy/sampler_kl", "policy/correction_clipped"):
        assert found[name] == pytest.approx(together[name])


def test_one_rank_keeps_its_numbers() -> None:
    metrics = FIRST.metrics() | {"loss": 0.1}
    assert over_ranks([metrics]) == metrics
    assert all(type(value) is float for value in over_ranks([metrics]).values())


def test_counts_go_between_processes() -> None:
    again = pickle.loads(pickle.dumps(Mean(0.5, 3)))
    assert (again, again.count) == (0.5, 3)


def test_no_values_have_no_mean() -> None:
    assert told_mean("x", torch.tensor([])) == {}
    assert over_ranks([told_mean("x", torch.tensor([])), {"x": Mean(2.0, 5)}]) == {"x": 2.0}
