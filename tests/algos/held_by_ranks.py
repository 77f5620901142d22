"""Run by `accelerate launch` with FSDP2: what two ranks hold, with copies and with shards, against what is foretold."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from two_processes import trainer_of

from vlmenv.algos import Trainer
from vlmenv.building import adapt, load_for_training
from vlmenv.commands.train import _REPLICAS
from vlmenv.doctor.prediction import Place, measure, moments
from vlmenv.options.fields import replaced
from vlmenv.options.train import default_config
from vlmenv.processes import leave

NAMES: Any = {"ddp": "whole copies", "fsdp2": "FSDP2"}


def main() -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", kwargs_handlers=[_REPLICAS])
    options = {"precision": "bf16", "freeze_vision": True, "freeze_projector": True, "beta": 0.1, "group_size": 4}
    config = replaced(default_config(), {"prompts_per_step": 4, "max_new_tokens": 20, **options})
    image = np.zeros((96, 128, 3), np.uint8)
    sizes, batch = measure(config, {"images": (image,), "prompt": "Where is the red circle?"}, 2)
    for layout, name in NAMES.items():
        os.environ["ACCELERATE_USE_FSDP"] = "true" if layout == "fsdp2" else "false"
        agent = load_for_training(config, torch.device("cpu"))
        adapt(agent, config.adaptation, "bf16")
        trainer = trainer_of(agent, accelerator, beta=0.1, steps=1, micro_batch_tokens=None)
        assert trainer.processes.name == name
        told = moments(sizes, batch, config, Place(1e9, layout, 2, is_card=False), 0, 0)
        found = held(trainer)
        for use, size in found.items():
            expected = told["sampling" if use == "gathered weights" else "update"][use]
            assert abs(size - expected) < 0.01 * expected, (layout, use, size, expected)
        assert ("gathered weights" in found) == (layout == "fsdp2")
    leave()


def held(trainer: Trainer) -> dict[str, int]:
    """Bytes by use after a step, and of gradients just before it."""
    buckets: list[StorageWeakRef] = []
    found: dict[str, int] = {}

    def look(*_: Any) -> None:
        gradients = [one.grad for one in trainer.agent.parameters()]
        found["gradients"] = bytes_of(gradients)
        buckets.extend(StorageWeakRef(local(one).untyped_storage()) for one in gradients)

    trainer.optimizer.register_step_pre_hook(look)
    list(trainer.train(seed=0))
    is_sharded = trainer.processes.name == "FSDP2"
    assert all(one.grad is None for one in trainer.agent.parameters())
    assert {one.expired() for one in buckets} == {is_sharded}  # DDP's buckets stay
    own = list(trainer.agent.policy.parameters())
    reference: Any = trainer.reference
    found["weights"] = bytes_of(own)
    found["reference"] = bytes_of(set(reference.policy.parameters()) - set(own))
    found["optimizer"] = bytes_of(part for one in trainer.optimizer.state.values() for part in one.values())
    if is_sharded:
        with trainer.processes.gathered():
            found["gathered weights"] = bytes_of(trainer.agent.policy.parameters())
    return found


def bytes_of(tensors: Any) -> int:
    return sum(local(one).numel() * one.itemsize for one in tensors)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


if __name__ == "__main__":
    main()
