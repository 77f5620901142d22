"""Run by `accelerate launch`: two processes train together on weights and optimizer states of fewer bits."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from two_processes import follow, trainer_of, weights_of

from vlmenv.agents.vlm import Sampling, VLMAgent
from vlmenv.algos import Trainer
from vlmenv.processes import leave
from vlmenv.runs.checkpoints import load_checkpoint
from vlmenv.runs.run_folder import RunFolder

OPTIMIZERS = {"eight": "adamw_8bit", "whole": "adamw", "whole eight": "adamw_8bit"}


def main(kind: str, base: str, folder: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", kwargs_handlers=handlers)
    for case in cases:
        check(accelerator, case, base, RunFolder(folder / case))
    assert make(cases[0], base, accelerator).processes.name == kind
    leave()


def make(case: str, base: str, accelerator: Accelerator) -> Trainer:
    torch.manual_seed(0)
    kind = case if case in ("nf4", "int8") else None
    dtype = torch.bfloat16 if case.startswith("whole") or case == "frozen" else torch.float32
    agent = VLMAgent.from_pretrained(base, dtype=dtype, sampling=Sampling(max_new_tokens=20), quantization=kind)
    if case in ("frozen", "nf4", "int8"):
        agent.add_lora(rank=2, alpha=4, vision=True)
    agent.hold("all" if case.startswith("whole") else "frozen")
    agent.seed(0)
    return trainer_of(agent, accelerator, beta=0.1, optimizer=OPTIMIZERS.get(case, "adamw"))


def check(accelerator: Accelerator, case: str, base: str, run: RunFolder) -> None:
    """Ranks stay in step, and what they save goes on bit for bit."""
    trainer = make(case, base, accelerator)
    begun = weights_of(trainer)
    metrics = follow(trainer, run)
    assert metrics[0] == metrics[1] != metrics[2]
    weights = weights_of(trainer)
    if accelerator.is_main_process:
        assert any(not torch.equal(weight, begun[name]) for name, weight in weights.items())
        run.checkpoint(2).rename(run.path / "last")
    if trainer.processes.name != "FSDP2":  # replicas are rounded alike
        sums = [float(weight.double().sum()) for weight in weights.values() if weight.is_floating_point()]
        both = trainer.processes.collect([sums])
        assert both[0] == both[1]
    accelerator.wait_for_everyone()
    again = make(case, base, accelerator)
    load_checkpoint(again, run)
    assert again.step == 1
    assert follow(again, run) == metrics
    for name, weight in weights_of(again).items():
        assert torch.equal(weight, weights[name]), name


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4].split(","))
