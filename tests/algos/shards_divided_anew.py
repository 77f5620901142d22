"""Run by `accelerate launch` with DeepSpeed: other ranks go on with the optimizer's state that some have saved."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from deepspeed.utils import safe_get_full_optimizer_state
from two_processes import build, trainer_of, weights_of

from vlmenv.algos import Trainer
from vlmenv.processes import leave
from vlmenv.runs.checkpoints import load_checkpoint, save_checkpoint
from vlmenv.runs.run_folder import RunFolder

State = dict[str, torch.Tensor]


def main(source: str, target: str, folder: Path) -> None:
    """Goes on with `source`, or begins if it is "nothing", and saves as `target`."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    trainer = trainer_of(build("full"), accelerator, steps=9)
    assert trainer.processes.name == "ZeRO"
    goes_on = source != "nothing"
    if goes_on:
        notes = load_checkpoint(trainer, RunFolder(folder / source))
        assert not accelerator.is_main_process or "go on: the run is not the same bit for bit" in notes[0]
    else:
        steps = trainer.train(seed=0)
        next(steps)
        next(steps)
    found = moments(trainer) | weights_of(trainer)
    if accelerator.is_main_process:
        if not goes_on:
            torch.save(found, folder / "expected.pt")
        assert_same(found, torch.load(folder / "expected.pt"))
    save_checkpoint(trainer, RunFolder(folder / target))
    if goes_on:
        next(trainer.train(seed=0))
        after = moments(trainer)
        assert all(value.isfinite().all() for value in after.values())
        assert sum(not torch.equal(value, found[name]) for name, value in after.items()) > len(after) // 2
    leave()


def moments(trainer: Trainer) -> State:
    """The optimizer's state by weight, as DeepSpeed gathers it."""
    zero = trainer.processes._engine.optimizer  # type: ignore[attr-defined]
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):  # which DeepSpeed does after the first group's step
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
    weights = dict(trainer.agent.family_policy.named_parameters())
    kept = {
        f"{name} {kind}": safe_get_full_optimizer_state(weight, kind)
        for name, weight in weights.items()
        if weight.requires_grad
        for kind in ("exp_avg", "exp_avg_sq")
    }
    return {name: value.detach().clone() for name, value in kept.items()}


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    assert sum(bool(value.any()) for value in found.values()) > len(found) // 2
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
