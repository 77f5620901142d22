"""Run by `accelerate launch` with FSDP2: the main process alone loads weights, and learning is the same."""

from __future__ import annotations

import sys
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from two_processes import trainer_of, weights_of

from vlmenv.agents.vlm import Sampling, VLMAgent
from vlmenv.agents.weights import WideEmbedding
from vlmenv.algos import Trainer
from vlmenv.processes import leave


def main(base: str) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    for case in ("full", "lora"):
        check(accelerator, base, case)
    leave()


def check(accelerator: Accelerator, base: str, case: str) -> None:
    usual = make(accelerator, base, case, empty=False)
    trainer = make(accelerator, base, case, empty=not accelerator.is_main_process)
    policies = [(usual.agent.policy, trainer.agent.policy)]
    if case == "full":
        policies.append((usual.reference.policy, trainer.reference.policy))
    for expected, found in policies:
        assert_same(tensors(found), tensors(expected))
        assert is_wide(found) == is_wide(expected)
    assert_same(weights_after(trainer), weights_after(usual))


def make(accelerator: Accelerator, base: str, case: str, *, empty: bool) -> Trainer:
    torch.manual_seed(0)
    agent = VLMAgent.from_pretrained(base, sampling=Sampling(max_new_tokens=20), empty=empty)
    if case == "lora":
        agent.add_lora(rank=2, alpha=4, vision=True)
    agent.hold("frozen")
    agent.add_value_head()
    assert all(one.is_meta == empty for one in agent.policy.parameters())
    return trainer_of(agent, accelerator, beta=0.1)


def tensors(policy: Any) -> dict[str, Tensor]:
    """This rank's shards and buffers."""
    shards = {name: one.to_local() for name, one in policy.named_parameters(remove_duplicate=False)}
    return shards | dict(policy.named_buffers())


def is_wide(policy: Any) -> bool:
    return isinstance(policy.model.get_input_embeddings(), WideEmbedding)


def weights_after(trainer: Trainer) -> dict[str, Tensor]:
    list(trainer.train(seed=0))
    return weights_of(trainer)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name


if __name__ == "__main__":
    main(sys.argv[1])
