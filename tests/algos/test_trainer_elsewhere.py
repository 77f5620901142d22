"""Steps of training on a device that is not the CPU, with the CPU's numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from elsewhere import NAME, bring, elsewhere

from vlmenv.agents.vlm import VLMAgent
from vlmenv.algos import ALGORITHMS, GRPO, PPO, GRPOConfig, Trainer, TrainerConfig

CASES: dict[str, Any] = {
    **{
        name: lambda make=make, config=config: make(config)
        for name, (make, config) in ALGORITHMS.items()
        if not make.wants_teacher
    },
    "with a reference": lambda: GRPO(GRPOConfig(beta=0.1)),
}


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    """One whose device is elsewhere."""
    made = Accelerator(cpu=True)
    for state in (PartialState, AcceleratorState):
        state._shared_state["device"] = torch.device(NAME, 0)
    yield made
    AcceleratorState._reset_state(reset_partial_state=True)


def metrics(agent: VLMAgent, algorithm: Any, accelerator: Accelerator) -> dict[str, float]:
    """Of a first step, in micro-batches."""
    if isinstance(algorithm, PPO):
        agent.add_value_head()
    how = {"group_size": algorithm.config.group_size, "answers": algorithm.imitates}
    envs = gymnasium.make_vec("VLM-REC-v0", num_envs=16, **how)
    (result,) = Trainer(agent, envs, algorithm, TrainerConfig(steps=1, micro_batch_size=6), accelerator).train(seed=0)
    return {
        name: value
        for name, value in result.metrics.items()
        if not name.startswith("time/") and "per_second" not in name
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_step(case: str, accelerator: Accelerator) -> None:
    with elsewhere():
        found = metrics(bring(VLMAgent.from_pretrained("builtin")), CASES[case](), accelerator)
    for state in (PartialState, AcceleratorState):
        state._shared_state["device"] = torch.device("cpu")
    right = metrics(VLMAgent.from_pretrained("builtin"), CASES[case](), Accelerator(cpu=True))
    assert right["policy/grad_norm"] > 0
    assert found == pytest.approx(right, rel=1e-4, abs=1e-5)
