"""Selective replay of groups that taught something."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from vlmenv.algos import GRPO, GRPOConfig, Trainer, TrainerConfig
from vlmenv.algos.bandit import START, Bandit, TabularAgent
from vlmenv.algos.batch import Batch, Rollouts
from vlmenv.algos.replay import Replay
from vlmenv.core.errors import ConfigError
from vlmenv.core.rollout import Completion, Prompt, Rollout


def rollouts(*groups: tuple[float, ...], mark: str = "new") -> Rollouts:
    """A group for each tuple of rewards; its completions say which it is."""
    size = len(groups[0])
    one = np.zeros(1, np.int64)
    prompts = [Prompt(one, np.zeros((3, 1), np.int64), {}) for _ in groups]
    texts = [f"{mark} {i}.{j}" for i in range(len(groups)) for j in range(size)]
    completions = [Completion(text, one, np.zeros(1, np.float32), "stop") for text in texts]
    rollout = Rollout(prompts, np.repeat(np.arange(len(groups)), size), completions, temperature=1.0)
    return Rollouts(rollout, torch.tensor(groups).flatten(), [{"completion": text} for text in texts], [])


def learnt(count: int) -> torch.Tensor:
    """The mask of completions of one token that are all learnt from."""
    return torch.ones(count, 1, dtype=torch.bool)


def kept(*sizes: float, capacity: int = 99) -> Replay:
    """A store with a group of advantages of each size."""
    replay = Replay(capacity, 2)
    old = rollouts(*[(0.0, 1.0)] * len(sizes), mark="old")
    advantages = torch.tensor([(-size, size) for size in sizes]).flatten()[:, None]
    replay.keep(old, advantages, learnt(len(advantages)), np.zeros(len(sizes), bool))
    return replay


def test_groups_that_teach_nothing_give_way_and_no_others() -> None:
    replay, new = kept(1.0, 1.0, 1.0), rollouts((1.0, 1.0), (0.0, 1.0), (0.0, 0.0), (1.0, 0.0))
    filled, replayed = replay.fill(new, np.random.default_rng(0))
    assert replayed.tolist() == [True, False, True, False]
    texts = [record["completion"] for record in filled.records]
    assert texts == filled.rollout.texts
    assert [text[:3] for text in texts] == ["old"] * 2 + ["new"] * 2 + ["old"] * 2 + ["new"] * 2
    assert texts[2:4] == ["new 1.0", "new 1.1"]
    assert texts[0][:-1] != texts[4][:-1]  # none is drawn twice
    assert filled.rewards.tolist() == [0, 1, 0, 1, 0, 1, 1, 0]
    assert not filled.rollout.from_trainer
    assert new.rollout.from_trainer  # what was given has not changed


def test_where_too_few_are_kept_the_rest_stays() -> None:
    filled, replayed = kept(1.0).fill(rollouts((1.0, 1.0), (0.0, 0.0)), np.random.default_rng(0))
    assert replayed.tolist() == [True, False]
    assert filled.rollout.texts == ["old 0.0", "old 0.1", "new 1.0", "new 1.1"]
    _, replayed = Replay(4, 2).fill(rollouts((1.0, 1.0)), np.random.default_rng(0))
    assert replayed.tolist() == [False]


def test_the_chance_is_in_proportion_to_the_advantages() -> None:
    replay, rng, new = kept(0.5, 1.0, 2.5), np.random.default_rng(0), rollouts((1.0, 1.0))
    drawn = [replay.fill(new, rng)[0].rollout.texts[0] for _ in range(2000)]
    shares = [drawn.count(f"old {i}.0") / 2000 for i in range(3)]
    assert shares == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.04)


def test_the_newest_that_taught_something_are_kept() -> None:
    replay = kept(1.0, capacity=2)
    new = rollouts((0.0, 1.0), (0.0, 1.0), (1.0, 1.0), (0.0, 1.0))
    advantages = torch.tensor([1, -1, 2, -2, 0, 0, 3, -3.0])[:, None]
    replay.keep(new, advantages, learnt(8), np.array([False, False, False, True]))
    assert len(replay) == 2
    assert [(group.rollout.texts[0], size) for group, size in replay.snapshot()] == [("new 0.0", 1.0), ("new 1.0", 2.0)]


def test_equal_rewards_are_not_kept_whatever_a_teacher_says_of_them() -> None:
    """They would replace others of their kind."""
    replay, new = Replay(4, 2), rollouts((0.5, 0.5), (0.0, 1.0))
    replay.keep(new, torch.tensor([[3.0], [1.0], [-1.0], [1.0]]), learnt(4), np.zeros(2, bool))
    assert [group.rollout.texts[0] for group, _ in replay.snapshot()] == ["new 1.0"]


def test_the_distance_from_a_teacher_is_that_of_fresh_groups() -> None:
    made = trainer(TabularAgent(START), GRPOConfig(group_size=2, replay=4))
    batch = Batch.of(rollouts((0.0, 1.0), (0.0, 1.0)).rollout, torch.device("cpu"))
    batch.teacher_logprobs = batch.old_logprobs - torch.tensor([[1.0], [2.0], [30.0], [40.0]])
    fresh = {"policy/teacher_kl": 1.5, "policy/teacher_bounded": 0.0}
    assert made._distances(batch, np.array([False, True])) == fresh
    assert made._distances(batch, np.array([True, True])) == {}
    batch.mask[:2] = False  # nothing to learn from, as where the limit has cut all off
    batch.masked_logprobs = batch.teacher_logprobs
    assert made._distances(batch, np.array([False, True])) == {"policy/perception_bounded": 1.0}
    batch.mask[:] = False
    assert made._distances(batch, np.array([False, False])) == {}


def test_what_was_not_learnt_from_is_not_kept() -> None:
    """Completions that the limit cut off may have advantages, and are masked; padding counts for nothing."""
    replay, new = Replay(4, 2), rollouts((0.0, 1.0), (0.0, 1.0))
    mask = torch.tensor([[0, 0], [0, 0], [1, 0], [1, 1]], dtype=torch.bool)
    replay.keep(new, torch.tensor([[3.0, 3], [-3, -3], [1, 5], [-2, -4]]), mask, np.zeros(2, bool))
    assert [(group.rollout.texts[0], size) for group, size in replay.snapshot()] == [("new 1.0", 2.0)]


def test_what_a_frozen_tower_saw_is_not_kept() -> None:
    """It would take memory for as long as its group is kept."""
    replay, new = Replay(4, 2), rollouts((0.0, 1.0))
    seen = WeakKeyDictionary({new.rollout.prompts[0]: "features"})  # as a policy keeps them
    replay.keep(new, torch.tensor([[1.0], [-1.0]]), learnt(2), np.zeros(1, bool))
    for _ in range(2):
        filled, _ = replay.fill(rollouts((1.0, 1.0)), np.random.default_rng(0))
        assert filled.rollout.prompts[0] not in seen
        seen[filled.rollout.prompts[0]] = "features"
    assert len(seen) == 2
    del new, filled
    assert not seen


def trainer(agent: TabularAgent, config: GRPOConfig, **options: Any) -> Trainer:
    options = {"steps": 1, "lr": 0.05, "warmup_steps": 0, "lr_schedule": "constant"} | options
    envs = Bandit(num_groups=3, group_size=config.group_size)
    return Trainer(agent, envs, GRPO(config), TrainerConfig(**options), Accelerator(cpu=True))


def test_replayed_tokens_are_weighted_by_importance() -> None:
    """The gradient is that of sum(min(pi / mu, cap) * A * log pi) / tokens, with mu the policy that sampled."""
    config = GRPOConfig(group_size=4, replay=8, epsilon=0.2)
    agent = TabularAgent(START)
    made = trainer(agent, config)
    agent.seed(0)
    observations, _ = made.envs.reset(seed=0)
    rollout = agent.rollout(observations)
    rewards = torch.arange(12.0) % 4
    mu = torch.from_numpy(np.concatenate([c.logprobs for c in rollout.completions]))
    taught = Rollouts(rollout, rewards, [{} for _ in range(12)], [()] * 12)
    assert made.replay is not None
    made.replay.keep(taught, torch.ones(12, 1), learnt(12), np.zeros(3, bool))
    with torch.no_grad():
        agent.table.logits.add_(torch.randn(START.shape, generator=torch.Generator().manual_seed(1)))
    dull = replace(taught, rewards=torch.zeros(12))
    filled, replayed = made.replay.fill(dull, np.random.default_rng(0))
    assert replayed.all()
    batch = made._credited(filled, np.random.default_rng(0))
    made._correct(batch, filled.rollout)
    made.optimizer.zero_grad()
    made.backward(batch)
    found = agent.table.logits.grad
    assert found is not None
    found = found.clone()

    order = [int(prompt.input_ids[0]) for prompt in filled.rollout.prompts]
    sampled = torch.cat([mu.new_tensor(c.logprobs) for c in filled.rollout.completions])
    now = agent.policy(filled.rollout)
    flat = now.values[now.mask]
    weights = (flat.detach() - sampled).exp()
    assert weights.max() > 2 > 1 > weights.min()  # so that the cap matters, and what is below it
    advantages = (torch.arange(4.0) - 1.5) / torch.arange(4.0).std()
    each = advantages.repeat(3)[:, None].expand_as(now.values)[now.mask]
    agent.table.logits.grad = None
    (-(weights.clamp(max=2) * each * flat).sum() / len(flat)).backward()
    assert sorted(order) == [0, 1, 2]
    torch.testing.assert_close(found, agent.table.logits.grad, atol=1e-5, rtol=1e-4)


def test_training_replays_and_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a bandit that the policy comes to answer all alike: then most of a batch is replayed."""
    agent = TabularAgent(START)
    made = trainer(agent, GRPOConfig(group_size=4, replay=16), steps=60)
    before = agent.probabilities()
    results = list(made.train(seed=0))
    shares = [result.metrics["replayed"] for result in results]
    assert shares[0] == 0
    assert max(shares) > 0
    assert len(results[0].rollouts.records) == 12
    best = torch.tensor([0, 4, 2])
    gained = (agent.probabilities() - before)[torch.arange(3), best]
    assert gained.sum() > 0


def test_what_is_kept_is_part_of_a_checkpoint() -> None:
    replay, again = kept(0.5, 2.0), Replay(99, 2)
    again.load_state_dict(Replay.state_dict(replay.snapshot()))
    new = rollouts((1.0, 1.0), (0.0, 0.0))
    for seed in range(5):
        a, b = (one.fill(new, np.random.default_rng(seed))[0].rollout.texts for one in (replay, again))
        assert a == b


def test_the_store_is_not_negative() -> None:
    with pytest.raises(ConfigError, match="replay must be at least 0"):
        GRPOConfig(replay=-1)
