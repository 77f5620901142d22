from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from accelerate import Accelerator

from vlmenv.agents.vlm import VLMAgent
from vlmenv.algos import (
    GRPO,
    PPO,
    GRPOConfig,
    LossInputs,
    LossOutput,
    NonFiniteError,
    PPOConfig,
    Trainer,
    TrainerConfig,
)
from vlmenv.algos.batch import Batch
from vlmenv.core.errors import ConfigError, DataError


def make(
    agent: VLMAgent,
    *,
    num_envs: int = 12,
    grpo: GRPOConfig | None = None,
    env: Any = None,
    precision: str = "no",
    **options: Any,
) -> Trainer:
    grpo = grpo or GRPOConfig(group_size=4)
    envs = gymnasium.make_vec("VLM-REC-v0", num_envs=num_envs, group_size=grpo.group_size, **(env or {}))
    return Trainer(agent, envs, GRPO(grpo), TrainerConfig(**options), Accelerator(cpu=True, mixed_precision=precision))


def gradient(trainer: Trainer, rollout: Any, advantages: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    trainer.optimizer.zero_grad()
    sums = trainer.backward(Batch.of(rollout, trainer.agent.device, advantages))
    return torch.cat([p.grad.flatten() for p in trainer.agent.parameters() if p.grad is not None]), sums


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3, 4, 5, 12])
def test_the_gradient_does_not_depend_on_the_micro_batches(builtin: VLMAgent, size: int) -> None:
    grpo = GRPOConfig(group_size=4, beta=0.1)
    whole = make(builtin, grpo=grpo)
    rollout = builtin.rollout(whole.envs.reset(seed=0)[0])
    with torch.no_grad():
        builtin.family.model.lm_head.weight.mul_(1.02)  # so that ratio and divergence matter
    advantages = torch.linspace(-1, 1, 12)
    expected, expected_sums = gradient(whole, rollout, advantages)
    whole.config = TrainerConfig(micro_batch_size=size)
    found, sums = gradient(whole, rollout, advantages)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    for name, value in sums.items():
        torch.testing.assert_close(value, expected_sums[name], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize(("options", "passes"), [({}, 0), ({"mu": 2}, 1), ({"minibatches": 2}, 1)])
def test_the_old_log_probabilities_are_the_learners(
    builtin: VLMAgent, precision: str, options: dict[str, int], passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sampler's are, exactly enough in float32; in bfloat16 another pass gives them, unless the first one does."""
    logratios, calls = [], []
    loss, logprobs = GRPO.loss, VLMAgent.logprobs

    def note(self: GRPO, inputs: LossInputs) -> LossOutput:
        logratios.append((inputs.logprobs - inputs.old_logprobs).detach()[inputs.mask])
        return loss(self, inputs)

    monkeypatch.setattr(GRPO, "loss", note)
    monkeypatch.setattr(VLMAgent, "logprobs", lambda self, rollout: calls.append(1) or logprobs(self, rollout))
    trainer = make(builtin, grpo=GRPOConfig(group_size=4, **options), steps=1, lr=1e-3, precision=precision)
    list(trainer.train(seed=0))
    first = logratios[0].abs().max()
    assert first < 1e-5 if precision == "no" else first == 0
    assert len(calls) == len(logratios) + (passes if precision == "bf16" else 0)
    assert len(logratios) == 1 + passes
    if "mu" in options:
        assert logratios[1].abs().max() > 1e-3  # the second pass is of other weights


@pytest.mark.slow
def test_a_reward_that_can_be_had_is_learnt(builtin: VLMAgent) -> None:
    """A callable reward for boxes that begin at the left edge: rare at first, common after 40 steps."""

    def left(text: str, target: object) -> float:
        return float("<answer>[0," in text or "<answer>[1," in text or "<answer>[2," in text)

    trainer = make(builtin, num_envs=32, env={"rewards": {left: 1.0}}, steps=40, lr=5e-4, lr_schedule="constant")
    rewards = [result.metrics["reward/left"] for result in trainer.train(seed=0)]
    assert np.mean(rewards[-10:]) > np.mean(rewards[:10]) + 0.3


def test_what_is_logged(builtin: VLMAgent) -> None:
    trainer = make(builtin, grpo=GRPOConfig(group_size=4, beta=0.1), steps=1)
    (result,) = trainer.train(seed=0)
    assert result.metrics.keys() == {
        "reward/mean",
        "reward/std",
        "reward/iou",
        "reward/format",
        "reward/zero_std_groups",
        "completion/length",
        "completion/min_length",
        "completion/max_length",
        "completion/repetition",
        "completion/truncated",
        "padding",
        "completion/box_ratio",
        "policy/approx_kl",
        "policy/bounded",
        "policy/clip_frac",
        "policy/entropy",
        "policy/kl",
        "policy/kl_bounded",
        "policy/grad_norm",
        "policy/skipped",
        "loss",
        "lr",
        "time/rollout",
        "time/score",
        "time/update",
        "time/sync",
        "tokens_per_second",
    }
    lengths = [len(completion.token_ids) for completion in result.rollouts.rollout.completions]
    assert result.metrics["completion/length"] == np.mean(lengths)
    assert result.metrics["completion/max_length"] == max(lengths)
    assert result.metrics["reward/mean"] == pytest.approx(
        result.metrics["reward/iou"] + 0.1 * result.metrics["reward/format"]
    )
    assert abs(result.metrics["policy/approx_kl"]) < 1e-8  # the sampler's log-probabilities are the learner's
    assert result.metrics["policy/kl"] == pytest.approx(0, abs=1e-8)


@pytest.mark.slow
def test_several_updates_of_a_rollout_move_away_from_the_sampler(builtin: VLMAgent) -> None:
    trainer = make(builtin, grpo=GRPOConfig(group_size=4, mu=3), steps=1, lr=1e-3, warmup_steps=0)
    (result,) = trainer.train(seed=0)
    assert result.metrics["policy/approx_kl"] > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        ("cosine", [1 / 3, 2 / 3, 1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4]),
    ],
)
def test_the_learning_rate_follows_its_schedule(builtin: VLMAgent, schedule: Any, expected: list[float]) -> None:
    trainer = make(builtin, num_envs=4, steps=6, lr=1e-3, warmup_steps=2, lr_schedule=schedule)
    rates = [result.metrics["lr"] for result in trainer.train(seed=0)]
    assert rates == pytest.approx([1e-3 * factor for factor in expected])


@pytest.mark.slow
def test_the_learning_rate_of_several_updates_follows_steps(builtin: VLMAgent) -> None:
    grpo = GRPOConfig(group_size=4, mu=2)
    trainer = make(builtin, num_envs=4, grpo=grpo, steps=3, lr=1e-3, warmup_steps=1, lr_schedule="constant")
    assert [result.metrics["lr"] for result in trainer.train(seed=0)] == pytest.approx([5e-4, 1e-3, 1e-3])


def test_groups_of_another_size_are_refused(builtin: VLMAgent) -> None:
    envs = gymnasium.make_vec("VLM-REC-v0", num_envs=8, group_size=2)
    with pytest.raises(ConfigError, match="group_size=2, but grpo has group_size=4"):
        Trainer(builtin, envs, GRPO(GRPOConfig(group_size=4)), TrainerConfig(), Accelerator(cpu=True))
    singles = gymnasium.make_vec("VLM-REC-v0", num_envs=8, vectorization_mode="sync")
    with pytest.raises(ConfigError, match="group_size=1"):
        Trainer(builtin, singles, GRPO(GRPOConfig(group_size=4)), TrainerConfig(), Accelerator(cpu=True))


@pytest.mark.slow
def test_wrapped_environments_are_taken(builtin: VLMAgent) -> None:
    envs = gymnasium.make_vec("VLM-REC-v0", num_envs=8, group_size=4)
    wrapped = gymnasium.wrappers.vector.RecordEpisodeStatistics(envs)
    trainer = Trainer(builtin, wrapped, GRPO(GRPOConfig(group_size=4)), TrainerConfig(steps=2), Accelerator(cpu=True))
    assert [result.step for result in trainer.train(seed=0)] == [1, 2]


def test_a_prompt_that_does_not_fit_is_named_by_its_sample(builtin: VLMAgent) -> None:
    template = "circle " * 3000 + "{question}"
    trainer = make(builtin, env={"prompt_template": template}, steps=1)
    with pytest.raises(DataError, match=r"sample scene-train-\d+: the prompt has"):
        next(iter(trainer.train(seed=0)))


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_is_told_with_its_batch(builtin: VLMAgent) -> None:
    """Optimiser steps are left out, and then it is an error: with the parameter, and nothing has been learnt."""
    name = "model.model.visual.patch_embed.proj.bias"
    builtin.policy.get_parameter(name).register_hook(lambda gradient: gradient + torch.nan)
    before = torch.cat([weight.detach().flatten() for weight in builtin.parameters()])
    trainer, done = make(builtin, steps=9, max_skipped=2), []
    with pytest.raises(NonFiniteError, match="in 3 optimizer steps") as caught:
        done += trainer.train(seed=0)
    assert caught.value.step == 3
    assert caught.value.gradients == [name]
    assert caught.value.weights == []
    assert torch.equal(torch.cat([weight.detach().flatten() for weight in builtin.parameters()]), before)
    assert trainer.is_between_steps
    batch = caught.value.batch
    assert len(batch) == len(caught.value.rollouts.records) == len(caught.value.rollouts.images) == 12
    torch.testing.assert_close(caught.value.logprobs[batch.mask], batch.old_logprobs[batch.mask], atol=1e-4, rtol=0)


def test_an_update_whose_loss_is_not_finite_is_left_out(builtin: VLMAgent) -> None:
    """Even where its gradient is."""

    class Odd(GRPO):
        def loss(self, inputs: LossInputs) -> LossOutput:
            output = super().loss(inputs)
            return LossOutput(output.loss + torch.inf, output.sums)

    envs = gymnasium.make_vec("VLM-REC-v0", num_envs=8, group_size=4)
    before = [weight.detach().clone() for weight in builtin.parameters()]
    trainer = Trainer(builtin, envs, Odd(GRPOConfig(group_size=4)), TrainerConfig(steps=1), Accelerator(cpu=True))
    (result,) = trainer.train(seed=0)
    assert result.metrics["policy/skipped"] == 1
    assert np.isfinite(result.metrics["policy/grad_norm"])
    assert all(torch.equal(a, b) for a, b in zip(before, builtin.parameters(), strict=True))


def test_weights_that_are_not_finite_are_told(builtin: VLMAgent) -> None:
    builtin.add_value_head()
    builtin.policy.get_parameter("value_head.weight").data[0, 0] = torch.inf
    envs = gymnasium.make_vec("VLM-REC-v0", num_envs=8, group_size=4)
    config = TrainerConfig(steps=1, max_skipped=0)
    trainer = Trainer(builtin, envs, PPO(PPOConfig(group_size=4)), config, Accelerator(cpu=True))
    with pytest.raises(NonFiniteError) as caught:
        next(trainer.train(seed=0))
    assert caught.value.weights == ["value_head.weight"]


def test_the_scale_of_half_precision_is_part_of_a_checkpoint(builtin: VLMAgent, tmp_path: Path) -> None:
    made = make(builtin)
    made.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    builtin.save(tmp_path / "model")
    made._remember()
    state, own = made.state_dict(), made.process_state()
    made.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    made.load(tmp_path / "model", state, own)
    assert made.accelerator.scaler.get_scale() == 8


@pytest.mark.slow
def test_a_checkpoint_before_the_first_step_goes_on_as_from_the_beginning(builtin: VLMAgent, tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 1, "lr": 1e-3}
    made = make(builtin, **options)
    state, own = made.state_dict(), made.process_state()
    assert (state["step"], state["shown"]) == (0, 0)
    builtin.save(tmp_path / "model")
    expected = next(iter(made.train(seed=3)))
    again = make(VLMAgent.from_pretrained("builtin", sampling=builtin.sampling), **options)
    again.load(tmp_path / "model", state, own)
    (result,) = again.train(seed=3)
    assert result.rollouts.rollout.texts == expected.rollouts.rollout.texts
    assert result.metrics["policy/grad_norm"] == pytest.approx(expected.metrics["policy/grad_norm"], rel=1e-6)


def test_environments_tell_the_weights_of_their_terms(builtin: VLMAgent) -> None:
    """The terms that GDPO compares sum to the rewards that GRPO compares."""
    trainer = make(builtin, grpo=GRPOConfig(group_size=4, per_term=True), steps=1)
    (result,) = trainer.train(seed=0)
    terms, weights = result.rollouts.terms()
    assert terms.shape == (12, 2)
    torch.testing.assert_close((terms * weights).sum(dim=1), result.rollouts.rewards)
    assert result.metrics["policy/skipped"] == 0
