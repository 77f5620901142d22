"""Run by `torch.distributed.run`: two processes on the halves of a batch, and one on the whole for comparison."""

from __future__ import annotations

import sys
from pathlib import Path

import gymnasium
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

import vlmenv  # noqa: F401
from vlmenv.agents.vlm import Sampling, VLMAgent
from vlmenv.algos import GRPO, GRPOConfig, Trainer, TrainerConfig
from vlmenv.algos.batch import Batch
from vlmenv.core.rollout import Observation, Rollout


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    accelerator = Accelerator(cpu=True, kwargs_handlers=handlers)
    assert accelerator.num_processes == 2
    agent = VLMAgent.from_pretrained("builtin", sampling=Sampling(max_new_tokens=24))
    agent.seed(0)
    rollout = agent.rollout(observations())
    advantages = torch.linspace(-1, 1, 8)
    if accelerator.is_main_process:
        torch.save({"gradient": plain_gradient(agent, rollout, advantages)}, folder / "one.pt")
        agent.policy.zero_grad()
    rank = accelerator.process_index
    envs = gymnasium.make_vec("VLM-REC-v0", num_envs=8, group_size=4, shard=rank, num_shards=2)
    config = TrainerConfig(micro_batch_size=3, steps=2)
    trainer = Trainer(agent, envs, GRPO(GRPOConfig(group_size=4)), config, accelerator)
    half = slice(4 * rank, 4 * rank + 4)
    trainer.backward(Batch.of(rollout[half], agent.device, advantages[half]))
    result = {"gradient": flat(p.grad for p in agent.parameters())}
    trainer.optimizer.zero_grad()
    steps = list(trainer.train(seed=0))
    result["weights"] = flat(agent.parameters())
    result["metrics"] = {k: v for k, v in steps[-1].metrics.items() if not k.startswith(("time/", "tokens"))}
    names = ("completion/min_length", "completion/max_length", "loss")
    result["joined"] = trainer._over_processes(dict.fromkeys(names, float(rank)))
    result["ids"] = [record["id"] for step in steps for record in step.rollouts.records]
    torch.save(result, folder / f"process{rank}.pt")
    accelerator.end_training()


def observations() -> list[Observation]:
    """A group with an image for one process, and a group without any for the other."""
    envs = gymnasium.make_vec("VLM-REC-v0", num_envs=4, group_size=4)
    batch, _ = envs.reset(seed=0)
    seen: list[Observation] = [{"images": batch["images"][0], "prompt": batch["prompt"][0]}]
    unseen: list[Observation] = [{"images": (), "prompt": "Locate the red circle."}]
    return seen * 4 + unseen * 4


def plain_gradient(agent: VLMAgent, rollout: Rollout, advantages: torch.Tensor) -> torch.Tensor:
    """On the sampler's own weights the ratio is 1, so the loss's gradient is that of -A log p over all tokens."""
    now = agent.logprobs(rollout)
    (-(advantages[:, None] * now.values)[now.mask].sum() / now.mask.sum()).backward()
    return flat(p.grad for p in agent.parameters())


def flat(tensors) -> torch.Tensor:  # noqa: ANN001
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
