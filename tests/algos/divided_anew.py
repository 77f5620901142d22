"""Run by `accelerate launch` with FSDP2: checkpoints of shards go on as whole copies, and back."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch.distributed.tensor import DTensor
from two_processes import build, trainer_of, weights_of

from vlmenv.algos import Trainer
from vlmenv.processes import leave
from vlmenv.runs.checkpoints import load_checkpoint, save_checkpoint
from vlmenv.runs.run_folder import RunFolder

State = dict[str, torch.Tensor]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    accelerator = Accelerator(cpu=True, kwargs_handlers=handlers)
    of_shards, of_copies = RunFolder(folder / "shards"), RunFolder(folder / "copies")
    sharded = make(accelerator, "FSDP2")
    steps = sharded.train(seed=0)
    next(steps)
    save_checkpoint(sharded, of_shards)
    saved = moments(sharded)
    next(steps)

    whole = make(accelerator, "whole copies")
    (note,) = load_checkpoint(whole, of_shards)
    assert note.endswith("was saved with FSDP2, and whole copies goes on")
    assert_same(moments(whole), saved)
    save_checkpoint(whole, of_copies)
    next(whole.train(seed=0))
    expected = weights_of(sharded)
    for name, weight in weights_of(whole).items() if accelerator.is_main_process else ():
        torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=0)

    again = make(accelerator, "FSDP2")
    load_checkpoint(again, of_copies)
    assert_same(moments(again), saved)
    next(again.train(seed=0))
    assert_same(weights_of(again), weights_of(sharded))
    leave()


def make(accelerator: Accelerator, kind: str) -> Trainer:
    os.environ["ACCELERATE_USE_FSDP"] = "true" if kind == "FSDP2" else "false"
    trainer = trainer_of(build("full"), accelerator)
    assert trainer.processes.name == kind
    return trainer


def moments(trainer: Trainer) -> State:
    """The optimizer's state, whole."""
    state = trainer.optimizer.state_dict()["state"]
    kept = {f"{index} {name}": value for index, one in state.items() for name, value in one.items()}
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in kept.items()}


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


if __name__ == "__main__":
    main(Path(sys.argv[1]))
