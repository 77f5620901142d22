"""What the tests of agents act on and learn from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import torch

from vlmenv.agents.vlm import VLMAgent
from vlmenv.core.rollout import Observation, Rollout


def observations(num_envs: int = 12, group_size: int = 4) -> Any:
    envs = gymnasium.make_vec("VLM-REC-v0", num_envs=num_envs, group_size=group_size)
    return envs.reset(seed=0)[0]


def ragged() -> list[Observation]:
    """Prompts of unequal length with one image, two, none, and of unequal sizes, in groups."""
    rng = np.random.default_rng(0)

    def image(height: int, width: int) -> np.ndarray:
        return rng.integers(256, size=(height, width, 3), dtype=np.uint8)

    a: Observation = {"images": (image(64, 96),), "prompt": "Locate the red circle."}
    b: Observation = {"images": (image(96, 96), image(64, 64)), "prompt": "Which of the two is larger, and how much?"}
    c: Observation = {"images": (), "prompt": "How many is 2 and 3?"}
    return [a, a, a, b, b, c, c, a]


def rollout_of(agent: VLMAgent) -> Rollout:
    """Short answers to prompts of all kinds."""
    agent.sampling = replace(agent.sampling, max_new_tokens=6)
    agent.seed(0)
    return agent.rollout(ragged())


def loss_of(agent: VLMAgent, rollout: Rollout) -> torch.Tensor:
    """Pushes completions by unlike weights; a value head towards 1."""
    result = agent.logprobs(rollout)
    loss = (result.values * torch.linspace(-1, 1, len(rollout))[:, None]).sum()
    if result.state_values is not None:
        loss = loss + ((result.state_values - 1) * result.mask).square().sum()
    return loss


def optimizer_of(agent: VLMAgent) -> torch.optim.Optimizer:
    return torch.optim.AdamW(agent.parameters(), lr=3e-3, weight_decay=0.1)


def train(agent: VLMAgent, rollout: Rollout, optimizer: torch.optim.Optimizer | None = None, steps: int = 2) -> None:
    optimizer = optimizer or optimizer_of(agent)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(agent, rollout).backward()
        optimizer.step()


def weights_of(agent: VLMAgent) -> dict[str, torch.Tensor]:
    """A copy of all weights, by name."""
    return {name: tensor.clone() for name, tensor in agent.family_policy.state_dict().items()}


@torch.no_grad()
def logprobs_of(agent: VLMAgent, rollout: Rollout) -> torch.Tensor:
    return agent.logprobs(rollout).values
