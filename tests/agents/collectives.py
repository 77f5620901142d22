"""Run by `torch.distributed.run`: counts what two ranks with shards gather and reduce for a micro-batch, and when."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from batches import loss_of, rollout_of
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForImageTextToText

from vlmenv.agents.families import Processor, family_of
from vlmenv.agents.vlm import VLMAgent, find_model
from vlmenv.processes import leave
from vlmenv.processes.fsdp import FSDP

BLOCKS = 6


class Collectives(TorchDispatchMode):
    """Notes collectives between other events."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name
        if "allgather" in name:
            self.events.append("gather")
        if "reduce_scatter" in name:
            self.events.append("reduce")
        return function(*args, **(kwargs or {}))


def build() -> VLMAgent:
    """The built-in model with random weights and more blocks."""
    folder = find_model("builtin")
    config = AutoConfig.from_pretrained(folder)
    config.text_config.num_hidden_layers = BLOCKS
    config.text_config.layer_types = ["full_attention"] * BLOCKS
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    return VLMAgent(family_of(config.model_type)(model, Processor.from_pretrained(folder)), folder)


def measure(checkpointing: bool) -> dict[str, Any]:
    agent = build()
    rollout = rollout_of(agent)
    if checkpointing:
        agent.enable_gradient_checkpointing()
    shards = FSDP(Accelerator(cpu=True), reshard=True)
    shards.configure(agent)
    shards.prepare(agent, None, lambda: torch.optim.AdamW(agent.parameters()))
    rows = rollout[:4] if dist.get_rank() == 0 else rollout[4:]
    with Collectives() as noted:
        for index, block in enumerate(agent.family.language_model().layers):
            block.register_forward_hook(lambda _, __, out, index=index: note_backward(out, noted, index))
        loss = loss_of(agent, rows)
        forward = noted.events.count("gather")
        noted.events.clear()
        loss.backward()
    return {"units": len(agent.blocks()) + 1, "forward": forward, "backward": noted.events}


def note_backward(out: torch.Tensor, noted: Collectives, index: int) -> torch.Tensor:
    if out.requires_grad:
        out.register_hook(lambda _: noted.events.append(f"block {index}"))
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {name: measure(name == "checkpointing") for name in ("plain", "checkpointing")}
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    leave()
