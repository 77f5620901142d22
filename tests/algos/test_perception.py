"""PAPO and VPPO against their papers' formulas, written out here in float64, and in the trainer."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers import LENGTHS, MASK, OLD, REWARDS, numbers, scored
from torch import Tensor

from vlmenv.agents.vlm import VLMAgent
from vlmenv.algos import (
    ALGORITHMS,
    GRPO,
    OPD,
    PPO,
    RLOO,
    Algorithm,
    GRPOConfig,
    LossInputs,
    OPDConfig,
    PPOConfig,
    ReinforcePlusPlus,
    ReinforcePlusPlusConfig,
    RLOOConfig,
    Scored,
    Trainer,
    TrainerConfig,
)
from vlmenv.algos.batch import Batch, Rollouts
from vlmenv.algos.papo import PAPO, PAPOConfig
from vlmenv.algos.vppo import VPPO, VPPOConfig, top_tokens
from vlmenv.core.errors import ConfigError
from vlmenv.core.masking import masked
from vlmenv.core.rollout import unbatch

NOW, BLIND = (OLD + 0.3 * numbers(1)) * MASK, (OLD + 2.5 * numbers(2)) * MASK


def clipped(logprobs: Tensor, advantages: Tensor, high: float) -> Tensor:
    ratio = (logprobs - OLD).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1 + high) * advantages)


def low_variance_kl(logprobs: Tensor, others: Tensor) -> Tensor:
    kl = (others - logprobs).clamp(-20, 20)
    return (kl.exp() - kl - 1).clamp(-10, 10)


def test_papo_is_the_papers_loss() -> None:
    """Gradients flow through both policies. In the authors' code they do so only if it recomputes the masked one."""
    algorithm = PAPO(PAPOConfig(group_size=4, perception_weight=0.02, entropy_loss=0.03, masked_entropy_loss=0.05))
    advantages = algorithm.credit(scored(REWARDS, mask=MASK, old_logprobs=OLD)).advantages
    leaves = [one.clone().requires_grad_() for one in (NOW, BLIND)]
    weights = MASK.double() / MASK.sum()
    found = algorithm.loss(LossInputs(leaves[0], OLD, advantages, MASK, weights, masked_logprobs=leaves[1]))
    kl = low_variance_kl(*leaves)
    assert (kl[MASK] == 10).any()  # the bound is in play
    per_token = clipped(leaves[0], advantages, 0.2) - 0.02 * kl - 0.03 * leaves[0] - 0.05 * leaves[1]
    expected = per_token[MASK].mean()
    torch.testing.assert_close(found.loss, expected, rtol=0, atol=1e-12)
    wanted = torch.autograd.grad(expected, leaves)
    torch.testing.assert_close(torch.autograd.grad(found.loss, leaves), wanted, rtol=0, atol=1e-12)
    assert found.sums["policy/perception"].item() == pytest.approx(kl[MASK].sum().item())


def test_vppo_is_the_papers_loss() -> None:
    algorithm = VPPO(VPPOConfig(group_size=4, epsilon_high=0.28))
    given = scored(REWARDS, mask=MASK, old_logprobs=OLD, masked_logprobs=BLIND, sees=torch.ones(8, dtype=torch.bool))
    logprobs = NOW.clone().requires_grad_()
    weights = MASK.double() / MASK.sum()
    loss = algorithm.loss(LossInputs(logprobs, OLD, algorithm.credit(given).advantages, MASK, weights)).loss

    kl = low_variance_kl(OLD, BLIND).clamp(min=0)
    score = (kl * MASK).sum(dim=1) / LENGTHS
    norm = (score - score.min()) / (score.max() - score.min())
    factor = 0.9 + norm * ((1 - 0.9) / norm.mean())
    assert factor.mean().item() == pytest.approx(1)
    rewards = torch.tensor(REWARDS, dtype=torch.float64).view(2, 4)
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).view(8, 1)
    chosen = torch.zeros(8, 6)
    for row, length in enumerate(LENGTHS.tolist()):
        chosen[row, kl[row, :length].topk(int(np.ceil(length * 0.4))).indices] = 1
    surrogate = clipped(logprobs, advantages * factor[:, None], 0.28) * chosen
    expected = (surrogate - 0.06 * logprobs)[MASK].mean()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-9)
    slopes = (torch.autograd.grad(one, logprobs)[0] for one in (loss, expected))
    torch.testing.assert_close(*slopes, rtol=0, atol=1e-9)


def test_vppo_learns_from_all_tokens_where_there_is_no_image() -> None:
    """Whatever the log-probabilities are: rounding in half precision tells them apart too."""
    algorithm = VPPO(VPPOConfig(group_size=4))
    sees = torch.tensor([True] * 4 + [False] * 4)
    given = scored(REWARDS, mask=MASK, old_logprobs=OLD, masked_logprobs=OLD + 0.01 * numbers(3) * MASK, sees=sees)
    advantages = algorithm.credit(given).advantages
    assert (advantages != 0)[4:].all()
    assert (advantages != 0)[:4].sum(dim=1).tolist() == [3, 1, 2, 1]  # .4 of 6, 2, 5 and 1 tokens
    alone = algorithm.credit(replace(given, sees=torch.zeros(8, dtype=torch.bool))).advantages
    torch.testing.assert_close(alone, GRPO(algorithm.config).advantages(given).expand(8, 6), rtol=0, atol=0)


@pytest.mark.parametrize("share", ["0.3", "0.4", "0.6", "0.07", "1"])
def test_the_share_of_tokens_is_rounded_up_as_a_fraction_is(share: str) -> None:
    mask = torch.arange(200) < torch.arange(1, 201)[:, None]
    found = top_tokens(torch.rand(200, 200), mask, float(share))
    assert found.sum(dim=1).tolist() == [math.ceil(n * Fraction(share)) for n in range(1, 201)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: PAPOConfig(perception_weight=-1.0),
        lambda: VPPOConfig(visual_share=0.0),
        lambda: VPPOConfig(visual_floor=1.5),
        lambda: VPPOConfig(objective="gmpo", aggregation="sequence"),
        lambda: VPPOConfig(ratio="sequence"),
        lambda: TrainerConfig(mask_share=0.0),
        lambda: TrainerConfig(visual_dependence_every=0),
    ],
)
def test_options_out_of_range_are_refused(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()


def trainer_of(agent: VLMAgent, algorithm: Algorithm, **options: Any) -> Trainer:
    size = algorithm.config.group_size
    envs = gymnasium.make_vec("VLM-VQA-v0", num_envs=3 * size, group_size=size)
    return Trainer(agent, envs, algorithm, TrainerConfig(steps=2, **options), Accelerator(cpu=True))


def gradient(agent: VLMAgent) -> Tensor:
    found = torch.cat([p.grad.flatten() for p in agent.parameters() if p.grad is not None])
    agent.policy.zero_grad()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("size", [None, 5])
def test_the_masked_image_is_one_more_prompt_of_the_same_pass(builtin: VLMAgent, size: int | None) -> None:
    """The gradient is that of two batches, one after the other, whatever the micro-batches."""
    algorithm = PAPO(PAPOConfig(group_size=4, perception_weight=0.5, masked_entropy_loss=0.3, entropy_loss=0.1))
    trainer = trainer_of(builtin, algorithm, micro_batch_size=size)
    observations = unbatch(trainer.envs.reset(seed=0)[0])
    rollout = builtin.rollout(observations)
    batch = Batch.of(rollout, builtin.device, torch.linspace(-1, 1, 12))
    batch.masked = builtin.reprompted(rollout, masked(observations, 0.6, seed=3))
    assert len(batch.masked.prompts) == 3
    trainer.optimizer.zero_grad()
    trainer.backward(batch)
    found = gradient(builtin)
    blind = builtin.reprompted(rollout, masked(observations, 0.6, seed=3))
    both = [builtin.logprobs(one).values for one in (rollout, blind)]
    weights = batch.mask / batch.mask.sum()
    inputs = LossInputs(both[0], batch.old_logprobs, batch.advantages, batch.mask, weights, masked_logprobs=both[1])
    algorithm.loss(inputs).loss.backward()
    torch.testing.assert_close(found, gradient(builtin), rtol=0, atol=1e-6)
    assert (both[0] - both[1]).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["papo_g", "vppo"])
def test_they_train_and_tell_how_much_the_policy_looks(builtin: VLMAgent, name: str) -> None:
    kind, config = ALGORITHMS[name]
    results = list(trainer_of(builtin, kind(config), visual_dependence_every=2).train(seed=0))
    assert "vision/dependence" not in results[0].metrics
    assert results[1].metrics["vision/dependence"] > 0
    assert all(one.metrics["policy/skipped"] == 0 for one in results)


def test_a_policy_that_answers_without_looking_depends_on_nothing(builtin: VLMAgent) -> None:
    """The vision tower's features are taken away, so masks change nothing. Training is as without the measurement."""
    kind, config = ALGORITHMS["grpo"]
    family = builtin.family
    for projector in family.projectors():
        for parameter in projector.parameters():
            torch.nn.init.zeros_(parameter)
            parameter.requires_grad_(False)
    trainer = trainer_of(builtin, kind(config), visual_dependence_every=1)
    (result,) = [next(trainer.train(seed=0))]
    assert result.metrics["vision/dependence"] == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_dependence_is_that_of_this_steps_policy(builtin: VLMAgent) -> None:
    """Replayed groups are of another."""
    trainer = trainer_of(builtin, GRPO(GRPOConfig(group_size=4, replay=3)), visual_dependence_every=1)
    shown, _ = trainer.envs.reset(seed=0)
    rollout = builtin.rollout(shown)
    rollouts = Rollouts.scored(shown, rollout, np.zeros(12), {})
    batch = Batch.of(rollout, builtin.device)
    batch.masked = builtin.reprompted(rollout, masked(rollouts.observations(), 0.6))
    found = trainer._dependence(batch, rollouts, np.array([False, True, False]))
    with torch.no_grad():
        falls = builtin.logprobs(rollout).values - builtin.logprobs(batch.masked).values
    fresh = batch.mask & (torch.arange(12)[:, None] // 4 != 1)
    assert found == {"vision/dependence": pytest.approx(float(falls[fresh].mean()), abs=1e-6)}
    assert abs(float(falls[batch.mask].mean()) - found["vision/dependence"]) > 1e-3
    assert trainer._dependence(batch, rollouts, np.ones(3, np.bool_)) == {}


def texts(folder: Path) -> str:
    """A data set of questions without images."""
    rows = [json.dumps({"question": f"What is {i} plus {i}?", "answer": str(2 * i)}) for i in range(8)]
    (folder / "texts.jsonl").write_text("\n".join(rows) + "\n")
    return str(folder / "texts.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "other"),
    [
        (VPPO(VPPOConfig(group_size=4)), "masked_logprobs"),
        (OPD(OPDConfig(group_size=4)), "teacher_logprobs"),
        (RLOO(RLOOConfig(group_size=4, beta=0.1)), "ref_logprobs"),
        (PPO(PPOConfig(group_size=4, minibatches=1, beta=0.1)), "ref_logprobs"),
        (ReinforcePlusPlus(ReinforcePlusPlusConfig(group_size=4, beta=0.1)), "ref_logprobs"),
    ],
    ids=lambda given: given if isinstance(given, str) else given.name,
)
def test_in_half_precision_log_probabilities_that_are_compared_are_of_one_pass(
    builtin: VLMAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: Algorithm, other: str
) -> None:
    """After texts alone, and of equal policies, they are equal, bit for bit; the sampler's are not."""
    envs = gymnasium.make_vec("VLM-VQA-v0", num_envs=8, group_size=4, dataset=texts(tmp_path))
    given: list[Scored] = []
    credit = algorithm.credit
    monkeypatch.setattr(algorithm, "credit", lambda scored: (given.append(scored), credit(scored))[1])
    if algorithm.wants_values:
        builtin.add_value_head()
    teacher = VLMAgent.from_pretrained("builtin") if algorithm.wants_teacher else None
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    made = Trainer(builtin, envs, algorithm, TrainerConfig(steps=1), accelerator, teacher)
    (result,) = made.train(seed=0)
    (one,) = given
    assert torch.equal(one.old_logprobs, getattr(one, other))
    assert not torch.equal(one.old_logprobs, Batch.of(result.rollouts.rollout, builtin.device).old_logprobs)
