"""Run by `accelerate launch`: the gradient of half a batch in each of two processes, and of the whole in one."""

from __future__ import annotations

import sys
from pathlib import Path

import gymnasium
import torch
from accelerate import Accelerator

import vlmenv  # noqa: F401
from vlmenv.agents.vlm import VLMAgent
from vlmenv.algos import GRPO, GRPOConfig, Trainer, TrainerConfig


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    agent = VLMAgent.from_pretrained("builtin", max_new_tokens=24)
    agent.seed(0)
    envs = gymnasium.make_vec("VLM-REC-v0", num_envs=8, group_size=4)
    rollout = agent.rollout(envs.reset(seed=0)[0])
    advantages = torch.linspace(-1, 1, 8)
    if accelerator.is_main_process:
        torch.save(plain_gradient(agent, rollout, advantages), folder / "one.pt")
        agent.policy.zero_grad()
    trainer = Trainer(agent, envs, GRPO(GRPOConfig(group_size=4)), TrainerConfig(micro_batch_size=3), accelerator)
    half = slice(4 * accelerator.process_index, 4 * accelerator.process_index + 4)
    trainer.backward(rollout[half], advantages[half])
    gradient = torch.cat([p.grad.flatten() for p in agent.parameters() if p.grad is not None])
    torch.save(gradient, folder / f"process{accelerator.process_index}.pt")
    accelerator.end_training()


def plain_gradient(agent: VLMAgent, rollout, advantages: torch.Tensor) -> torch.Tensor:  # noqa: ANN001
    """On the sampler's own weights the ratio is 1, so the loss's gradient is that of -A log p over all tokens."""
    now = agent.logprobs(rollout)
    (-(advantages[:, None] * now.values)[now.mask].sum() / now.mask.sum()).backward()
    return torch.cat([p.grad.flatten() for p in agent.parameters() if p.grad is not None])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
