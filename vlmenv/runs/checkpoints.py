"""Checkpoints of a run: the model in the published layout, and the state that training continues from exactly."""

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
from vlmenv.processes.failures import shared_failure
from vlmenv.runs.run_folder import RunFolder


def save_checkpoint(trainer: Trainer, run: RunFolder) -> None:
    """Writes a checkpoint after the trainer's last step, atomically. A collective: all ranks must call it.

    Raises:
        CheckpointError: It cannot be written, or the weights are not finite. Earlier checkpoints stay unchanged.
        TrainingError: It failed on another rank.
    """
    accelerator, folder = trainer.accelerator, run.checkpoint(trainer.step)
    partial, weights = folder.with_name(f".{folder.name}"), trainer.processes.weights()
    with shared_failure(accelerator), _written(folder, partial):
        if broken := nonfinite_weights(trainer.agent.policy):
            raise CheckpointError(
                f"{folder} is not written, because the weights {', '.join(broken[:3])} are not finite"
            )
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            trainer.agent.save(partial, weights)
            _save(trainer.state_dict(), partial / "trainer.pt")
    with shared_failure(accelerator), _written(folder, partial):
        _save(trainer.process_state(), partial / f"process-{accelerator.process_index}.pt")
    with shared_failure(accelerator), _written(folder, partial):
        if accelerator.is_main_process:
            replace_folder(partial, folder)


def save_best(trainer: Trainer, run: RunFolder) -> None:
    """Writes the model as the best so far, without the trainer's state. A collective: all ranks must call it.

    Raises:
        CheckpointError: It cannot be written. The former best model stays unchanged.
    """
    folder, weights = run.path / "best", trainer.processes.weights()
    with shared_failure(trainer.accelerator), _written(folder, folder.with_name("best.partial")):
        if trainer.accelerator.is_main_process:
            trainer.agent.save(folder, weights)


def load_checkpoint(trainer: Trainer, run: RunFolder) -> None:
    """Restores a run's newest checkpoint, and removes later steps from the run's files.

    Without a checkpoint the trainer stays at its beginning, and all steps are removed from the files.

    Raises:
        ModelError: The checkpoint has another number of ranks or another strategy, or cannot be read.
    """
    accelerator, found = trainer.accelerator, run.checkpoints()
    if found:
        _load(trainer, found[-1])
    if accelerator.is_main_process:
        run.cut(trainer.step)
        for partial in run.checkpoint(0).parent.glob(".step-*"):  # incomplete writes
            shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()


def _load(trainer: Trainer, folder: Path) -> None:
    accelerator = trainer.accelerator
    own = folder / f"process-{accelerator.process_index}.pt"
    if len(list(folder.glob("process-*.pt"))) != accelerator.num_processes:
        raise ModelError(
            f"{folder}: saved by another number of ranks than {accelerator.num_processes}: launch as many as then"
        )
    try:
        state = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
        _check_kind(folder, state["processes"], trainer.processes.name)
        trainer.load(folder, state, torch.load(own, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise ModelError(f"{folder}: the checkpoint cannot be read: {error}") from error


def _check_kind(folder: Path, saved: str, now: str) -> None:
    if saved != now:
        raise ModelError(f"{folder}: saved with {saved}, not with {now}: launch as the run was launched")


def prune(run: RunFolder, keep: int | None) -> None:
    """Removes all but the newest `keep` checkpoints. None: removes nothing."""
    kept = run.checkpoints()[-keep:] if keep else []
    for folder in kept[0].parent.glob("step-*") if kept else []:
        if run.step_of(folder) < run.step_of(kept[0]):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _written(folder: Path, partial: Path) -> Iterator[None]:
    """Removes the partial folder if the block fails, so that a full disk gets its space back."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{folder} cannot be written: {_cause(error)}") from error


def _cause(error: BaseException) -> BaseException:
    """The system's error behind torch's, which tells only positions in a file; else the error itself."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__context__
    return found or error


def _save(state: dict[str, Any], file: Path) -> None:
    with file.open("wb") as stream:  # torch.save of a path hides the system's error
        torch.save(state, stream)
