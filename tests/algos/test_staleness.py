"""Learning from what an engine sampled, with the present weights or with those of a step before."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from test_trainer import make
from torch import Tensor

from vlmenv.agents.engines.base import Engine, Request
from vlmenv.agents.policy import Policy
from vlmenv.agents.sampling import Sampled, Sampling, sample
from vlmenv.agents.vlm import VLMAgent
from vlmenv.algos import SFT, GRPOConfig, SFTConfig, StepResult, Trainer, TrainerConfig
from vlmenv.algos.background import Background
from vlmenv.core.errors import ConfigError, EngineError
from vlmenv.processes.zero import ZeRO

GRPO = GRPOConfig(group_size=4)


class CopyOfTheModel(Engine):
    """Samples from a second model, as another program would."""

    def __init__(self, agent: VLMAgent) -> None:
        self._policy: Policy = copy.deepcopy(agent.family_policy)
        self.max_length = agent.max_length
        self.threads: list[str] = []
        self.fails_at: int | None = None
        self.calls: list[str] = []

    def generate(
        self, requests: Sequence[Request], index: NDArray[np.int64], sampling: Sampling, rng: np.random.Generator
    ) -> list[Sampled]:
        self.threads.append(threading.current_thread().name)
        self.calls.append("generate")
        if len(self.threads) == self.fails_at:
            raise EngineError("the engine is gone")
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        return sample(self._policy, [request.prompt for request in requests], index, sampling, generator)

    def sync(self, weights: Mapping[str, Tensor], *, vision: tuple[int, ...] | None = None) -> None:
        self.calls.append("sync")
        state = self._policy.model.state_dict()
        with torch.no_grad():
            for name in weights.keys() & state.keys():
                state[name].copy_(weights[name])

    def sleep(self) -> None:
        self.calls.append("sleep")

    def wake(self) -> None:
        self.calls.append("wake")

    def close(self) -> None:
        pass


def trainer_of(agent: VLMAgent, grpo: GRPOConfig = GRPO, **options: Any) -> Trainer:
    agent.sampling = replace(agent.sampling, max_new_tokens=40)
    agent.engine = CopyOfTheModel(agent)
    options = {"steps": 4, "lr": 3e-3, "warmup_steps": 0, "lr_schedule": "constant"} | options
    return make(agent, grpo=grpo, **options)


def figures(result: StepResult) -> dict[str, float]:
    timed = ("time/", "tokens_per_second")
    return {name: value for name, value in result.metrics.items() if not name.startswith(timed)}


def largest_difference(agent: VLMAgent, result: StepResult) -> float:
    """Of the sampler's log-probabilities from those of the agent as it is."""
    with torch.no_grad():
        now = agent.logprobs(result.rollouts.rollout).values.numpy()
    completions = result.rollouts.rollout.completions
    return max(
        float(np.abs(row[: len(c.token_ids)] - c.logprobs).max()) for row, c in zip(now, completions, strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [0, 1])
def test_the_sampler_is_as_many_steps_behind_as_allowed(builtin: VLMAgent, staleness: int) -> None:
    trainer = trainer_of(builtin, max_staleness=staleness)
    weights, results = [copy.deepcopy(builtin.policy.state_dict())], []
    for result in trainer.train(seed=0):
        weights.append(copy.deepcopy(builtin.policy.state_dict()))
        results.append(result)
    for i, result in enumerate(results):
        builtin.policy.load_state_dict(weights[max(0, i - staleness)])
        assert largest_difference(builtin, result) < 1e-4
        mismatch = result.metrics["policy/sampler_kl"]
        assert mismatch > 1e-5 if staleness and i else mismatch < 1e-7
        assert (result.metrics["policy/effective_samples"] < 0.999) == bool(staleness and i)
    assert isinstance(builtin.engine, CopyOfTheModel)
    ahead = [name != "MainThread" for name in builtin.engine.threads]
    assert ahead == [False, *[bool(staleness)] * 3]


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [0, 1])
def test_an_engine_sleeps_while_the_model_learns(
    builtin: VLMAgent, staleness: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it writes meanwhile; and it is awake when the model is measured, before the steps and after them."""
    trainer = trainer_of(builtin, max_staleness=staleness, steps=2)
    engine, step = builtin.engine, trainer.processes.step
    assert isinstance(engine, CopyOfTheModel)
    monkeypatch.setattr(
        trainer.processes, "step", lambda *args, **options: engine.calls.append("update") or step(*args, **options)
    )
    trainer.sync()
    list(trainer.train(seed=0))
    trainer.sync()
    calls = [call for call in engine.calls if call != "generate" or not staleness]  # which comes at any time then
    slept = [] if staleness else ["sleep"]
    written = [] if staleness else ["generate"]
    assert calls == [*["wake", "sync", *written, *slept, "update"] * 2, "wake", "sync"]


def test_imitation_hands_weights_over_only_to_be_measured(builtin: VLMAgent) -> None:
    builtin.engine = engine = CopyOfTheModel(builtin)
    envs = gymnasium.make_vec("VLM-REC-v0", num_envs=4, answers=True)
    trainer = Trainer(builtin, envs, SFT(SFTConfig()), TrainerConfig(steps=2), Accelerator(cpu=True))
    list(trainer.train(seed=0))
    assert engine.calls == ["sleep", "sleep"]
    trainer.sync()
    assert engine.calls[2:] == ["wake", "sync"]


def test_an_engine_in_step_learns_what_the_model_would(builtin: VLMAgent) -> None:
    """The correction's weights are then 1, and the gradient that of the sampler's own log-probabilities."""
    trainer = trainer_of(builtin)
    rollouts = trainer.collector.next({}, 0.0).rollouts
    batch = trainer._credited(rollouts, np.random.default_rng(0))
    trainer._correct(batch, rollouts.rollout)
    corrected = gradient(trainer, batch)
    own = copy.copy(rollouts)
    own.rollout = replace(rollouts.rollout, from_trainer=True)
    batch = trainer._credited(own, np.random.default_rng(0))
    assert trainer._correct(batch, own.rollout) == {}
    torch.testing.assert_close(gradient(trainer, batch), corrected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("how", ["none", "token", "sequence", "token-mask", "sequence-mask"])
def test_the_gradient_is_that_of_the_weighted_loss(builtin: VLMAgent, how: str) -> None:
    """Computed anew, from the sampler's log-probabilities and those of the policy in one pass of autograd."""
    trainer = trainer_of(builtin, correction=how, **({} if how == "none" else {"correction_cap": 1.1}))
    rollouts = trainer.collector.next({}, 0.0).rollouts
    with torch.no_grad():
        for parameter in builtin.parameters():
            parameter.mul_(1.05)
    batch = trainer._credited(rollouts, np.random.default_rng(0))
    mismatch = trainer._correct(batch, rollouts.rollout)
    found = gradient(trainer, batch)
    now = builtin.logprobs(rollouts.rollout)
    sampled = torch.zeros_like(now.values)
    for row, completion in zip(sampled, rollouts.rollout.completions, strict=True):
        row[: len(completion.token_ids)] = torch.from_numpy(completion.logprobs)
    d = (now.values - sampled).detach()
    if how.startswith("sequence"):
        d = d.sum(dim=1, keepdim=True).expand_as(d)
    ratio = d.exp()
    kept = (ratio > 1 / 1.1) & (ratio < 1.1)
    weights = {"none": torch.ones_like(d), "mask": ratio * kept}.get(how.rpartition("-")[2], ratio.clamp(max=1.1))
    loss = -(weights * batch.advantages * now.values * now.mask).sum() / now.mask.sum()
    builtin.policy.zero_grad()
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in builtin.parameters() if p.grad is not None])
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-4)
    outside = ~kept if how.endswith("mask") else ratio >= 1.1
    share = (outside * now.mask).sum() / now.mask.sum()
    assert mismatch["policy/correction_clipped"] == pytest.approx(0.0 if how == "none" else float(share), abs=1e-6)


def gradient(trainer: Trainer, batch: Any) -> torch.Tensor:
    trainer.optimizer.zero_grad()
    trainer.backward(batch)
    return torch.cat([p.grad.flatten() for p in trainer.agent.parameters() if p.grad is not None])


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [1, 2])
def test_a_run_that_is_cut_off_goes_on_with_what_was_rolled_out_ahead(
    rounds: int, builtin: VLMAgent, tmp_path: Path
) -> None:
    start = copy.deepcopy(builtin.policy.state_dict())
    grpo = replace(GRPO, most_rounds=rounds)
    trainer = trainer_of(builtin, grpo, max_staleness=1)
    expected = []
    for result in trainer.train(seed=3):
        expected.append(figures(result))
        if result.step == 2:
            builtin.save(tmp_path / "model")
            torch.save([trainer.state_dict(), trainer.process_state()], tmp_path / "state.pt")
    assert len(expected) == 4
    builtin.policy.load_state_dict(start)
    trainer = trainer_of(builtin, grpo, max_staleness=1)
    trainer.load(tmp_path / "model", *torch.load(tmp_path / "state.pt", weights_only=True))
    assert [figures(result) for result in trainer.train(seed=3)] == expected[2:]


@pytest.mark.slow
def test_a_rollout_ahead_that_fails_leaves_the_step_before_it_whole(builtin: VLMAgent, tmp_path: Path) -> None:
    trainer = trainer_of(builtin, max_staleness=1)
    assert isinstance(builtin.engine, CopyOfTheModel)
    builtin.engine.fails_at = 3
    results = []
    with pytest.raises(EngineError, match="the engine is gone"):
        results.extend(trainer.train(seed=0))
    assert [result.step for result in results] == [1, 2]
    assert trainer.is_between_steps
    assert "ahead" not in trainer.process_state()
    assert trainer.state_dict()["shown"] == 2


def test_zero_takes_no_batches_ahead(builtin: VLMAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmenv.algos.trainer.processes_of", lambda accelerator, _: ZeRO(accelerator, {"stage": 2}))
    with pytest.raises(ConfigError, match="has not been tested with ZeRO"):
        trainer_of(builtin, max_staleness=1)


def test_a_thread_hands_over_a_result_or_an_error() -> None:
    assert Background(lambda: 3).wait() == 3
    error = Background(lambda: 1 / 0).wait()
    assert isinstance(error, ZeroDivisionError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_staleness": 2}, "max_staleness must be 0 or 1"),
        ({"correction_cap": 1.0}, "correction_cap must be finite and above 1"),
        ({"correction": "none", "correction_cap": 3.0}, "has no effect with correction=none"),
    ],
)
def test_options_out_of_range(builtin: VLMAgent, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer_of(builtin, **options)


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_reward_terms_are_told_the_progress_of_the_step_that_they_score(builtin: VLMAgent, max_staleness: int) -> None:
    told = []

    def term(text: str, target: Any, progress: float) -> float:
        told.append(progress)
        return 0.0

    env = {"rewards": {term: 1.0}}
    trainer = trainer_of(builtin, steps=3, max_staleness=max_staleness, num_envs=4, env=env)
    list(trainer.train(seed=0))
    assert told == [0.0] * 4 + [1 / 3] * 4 + [2 / 3] * 4
