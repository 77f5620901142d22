"""Training on episodes of several turns, whatever the answers are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from accelerate import Accelerator

from vlmenv.agents.vlm import Sampling, VLMAgent
from vlmenv.algos import GRPO, PPO, Algorithm, GRPOConfig, PPOConfig, Trainer, TrainerConfig
from vlmenv.algos.sft import SFT, SFTConfig
from vlmenv.cli import main
from vlmenv.core.errors import ConfigError
from vlmenv.envs.data.source import Sample
from vlmenv.envs.episodes import Reply
from vlmenv.envs.rec import RECEnv
from vlmenv.envs.vector import VisualTaskVectorEnv
from vlmenv.evaluation import evaluate

pytestmark = pytest.mark.slow


class Patient(RECEnv):
    """Asks again, up to twice, by the length of the answer: with an image the first time."""

    terms = {**RECEnv.terms, "length": lambda text, target: len(text) / 100}  # noqa: RUF012
    default_rewards = {"iou": 1.0, "length": 1.0}  # noqa: RUF012
    turn_terms = ("length",)
    max_turns = 3

    def respond(self, sample: Sample, texts: Sequence[str]) -> Reply | None:
        if len(texts[-1]) % 3 == 0 or len(texts) > 2:
            return None
        return Reply("Look again.", (sample.images[0][:48, :64],) if len(texts) == 1 else ())


def trainer_of(algorithm: Algorithm, steps: int = 2) -> Trainer:
    agent = VLMAgent.from_pretrained("builtin", sampling=Sampling(max_new_tokens=20))
    if algorithm.wants_values:
        agent.add_value_head()
    size = algorithm.config.group_size
    envs = VisualTaskVectorEnv(Patient, max(4, 2 * size), group_size=size, answers=algorithm.imitates)
    config = TrainerConfig(steps=steps, micro_batch_size=5, lr=1e-3)
    return Trainer(agent, envs, algorithm, config, Accelerator(cpu=True))


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([one.detach().flatten() for one in trainer.agent.parameters()])


def test_grpo_gives_each_episode_one_advantage_and_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = trainer_of(GRPO(GRPOConfig(group_size=4, beta=0.1)))
    first, second = list(whole.train(seed=0))
    rollouts = first.rollouts
    turns = [record["traits"]["turns"] for record in rollouts.records]
    assert len({*turns}) > 1
    assert rollouts.turn_rewards is not None
    torch.testing.assert_close(rollouts.turn_rewards.sum(dim=1), rollouts.rewards)
    for record, completion, images in zip(rollouts.records, rollouts.rollout.completions, rollouts.images, strict=True):
        count = int(record["traits"]["turns"])
        assert sum(turn["role"] == "assistant" for turn in record.get("turns", [])) == count - 1
        assert len(images) == (1 if count == 1 else 2)
        assert completion.text == record["completion"]
        assert record["reward"] == pytest.approx(sum(record["rewards"].values()))
    assert first.metrics["policy/approx_kl"] == pytest.approx(0, abs=1e-6)  # sampled and trained alike
    assert first.metrics["completion/turns"] == pytest.approx(np.mean(turns))
    wrote = [len(one.written_ids) for one in rollouts.rollout.completions]
    assert first.metrics["completion/length"] == pytest.approx(np.mean(wrote))

    stopped = trainer_of(GRPO(GRPOConfig(group_size=4, beta=0.1)))
    next(iter(stopped.train(seed=0)))
    stopped.agent.save(tmp_path / "model")
    state, own = stopped.state_dict(), stopped.process_state()
    resumed = trainer_of(GRPO(GRPOConfig(group_size=4, beta=0.1)))
    resumed.load(tmp_path / "model", state, own)
    (last,) = resumed.train(seed=0)
    assert [one["completion"] for one in last.rollouts.records] == [
        one["completion"] for one in second.rollouts.records
    ]
    assert torch.equal(weights(resumed), weights(whole))


def test_ppo_credits_turns() -> None:
    trainer = trainer_of(PPO(PPOConfig(group_size=2, gamma=0.99, turn_gamma=0.9)), steps=1)
    seen: list[Any] = []
    credit = trainer.algorithm.credit
    trainer.algorithm.credit = lambda scored: seen.append(scored) or credit(scored)  # type: ignore[method-assign]
    (result,) = trainer.train(seed=0)
    assert torch.equal(seen[0].turn_rewards, result.rollouts.turn_rewards)
    assert np.isfinite(result.metrics["value/loss"])


class Guessing(gymnasium.Env[Any, str]):
    """Shows noise that no seed decides, twice. A longer answer earns more, by an amount that is not told."""

    observation_space = gymnasium.spaces.Text(100)
    action_space = gymnasium.spaces.Text(10_000)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.left = 2
        return self.seen(), {}

    def seen(self) -> Any:
        noise = np.random.default_rng()
        self.factor = float(noise.random())
        return {"images": noise.integers(256, size=(64, 64, 3), dtype=np.uint8), "prompt": "Go on?"}

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.left -= 1
        reward = self.factor * len(action)
        return self.seen(), reward, not self.left, False, {}


@pytest.mark.parametrize("algo", ["ppo", "reinforce++"])
def test_an_environment_that_does_not_repeat_itself_trains_and_goes_on(
    algo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gymnasium.register("Guessing-v0", entry_point=Guessing)
    run = tmp_path / "run"
    options = ["--env", "Guessing-v0", "--algo", algo, "--prompts-per-step", "4", "--max-new-tokens", "8"]
    options += ["--eval-limit", "3", "--steps", "2", "--checkpoint-every", "1", "--output", str(run), "--device", "cpu"]
    try:
        with pytest.raises(SystemExit):
            main(["train", *options])
        assert "Guessing-v0 starts differently with one seed" in capsys.readouterr().err
        main(["train", *options, "--group-size", "1"])
        main(["train", "--resume", str(run), "--steps", "3"])
    finally:
        del gymnasium.registry["Guessing-v0"]
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [one["completion/turns"] for one in steps] == [2.0] * 3
    assert all(one["reward/std"] > 0 for one in steps)
    answers = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    assert len({one["target"] for one in answers[:4]}) == 4
    assert (run / "report.html").is_file()
    assert "not kept" not in "".join(capsys.readouterr())


def test_sft_imitates_every_turn() -> None:
    trainer = trainer_of(SFT(SFTConfig()), steps=1)
    before = weights(trainer).clone()
    (result,) = trainer.train(seed=0)
    several = [one for one in result.rollouts.rollout.completions if one.written is not None]
    assert several
    decode = trainer.agent.family.decode  # type: ignore[attr-defined]
    for record, one in zip(result.rollouts.records, result.rollouts.rollout.completions, strict=True):
        said = [turn["text"] for turn in record.get("turns", []) if turn["role"] == "assistant"]
        assert decode(one.written_ids) == "".join([*said, one.text])
    assert not torch.equal(weights(trainer), before)


def test_evaluation_plays_to_the_end() -> None:
    agent = VLMAgent.from_pretrained("builtin", sampling=Sampling(max_new_tokens=20))
    for greedy in (True, False):
        envs = VisualTaskVectorEnv(Patient, 4)
        found = evaluate(agent, envs, 6, greedy=greedy, title="", console=None)
        assert len(found.answers) == 6
        several = [one for one in found.answers if one.get("turns")]
        assert several
        assert all(one["rewards"].keys() == {"iou", "length"} for one in found.answers)


def test_an_engine_that_takes_fewer_images_than_episodes_have_is_refused() -> None:
    """Except for imitation, which asks no engine."""
    agent = VLMAgent.from_pretrained("builtin")
    agent.engine = SimpleNamespace(max_images=7)  # type: ignore[assignment]
    envs, told = VisualTaskVectorEnv(Patient, 4, group_size=4), "up to 8 images, and the engine takes 7"
    with pytest.raises(ConfigError, match=told):
        Trainer(agent, envs, GRPO(GRPOConfig(group_size=4)), TrainerConfig(), Accelerator(cpu=True))
    with pytest.raises(ConfigError, match=told):
        evaluate(agent, envs, 1, greedy=True, title="")
    imitation = VisualTaskVectorEnv(Patient, 4, answers=True)
    Trainer(agent, imitation, SFT(SFTConfig()), TrainerConfig(), Accelerator(cpu=True))
    agent.engine = SimpleNamespace(max_images=8)  # type: ignore[assignment]
    Trainer(agent, envs, GRPO(GRPOConfig(group_size=4)), TrainerConfig(), Accelerator(cpu=True))
