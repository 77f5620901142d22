"""Checkpoints of a run: the model in the published layout, and the state that training continues from exactly."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import torch
from safetensors import SafetensorError

from vlmenv.algos import Trainer
from vlmenv.algos.faults import nonfinite_weights
from vlmenv.core.errors import CheckpointError, ModelError
from vlmenv.core.files import replace_folder
from vlmenv.processes.base import Processes, Sharded
from vlmenv.processes.failures import shared_failure
from vlmenv.runs.manifest import damage, read_manifest, write_manifest
from vlmenv.runs.run_folder import RunFolder


def save_checkpoint(trainer: Trainer, run: RunFolder, facts: Mapping[str, Any] | None = None) -> None:
    """Writes a checkpoint after the trainer's last step, atomically. A collective: all ranks must call it.

    Its manifest holds checksums of the files, the lengths of the run's logs, and `facts`, which resuming compares.

    Args:
        trainer: The trainer.
        run: The run's folder.
        facts: What to keep in the manifest, as JSON can hold it; of the main rank.

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
            write_manifest(partial, {**(facts or {}), "step": trainer.step, "logs": run.flush_logs()})
            replace_folder(partial, folder)


def save_best(trainer: Trainer, run: RunFolder, name: str = "best") -> None:
    """Writes the model as the best so far with its manifest, without the trainer's state. A collective.

    Args:
        trainer: The trainer.
        run: The run's folder.
        name: Name of the model's folder. Default: the one that the run is named by as a model.

    Raises:
        CheckpointError: It cannot be written. The former best model stays unchanged.
    """
    folder, weights = run.path / name, trainer.processes.weights()
    partial = folder.with_name(f"{name}.partial")
    with shared_failure(trainer.accelerator), _written(folder, partial):
        if trainer.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            trainer.agent.save(partial, weights)
            write_manifest(partial, {"step": trainer.step})
            replace_folder(partial, folder)


@dataclass(frozen=True, slots=True)
class Found:
    """The checkpoint that a run goes on from."""

    folder: Path | None
    """None: there is none, and the run starts over"""
    facts: dict[str, Any]
    """of its manifest; empty for a checkpoint of an earlier version"""
    notes: list[str]
    """what is wrong with newer ones, a line each"""

    @property
    def step(self) -> int:
        """The step after which it was written; 0 without one."""
        return 0 if self.folder is None else RunFolder.step_of(self.folder)


def find_checkpoint(run: RunFolder) -> Found:
    """Finds a run's newest whole checkpoint of its own, and sets newer ones aside. For the main rank.

    Raises:
        ModelError: There are checkpoints, but none that is whole and of this run.
    """
    identity, notes = run.identity(), list[str]()
    for folder in reversed(run.checkpoints()):
        fault, facts = _examined(folder, identity)
        if fault is None:
            for newer in run.checkpoints():
                if run.step_of(newer) > run.step_of(folder):
                    _set_aside(newer)
            if not facts:
                notes.append(f"{folder} has no manifest, as earlier versions wrote none: its files are not verified")
            return Found(folder, facts, notes)
        notes.append(f"{folder} is passed over: {fault}")
    if notes:
        raise ModelError(
            f"{run.path} has no checkpoint to go on from: {'; '.join(notes)}. Start over with the run's command and "
            "another --output, or remove the folder checkpoints and resume"
        )
    return Found(None, {}, [])


def _examined(folder: Path, identity: str | None) -> tuple[str | None, dict[str, Any]]:
    """Why a checkpoint cannot be used by a run, None if it can, and the facts of its manifest."""
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return str(error), {}
    if manifest is None:
        return ("manifest.json is missing" if identity else None), {}
    if manifest.get("run") not in (None, identity) and identity is not None:
        return f"it is of another run, {manifest['run']}", {}
    return damage(folder, manifest), manifest


def _set_aside(folder: Path) -> None:
    """Renames a checkpoint, so that it is no longer taken for one."""
    aside = folder.with_name(f"{folder.name}.unused")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)


def load_checkpoint(trainer: Trainer, run: RunFolder, found: Found | None = None) -> list[str]:
    """Restores a run's newest whole checkpoint, and removes later steps from the run's files. A collective.

    Without a checkpoint the trainer stays at its beginning, and all steps are removed from the files.

    Args:
        trainer: A new trainer.
        run: The run's folder.
        found: What `find_checkpoint` gave on the main rank. Default: found now.

    Returns:
        On the main rank, what is not as it was: other ranks, lost lines of logs.

    Raises:
        ModelError: The checkpoint has another strategy or another number of shards, or cannot be read.
    """
    accelerator, notes = trainer.accelerator, list[str]()
    with shared_failure(accelerator):
        if found is None and accelerator.is_main_process:
            found = find_checkpoint(run)
    found = trainer.processes.broadcast(found)
    assert found is not None
    if found.folder is not None:
        notes += _load(trainer, found.folder)
    with shared_failure(accelerator):
        if accelerator.is_main_process:
            notes += run.cut(trainer.step, found.facts.get("logs") if found.folder else {})
            for partial in run.rests():
                shutil.rmtree(partial, ignore_errors=True)
    return notes


def _load(trainer: Trainer, folder: Path) -> list[str]:
    accelerator, saved = trainer.accelerator, len(list(folder.glob("process-*.pt")))
    rank, changed = accelerator.process_index, saved != accelerator.num_processes
    try:
        state = _read(folder / "trainer.pt", mmap=isinstance(trainer.processes, Sharded))
        _check_optimizer(folder, state.get("optimizer_name", "adamw"), trainer.config.optimizer)
        own = _read(folder / f"process-{rank}.pt") if rank < saved else None
        state.setdefault("shards", 1 if "optimizer" in state else saved)  # which earlier versions did not write
        if _is_divided_anew(folder, state, trainer.processes):
            state["undivided"] = _shards(folder, state)
        trainer.load(folder, state, own, same_ranks=not changed)
    except KeyError as error:
        raise ModelError(
            f"{folder}: the checkpoint's state lacks {error}: another version of vlmenv may have written it"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ModelError(f"{folder}: the checkpoint cannot be read: {error}") from error
    notes = []
    if state["processes"] != trainer.processes.name:
        notes.append(f"{folder} was saved with {state['processes']}, and {trainer.processes.name} goes on")
    if changed:
        notes.append(
            f"{folder} was saved by {saved} ranks, and {accelerator.num_processes} go on: the run is not the same bit "
            "for bit, as random states differ, and what ranks knew of samples or kept for replay is dropped"
        )
    return notes


def _read(file: Path, *, mmap: bool = False) -> dict[str, Any]:
    """A part of a checkpoint. With `mmap` tensors stay on the disk until they are used."""
    return cast(dict[str, Any], torch.load(file, map_location="cpu", weights_only=True, mmap=mmap))


def _shards(folder: Path, state: dict[str, Any]) -> list[dict[str, Any]]:
    """The optimizer's state in its shards; a single one if ranks had whole copies."""
    if "optimizer" in state:
        return [state["optimizer"]]
    return [_read(folder / f"process-{rank}.pt", mmap=True)["optimizer"] for rank in range(state["shards"])]


_CONVERTIBLE: Final = {"whole copies", "FSDP2"}
"""Strategies that go on with one another's optimizer state."""


def _is_divided_anew(folder: Path, state: dict[str, Any], processes: Processes) -> bool:
    """True if the ranks of now divide the optimizer's state otherwise than those that saved it.

    Raises:
        ModelError: The strategy or the optimizer does not allow that.
    """
    then, now = (state["processes"], state["shards"]), (processes.name, processes.shards)
    if then == now:
        return False
    how = "launch as the run was launched"
    if then[0] != now[0] and not {then[0], now[0]} <= _CONVERTIBLE:
        raise ModelError(f"{folder}: saved with {then[0]}, not with {now[0]}: {how}")
    if state.get("optimizer_name") == "adamw_8bit":
        raise ModelError(
            f"{folder}: saved with {then[0]} in {then[1]} shards, not with {now[0]} in {now[1]}, and the optimizer's "
            f"state of adamw_8bit cannot be divided anew: {how}"
        )
    return True


def _check_optimizer(folder: Path, saved: str, now: str) -> None:
    if saved != now:
        raise ModelError(f"{folder}: saved with optimizer {saved}, not with {now}: put it back into config.yaml")


def prune(run: RunFolder, keep: int | None) -> None:
    """Removes all but the newest `keep` checkpoints. None: removes nothing."""
    kept = run.checkpoints()[-keep:] if keep else []
    for folder in run.rests(before=run.step_of(kept[0])) if kept else []:
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
