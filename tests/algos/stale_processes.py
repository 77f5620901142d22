"""Run by `accelerate launch`: two processes, each with an engine that samples during the update."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from numpy.typing import NDArray
from test_staleness import CopyOfTheModel, figures, largest_difference
from two_processes import weights_of

from vlmenv.agents.engines.base import Request
from vlmenv.agents.sampling import Sampled, Sampling
from vlmenv.agents.vlm import VLMAgent
from vlmenv.algos import GRPO, GRPOConfig, StepResult, Trainer, TrainerConfig
from vlmenv.core.errors import EngineError, TrainingError
from vlmenv.processes import leave
from vlmenv.processes.failures import failed_on_all_ranks
from vlmenv.runs.checkpoints import load_checkpoint, save_checkpoint
from vlmenv.runs.run_folder import RunFolder

STEPS = 3


class Uneven(CopyOfTheModel):
    """Takes time, another rank at each call, so that ranks come to their collectives in another order."""

    def __init__(self, agent: VLMAgent, rank: int) -> None:
        super().__init__(agent)
        self.rank = rank

    def generate(
        self, requests: Sequence[Request], index: NDArray[np.int64], sampling: Sampling, rng: np.random.Generator
    ) -> list[Sampled]:
        if len(self.threads) % 2 == self.rank:
            time.sleep(0.5)
        return super().generate(requests, index, sampling, rng)


def main(kind: str, folder: Path) -> None:
    torch.set_num_threads(1)
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    accelerator = Accelerator(cpu=True, kwargs_handlers=handlers)
    assert trainer_of(accelerator).processes.name == kind
    check_weights(accelerator)
    for rounds in (1, 2):
        check_going_on(accelerator, RunFolder(folder / f"rounds-{rounds}"), rounds)
    check_failure(accelerator, RunFolder(folder / "failure"))
    leave()


def trainer_of(accelerator: Accelerator, rounds: int = 1) -> Trainer:
    torch.manual_seed(0)
    agent = VLMAgent.from_pretrained("builtin", sampling=Sampling(max_new_tokens=30))
    agent.engine = Uneven(agent, accelerator.process_index)
    shard = {"shard": accelerator.process_index, "num_shards": 2}
    envs = gymnasium.make_vec("VLM-REC-v0", num_envs=8, group_size=4, **shard)
    config = TrainerConfig(steps=STEPS, lr=3e-3, warmup_steps=0, lr_schedule="constant", max_staleness=1)
    return Trainer(agent, envs, GRPO(GRPOConfig(group_size=4, most_rounds=rounds)), config, accelerator)


def check_weights(accelerator: Accelerator) -> None:
    """The sampler of each rank has the weights of one update before."""
    trainer = trainer_of(accelerator)
    weights, results = [weights_of(trainer)], list[StepResult]()
    for result in trainer.train(seed=0):
        weights.append(weights_of(trainer))
        results.append(result)
    threads = trainer.agent.engine.threads
    assert [name == "MainThread" for name in threads] == [True, *[False] * (STEPS - 1)]
    of_all = trainer.processes.collect([[result.rollouts for result in results]])
    if not accelerator.is_main_process:
        return
    alone = VLMAgent.from_pretrained("builtin")
    for i in range(STEPS):
        alone.family_policy.load_state_dict(weights[max(0, i - 1)])
        for rollouts in of_all:
            assert largest_difference(alone, replace(results[i], rollouts=rollouts[i])) < 1e-4
    assert results[-1].metrics["policy/sampler_kl"] > 1e-5
    assert results[0].metrics["policy/sampler_kl"] < 1e-7


def check_going_on(accelerator: Accelerator, run: RunFolder, rounds: int) -> None:
    """A run goes on from a checkpoint bit for bit, with what was sampled ahead of it."""
    expected = follow(trainer_of(accelerator, rounds), run)
    assert len(set(of_both(accelerator, expected))) == 1
    if accelerator.is_main_process:
        for step in range(2, STEPS + 1):
            run.checkpoint(step).rename(run.path / f"step-{step}.aside")
    accelerator.wait_for_everyone()
    again = trainer_of(accelerator, rounds)
    load_checkpoint(again, run)
    assert (again.step, again.collector.shown - again.collector.shown_ahead) == (1, again.collector.shown_ahead)
    assert follow(again, run) == expected[1:]


def of_both(accelerator: Accelerator, found: Any) -> list[str]:
    both: list[Any] = [None, None]
    torch.distributed.all_gather_object(both, repr(found))
    return both


def follow(trainer: Trainer, run: RunFolder) -> list[dict[str, float]]:
    found = []
    for result in trainer.train(seed=0):
        found.append(figures(result))
        if trainer.accelerator.is_main_process:
            run.path.mkdir(parents=True, exist_ok=True)
            run.write_step(result)
        save_checkpoint(trainer, run)
    return found


def check_failure(accelerator: Accelerator, run: RunFolder) -> None:
    """An engine that fails on one rank ends all after the step under way, whose checkpoint can be written."""
    trainer = trainer_of(accelerator)
    if accelerator.process_index == 1:
        trainer.agent.engine.fails_at = 3
    kind, message = (TrainingError, "rank 1: EngineError: the engine is gone"), (EngineError, "the engine is gone")
    error, told = (kind, message)[accelerator.process_index]
    done = []
    with pytest.raises(error, match=told) as caught:
        done.extend(trainer.train(seed=0))
    assert [result.step for result in done] == [1, 2]
    assert trainer.is_between_steps
    assert failed_on_all_ranks(caught.value, accelerator)
    save_checkpoint(trainer, run)
    assert trainer.state_dict()["shown"] == 2


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
