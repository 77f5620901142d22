"""Run by `accelerate launch` with FSDP2: the main process alone reads weights, and learning is the same."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from two_processes import trainer_of, weights_of

from vlmenv.agents.vlm import Sampling, VLMAgent
from vlmenv.agents.weights import WideEmbedding
from vlmenv.algos import Trainer
from vlmenv.core.errors import ModelError
from vlmenv.processes import leave
from vlmenv.runs.checkpoints import load_checkpoint, save_checkpoint
from vlmenv.runs.run_folder import RunFolder


def main(base: str, adapters: str, folder: Path) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    for case, model in {"full": base, "lora": base, "adapters": adapters}.items():
        check(accelerator, model, case, RunFolder(folder / case))
    leave()


def check(accelerator: Accelerator, model: str, case: str, run: RunFolder) -> None:
    usual = make(accelerator, model, case, empty=False)
    trainer = make(accelerator, model, case, empty=not accelerator.is_main_process)
    policies = [(usual.agent.policy, trainer.agent.policy)]
    if case == "full":
        policies.append((usual.reference.policy, trainer.reference.policy))
    for expected, found in policies:
        assert_same(tensors(found), tensors(expected))
        assert is_wide(found) == is_wide(expected)
    if case == "adapters":  # which learn and are resumed as those of "lora"
        return
    assert_same(weights_after(trainer, run), weights_after(usual))
    again = make(accelerator, model, case, empty=not accelerator.is_main_process)
    read: Any = again.agent._read
    again.agent._read = lambda folder: reads.append(folder) or read(folder)
    reads: list[Path] = []
    load_checkpoint(again, run)
    assert len(reads) == accelerator.is_main_process
    assert_same(tensors(again.agent.policy), tensors(trainer.agent.policy))
    if accelerator.is_main_process:
        next(run.checkpoint(1).glob("*.safetensors")).unlink()
    accelerator.wait_for_everyone()
    with pytest.raises(ModelError, match="cannot be read"):  # which the main process alone finds out
        again.agent.load(run.checkpoint(1))


def make(accelerator: Accelerator, model: str, case: str, *, empty: bool) -> Trainer:
    torch.manual_seed(0)
    agent = VLMAgent.from_pretrained(model, sampling=Sampling(max_new_tokens=20), empty=empty)
    if case == "lora":
        agent.add_lora(rank=2, alpha=4, vision=True)
    agent.hold("frozen")
    agent.add_value_head()
    agent.check_saving()
    assert all(one.is_meta == empty for one in agent.policy.parameters())
    return trainer_of(agent, accelerator, beta=0.0 if case == "adapters" else 0.1)


def tensors(policy: Any) -> dict[str, Tensor]:
    """This rank's shards and buffers."""
    shards = {name: one.to_local() for name, one in policy.named_parameters(remove_duplicate=False)}
    return shards | dict(policy.named_buffers())


def is_wide(policy: Any) -> bool:
    return isinstance(policy.model.get_input_embeddings(), WideEmbedding)


def weights_after(trainer: Trainer, run: RunFolder | None = None) -> dict[str, Tensor]:
    """The weights after training, whose steps are saved if there is a run."""
    for result in trainer.train(seed=0):
        if run is not None:
            if trainer.accelerator.is_main_process:
                run.path.mkdir(parents=True, exist_ok=True)
                run.write_step(result)
            save_checkpoint(trainer, run)
    return weights_of(trainer)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
