"""Run by `accelerate launch`: two processes train with masked images, and with a teacher."""

from __future__ import annotations

import sys
from typing import Any

import gymnasium
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch.distributed.tensor import DTensor
from two_processes import assert_gradient, build, observations

from vlmenv.algos import GRPO, GRPOConfig, Trainer, TrainerConfig
from vlmenv.algos.batch import Batch
from vlmenv.algos.losses import visual_dependence
from vlmenv.algos.opd import OPD, OPDConfig
from vlmenv.algos.papo import PAPO, PAPOConfig
from vlmenv.algos.vppo import VPPO, VPPOConfig
from vlmenv.core.masking import masked
from vlmenv.processes import leave

WEIGHT = 0.5


def main(kind: str) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    check_gradient(accelerator)
    ways: dict[str, GRPO] = {
        "papo": PAPO(PAPOConfig(group_size=4, perception_weight=WEIGHT)),
        "vppo": VPPO(VPPOConfig(group_size=4)),
        "opd": OPD(OPDConfig(group_size=4, teacher="builtin")),
    }
    for algorithm in ways.values():
        check_run(accelerator, algorithm)
    assert trainer_of(accelerator, GRPO(GRPOConfig(group_size=4))).processes.name == kind
    leave()


def trainer_of(accelerator: Accelerator, algorithm: GRPO) -> Trainer:
    shard = {"shard": accelerator.process_index, "num_shards": accelerator.num_processes}
    envs = gymnasium.make_vec("VLM-REC-v0", num_envs=8, group_size=4, **shard)
    config = TrainerConfig(steps=2, warmup_steps=0, micro_batch_size=4)
    teacher: dict[str, Any] = {"teacher": teacher_of()} if algorithm.wants_teacher else {}
    return Trainer(build("full"), envs, algorithm, config, accelerator, **teacher)


def teacher_of() -> Any:
    """Another model than the student, so that it has something to teach."""
    teacher = build("full")
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(0.9)
    return teacher


def check_gradient(accelerator: Accelerator) -> None:
    """The gradient of halves of a batch, of which only one has images, is that of the whole by the paper's formula."""
    alone, rank, seen = build("full"), accelerator.process_index, observations()
    rollout, advantages = alone.rollout(seen), torch.linspace(-1, 1, 16)
    blind = alone.reprompted(rollout, masked(seen, 0.6, seed=0))
    now, without = alone.logprobs(rollout), alone.logprobs(blind)
    terms = advantages[:, None] * now.values + WEIGHT * visual_dependence(now.values, without.values)
    (-terms[now.mask].sum() / now.mask.sum()).backward()
    expected = {name: p.grad for name, p in alone.policy.named_parameters() if p.requires_grad}
    trainer = trainer_of(accelerator, PAPO(PAPOConfig(group_size=4, perception_weight=WEIGHT, aggregation="token")))
    half = slice(8 * rank, 8 * rank + 8)
    batch = Batch.of(rollout[half], trainer.agent.device, advantages[half])
    batch.masked = blind[half]
    trainer.backward(batch)
    assert_gradient(trainer.agent, expected)


def check_run(accelerator: Accelerator, algorithm: GRPO) -> None:
    """Both processes learn, both skip nothing, and a teacher keeps its weights."""
    trainer = trainer_of(accelerator, algorithm)
    before = sizes_of(trainer)
    results = list(trainer.train(seed=0))
    assert [result.metrics["policy/skipped"] for result in results] == [0.0, 0.0]
    assert sizes_of(trainer) != before, algorithm.name
    if trainer.teacher is not None:
        assert results[0].metrics["policy/teacher_kl"] > 0
        for own, same in zip(trainer.teacher.parameters(), teacher_of().parameters(), strict=True):
            assert torch.equal(own, same)


def sizes_of(trainer: Trainer) -> list[float]:
    """Sums over the whole of each weight, which are the same in all processes."""
    sizes = [float(gathered(weight).double().abs().sum()) for weight in trainer.agent.policy.parameters()]
    of_all = trainer.processes.collect([sizes])
    assert of_all[0] == of_all[1]
    return sizes


def gathered(weight: torch.Tensor) -> torch.Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


if __name__ == "__main__":
    main(sys.argv[1])
