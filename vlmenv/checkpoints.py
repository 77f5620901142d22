"""Checkpoints of a run: the model in the published layout, with all that training needs to go on exactly."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import torch

from vlmenv.algos import Trainer
from vlmenv.core.errors import ModelError
from vlmenv.report.run_folder import RunFolder


def save_checkpoint(trainer: Trainer, run: RunFolder) -> None:
    """Writes a checkpoint after the trainer's last step; the folder appears only when it is whole.

    Every process calls this.

    Raises:
        OSError: It cannot be written; earlier checkpoints are as they were.
    """
    accelerator, folder = trainer.accelerator, run.checkpoint(trainer.step)
    partial, weights = folder.with_name(f".{folder.name}"), trainer.processes.weights()
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        trainer.agent.save(partial, weights)
        torch.save(trainer.state_dict(), partial / "trainer.pt")
    accelerator.wait_for_everyone()
    trainer.processes.save(partial)
    torch.save(trainer.process_state(), partial / f"process-{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _flush(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        _flush(folder.parent)
    accelerator.wait_for_everyone()


def load_checkpoint(trainer: Trainer, run: RunFolder) -> None:
    """Puts a trainer into the state of a run's newest checkpoint, and cuts the run's files back to it.

    Raises:
        ModelError: There is no checkpoint, or it is of another number or kind of processes, or broken.
    """
    accelerator, found = trainer.accelerator, run.checkpoints()
    if not found:
        raise ModelError(f"{run.path} has no checkpoint to go on from: start it anew")
    folder = found[-1]
    own = folder / f"process-{accelerator.process_index}.pt"
    if len(list(folder.glob("process-*.pt"))) != accelerator.num_processes:
        raise ModelError(f"{folder}: saved by another number of processes than {accelerator.num_processes}")
    try:
        state = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
        _check_kind(folder, state["processes"], trainer.processes.name)
        trainer.load(folder, state, torch.load(own, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise ModelError(f"{folder}: the checkpoint cannot be read: {error}") from error
    if accelerator.is_main_process:
        run.cut(trainer.step)
    accelerator.wait_for_everyone()


def _check_kind(folder: Path, saved: str, now: str) -> None:
    if saved != now:
        raise ModelError(f"{folder}: saved by processes with {saved}, not {now}: launch them as the run was launched")


def prune(run: RunFolder, keep: int | None) -> None:
    """Removes all checkpoints but the newest `keep`; none where that is None."""
    for folder in run.checkpoints()[:-keep] if keep else []:
        shutil.rmtree(folder, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Has a folder's files and names on the disk before what follows: a crash of the machine may come any time."""
    for path in [folder, *(file for file in folder.iterdir() if file.is_file())]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
