"""GRPO by hand, without the trainer: the same seed gives the same numbers as `vlmenv train`.

python examples/custom_loop.py --steps 20
"""

from __future__ import annotations

from dataclasses import dataclass

import gymnasium
import torch
import tyro

import vlmenv  # noqa: F401 (registers the environments)
from vlmenv.agents import VLMAgent
from vlmenv.algos.advantages import group_relative
from vlmenv.algos.losses import clipped_surrogate


@dataclass
class Args:
    """Trains the built-in model on the built-in scenes."""

    steps: int = 20
    group_size: int = 8
    prompts: int = 16
    lr: float = 3e-4
    epsilon: float = 0.2
    seed: int = 0


def main(args: Args) -> list[float]:
    """Returns the mean reward of each step."""
    num_envs = args.prompts * args.group_size
    envs = gymnasium.make_vec("VLM-REC-v0", num_envs=num_envs, group_size=args.group_size)
    agent = VLMAgent.from_pretrained("builtin")
    optimizer = torch.optim.AdamW(agent.parameters(), lr=args.lr, weight_decay=0.0)
    agent.seed(args.seed)
    observations, _ = envs.reset(seed=args.seed)
    history = []
    for step in range(args.steps):
        rollout = agent.rollout(observations)
        _, rewards, _, _, _ = envs.step(rollout.texts)
        advantages = group_relative(torch.as_tensor(rewards, dtype=torch.float32), args.group_size)

        now = agent.logprobs(rollout)  # [N, L], of the sampled tokens under the present weights
        old = torch.zeros_like(now.values)
        for row, completion in zip(old, rollout.completions, strict=True):
            row[: len(completion.logprobs)] = torch.from_numpy(completion.logprobs)
        ratio = (now.values - old).exp()
        per_token = clipped_surrogate(ratio, advantages[:, None], args.epsilon, args.epsilon)
        loss = per_token[now.mask].sum() / now.mask.sum()

        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(agent.parameters(), 1.0)
        optimizer.step()
        history.append(float(rewards.mean()))
        print(f"step {step + 1}/{args.steps}  reward {history[-1]:.3f}")
        observations, _ = envs.reset()
    return history


if __name__ == "__main__":
    main(tyro.cli(Args))
