"""Counted bytes against those of real passes."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlmenv.agents.vlm import VLMAgent
from vlmenv.building import adapt
from vlmenv.doctor import prediction
from vlmenv.doctor.prediction import Batch, measure
from vlmenv.options.train import AdaptationOptions, TrainConfig, default_config

OBSERVATION: Any = {
    "images": (np.random.default_rng(0).integers(256, size=(96, 128, 3), dtype=np.uint8),),
    "prompt": "Where is the red circle?",
}


class Real(TorchDispatchMode):
    """The bytes of real tensors, counted by their storages at every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.known[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    def live(self) -> int:
        self.known = {place: one for place, one in self.known.items() if not one[0].expired()}
        return sum(size for _, size in self.known.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if isinstance(one, torch.Tensor):
                self.add(one)
        self.peak = max(self.peak, self.live())
        return out


def configured(precision: str, micro: int, **options: Any) -> TrainConfig[Any]:
    config = default_config()
    return replace(
        config,
        adaptation=AdaptationOptions(**options),
        batches=replace(config.batches, precision=precision, prompts_per_step=2),
        trainer=replace(config.trainer, micro_batch_size=micro),
        sampling=replace(config.sampling, max_new_tokens=48),
    )


def really(config: TrainConfig[Any]) -> tuple[float, float, float]:
    """Bytes of weights, of what a forward pass keeps, and of the peak above weights and gradients."""
    agent = VLMAgent.from_pretrained(config.model)
    adapt(agent, config.adaptation, config.batches.precision)
    batch = Batch.of(config, len(agent.family.encode(OBSERVATION).input_ids))
    prompts = [agent.family.encode(OBSERVATION) for _ in range(batch.micro_prompts)]
    rollout = prediction._rollout(prompts, batch)
    precision = config.batches.precision
    for parameter in agent.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gc.collect()
    with Real() as real:
        for one in agent.policy.parameters():
            real.add(one)
        for one in agent.parameters():
            real.add(one.grad)
        held = real.live()
        real.peak = held
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            values = agent.logprobs(rollout).values
        kept = real.live() - held
        values.sum().backward()
    return sum(p.numel() * p.element_size() for p in agent.policy.parameters()), kept, real.peak - held


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True},
        {"lora_rank": 8},
        {"lora_rank": 8, "gradient_checkpointing": True},
        {"freeze_vision": True, "freeze_projector": True},
    ],
    ids=["full", "full recomputed", "lora", "lora recomputed", "frozen tower"],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_counted_bytes_are_those_of_real_passes(options: dict[str, Any], precision: str) -> None:
    config = configured(precision, 8, **options)
    sizes, _ = measure(config, OBSERVATION)
    weights, kept, peak = really(config)
    assert sizes.weights == pytest.approx(weights, rel=0.001)
    assert sizes.activations == pytest.approx(kept, rel=0.1)
    assert sizes.activations + max(sizes.forward_space, sizes.backward_space) == pytest.approx(peak, rel=0.15)
