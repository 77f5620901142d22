"""Run by `accelerate launch` with FSDP2: four processes, two of which hold a copy of the model between them."""

from __future__ import annotations

import sys
from pathlib import Path

import gymnasium
import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from two_processes import assert_gradient, build, observations, plain_gradient, weights_of

from vlmenv.algos import GRPO, GRPOConfig, Trainer, TrainerConfig
from vlmenv.algos.batch import Batch
from vlmenv.processes import leave
from vlmenv.runs.checkpoints import load_checkpoint, save_checkpoint
from vlmenv.runs.run_folder import RunFolder


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    check_gradient(accelerator)
    check_going_on(accelerator, RunFolder(folder / "run"))
    leave()


def trainer_of(accelerator: Accelerator, within: int | None = 2) -> Trainer:
    shard = {"shard": accelerator.process_index, "num_shards": 4}
    envs = gymnasium.make_vec("VLM-REC-v0", num_envs=4, group_size=4, **shard)
    config = TrainerConfig(steps=2, warmup_steps=0, shard_within=within)
    return Trainer(build("full"), envs, GRPO(GRPOConfig(group_size=4, beta=0.1)), config, accelerator)


def check_gradient(accelerator: Accelerator) -> None:
    """It is that of one process, and each process holds half of the weights, of the reference too."""
    alone, rank = build("full"), accelerator.process_index
    rollout, advantages = alone.rollout(observations()), torch.linspace(-1, 1, 16)
    expected = plain_gradient(alone, rollout, advantages)
    trainer = trainer_of(accelerator)
    quarter = slice(4 * rank, 4 * rank + 4)
    reference = trainer.reference.logprobs(rollout[quarter])
    plain = alone.reference().logprobs(rollout[quarter])
    torch.testing.assert_close(reference.values, plain.values, atol=1e-4, rtol=0)
    batch = Batch.of(rollout[quarter], trainer.agent.device, advantages[quarter])
    batch.ref_logprobs = reference.values  # so that the penalty has no gradient
    trainer.backward(batch)
    assert_gradient(trainer.agent, expected)
    for policy in (trainer.agent.policy, trainer.reference.policy):
        held = sum(parameter.to_local().numel() for parameter in policy.parameters())
        whole = sum(parameter.numel() for parameter in policy.parameters())
        assert abs(held / whole - 0.5) < 0.02


def check_going_on(accelerator: Accelerator, run: RunFolder) -> None:
    """From a checkpoint, with the same copies bit for bit, and with a single copy the state of the optimizer."""
    trainer = trainer_of(accelerator)
    steps = trainer.train(seed=0)
    next(steps)
    save_checkpoint(trainer, run)
    saved = moments(trainer)
    next(steps)
    again = trainer_of(accelerator)
    load_checkpoint(again, run)
    next(again.train(seed=0))
    expected = weights_of(trainer)
    for name, weight in weights_of(again).items():
        assert torch.equal(weight, expected[name]), name
    single = trainer_of(accelerator, within=None)
    load_checkpoint(single, run)
    for own, former in zip(moments(single), saved, strict=True):
        assert torch.equal(own, former)


def moments(trainer: Trainer) -> list[torch.Tensor]:
    state = trainer.optimizer.state_dict()["state"]
    kept = [value for one in state.values() for value in one.values()]
    return [(value.full_tensor() if isinstance(value, DTensor) else value).clone() for value in kept]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
