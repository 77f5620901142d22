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
    partial = folder.with_name(f".{folder.name}")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        trainer.agent.save(partial)
        torch.save(trainer.state_dict(), partial / "trainer.pt")
    accelerator.wait_for_everyone()
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

    Where there is none yet, the trainer stays as it is, at its beginning, and the run's steps are cut out.

    Raises:
        ModelError: The checkpoint is of another number of processes, or broken.
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
        trainer.agent.load(folder)
        trainer.load_state_dict(torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True))
        trainer.load_process_state(torch.load(own, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise ModelError(f"{folder}: the checkpoint cannot be read: {error}") from error


def prune(run: RunFolder, keep: int | None) -> None:
    """Removes all checkpoints but the newest `keep`, and the rests of ones before them; none where that is None."""
    kept = run.checkpoints()[-keep:] if keep else []
    for folder in kept[0].parent.glob("step-*") if kept else []:
        if run.step_of(folder) < run.step_of(kept[0]):
            shutil.rmtree(folder, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Has a folder's files and names on the disk before what follows: a crash of the machine may come any time."""
    for path in [folder, *(file for file in folder.iterdir() if file.is_file())]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
