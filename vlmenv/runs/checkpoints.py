"""Checkpoints of a run: the model in the published layout, with all that training needs to go on exactly."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from vlmenv.algos import Trainer
from vlmenv.algos.faults import nonfinite_weights
from vlmenv.core.errors import CheckpointError, ModelError
from vlmenv.core.files import replace_folder
from vlmenv.processes.together import together
from vlmenv.runs.run_folder import RunFolder


def save_checkpoint(trainer: Trainer, run: RunFolder) -> None:
    """Writes a checkpoint after the trainer's last step; the folder appears only when it is whole.

    Every process calls this.

    Raises:
        CheckpointError: It cannot be written, or the weights are not finite; earlier checkpoints are as they were.
        TrainingError: So it is in another process.
    """
    accelerator, folder = trainer.accelerator, run.checkpoint(trainer.step)
    partial, weights = folder.with_name(f".{folder.name}"), trainer.processes.weights()
    with together(accelerator), _written(folder, partial):
        if broken := nonfinite_weights(trainer.agent.policy):
            raise CheckpointError(f"{folder} is not written: the weights {', '.join(broken[:3])} are not finite")
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            trainer.agent.save(partial, weights)
            _save(trainer.state_dict(), partial / "trainer.pt")
    with together(accelerator), _written(folder, partial):
        _save(trainer.process_state(), partial / f"process-{accelerator.process_index}.pt")
    with together(accelerator), _written(folder, partial):
        if accelerator.is_main_process:
            replace_folder(partial, folder)


def save_best(trainer: Trainer, run: RunFolder) -> None:
    """Writes the model alone, as the best so far; all processes call this.

    Raises:
        CheckpointError: It cannot be written; the best model before is as it was.
    """
    folder, weights = run.path / "best", trainer.processes.weights()
    with together(trainer.accelerator), _written(folder, folder.with_name("best.partial")):
        if trainer.accelerator.is_main_process:
            trainer.agent.save(folder, weights)


def load_checkpoint(trainer: Trainer, run: RunFolder) -> None:
    """Puts a trainer into the state of a run's newest checkpoint, and cuts the run's files back to it.

    Where there is none yet, the trainer stays as it is, at its beginning, and the run's steps are cut out.

    Raises:
        ModelError: The checkpoint is of another number or kind of processes, or broken.
    """
    accelerator, found = trainer.accelerator, run.checkpoints()
    if found:
        _load(trainer, found[-1])
    if accelerator.is_main_process:
        run.cut(trainer.step)
        for partial in run.checkpoint(0).parent.glob(".step-*"):  # whose writing was cut off
            shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()


def _load(trainer: Trainer, folder: Path) -> None:
    accelerator = trainer.accelerator
    own = folder / f"process-{accelerator.process_index}.pt"
    if len(list(folder.glob("process-*.pt"))) != accelerator.num_processes:
        raise ModelError(f"{folder}: saved by another number of processes than {accelerator.num_processes}")
    try:
        state = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
        _check_kind(folder, state["processes"], trainer.processes.name)
        trainer.load(folder, state, torch.load(own, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise ModelError(f"{folder}: the checkpoint cannot be read: {error}") from error


def _check_kind(folder: Path, saved: str, now: str) -> None:
    if saved != now:
        raise ModelError(f"{folder}: saved by processes with {saved}, not {now}: launch them as the run was launched")


def prune(run: RunFolder, keep: int | None) -> None:
    """Removes all checkpoints but the newest `keep`, and the rests of ones before them; none where that is None."""
    kept = run.checkpoints()[-keep:] if keep else []
    for folder in kept[0].parent.glob("step-*") if kept else []:
        if run.step_of(folder) < run.step_of(kept[0]):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _written(folder: Path, partial: Path) -> Iterator[None]:
    """Removes what was written of a folder where the block fails, so that a full disk is no fuller than before."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{folder} cannot be written: {_cause(error)}") from error


def _cause(error: BaseException) -> BaseException:
    """The system's own error behind one of torch's, which tells of positions in a file; else the error itself."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__context__
    return found or error


def _save(state: dict[str, Any], file: Path) -> None:
    with file.open("wb") as stream:  # torch's own would not tell why it cannot write
        torch.save(state, stream)
