"""In bfloat16 the shared way is no further from float32 than the plain one."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from batches import loss_of, ragged, rollout_of

from vlmenv.agents import attention
from vlmenv.agents.kernels import CPUKernel, Kernel
from vlmenv.agents.vlm import VLMAgent
from vlmenv.core.rollout import Rollout


def results(agent: VLMAgent, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and the gradient."""
    agent.policy.zero_grad()
    values = agent.logprobs(rollout).values.detach()
    loss_of(agent, rollout).backward()
    return values, torch.cat([one.grad.flatten().float() for one in agent.policy.parameters() if one.grad is not None])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["weights", "autocast"])
def test_shared_is_as_near_to_float32_as_plain(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = VLMAgent.from_pretrained("builtin")
    rollout = rollout_of(agent)
    assert len(rollout) == len(ragged())
    right = results(agent, rollout)
    if way == "weights":
        agent = VLMAgent.from_pretrained("builtin", dtype=torch.bfloat16)
    asked: list[torch.dtype] = []

    def kernel_for(query: torch.Tensor, *, masked: bool = False) -> Kernel:
        asked.append(query.dtype)
        return CPUKernel()

    monkeypatch.setattr(attention, "kernel_for", kernel_for)
    errors = {}
    for share in (True, False):
        agent.family_policy.share_prefixes = share
        with torch.autocast("cpu", torch.bfloat16) if way == "autocast" else nullcontext():
            found = results(agent, rollout)
        errors[share] = [float((one - other).norm() / other.norm()) for one, other in zip(found, right, strict=True)]
    assert set(asked) == {torch.bfloat16}
    for shared, plain in zip(errors[True], errors[False], strict=True):
        assert 0 < shared < 1.3 * plain + 1e-3
        assert shared < 0.1
