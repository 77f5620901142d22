"""A save is tried before training: the conversion of weights, the run's folder, and the room on its disk."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from vlmenv.agents.saving import kept_files, usual_type
from vlmenv.agents.vlm import VLMAgent
from vlmenv.algos.optimizers import OptimizerName, state_bytes
from vlmenv.compat.deepspeed import whole_size
from vlmenv.core.console import say
from vlmenv.core.errors import CheckpointError
from vlmenv.options.train import TrainConfig
from vlmenv.runs.run_folder import RunFolder


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes of a checkpoint's parts."""

    model: int
    """weights with what they round away, or adapters; processor files"""
    training: int
    """the optimizer's state"""

    @classmethod
    def of(cls, agent: VLMAgent, optimizer: OptimizerName = "adamw") -> Size:
        """The size of an agent's checkpoints with an optimizer, to a few percent."""
        trained = agent.parameters()
        files = sum(file.stat().st_size for file in kept_files(agent.folder))
        state = sum(state_bytes(optimizer, one.dtype) * whole_size(one) for one in trained)
        return cls(files + _weights(agent, trained), int(state))


def _weights(agent: VLMAgent, trained: Sequence[nn.Parameter]) -> int:
    if agent.lora is not None:
        return torch.float32.itemsize * sum(map(whole_size, trained))
    kind = agent.save_dtype or usual_type(agent.folder)
    lost = {torch.bfloat16: 2, torch.float16: 4}.get(kind, 0)  # see vlmenv.agents.remainders
    rounded = sum(whole_size(one) for one in trained if one.dtype != kind)
    return sum(map(whole_size, agent.policy.parameters())) * kind.itemsize + lost * rounded


@dataclass(frozen=True, slots=True)
class Need:
    """Room that a run's checkpoints take."""

    each: int
    """bytes of a checkpoint"""
    most: int
    """number of checkpoints that there are at a time, one that is being written included"""
    best: int
    """bytes of the best model, and of a mix the best one for each task, a former one included while it is replaced"""
    there: int
    """bytes of what is there already, of a run that goes on"""

    @classmethod
    def of(cls, size: Size, config: TrainConfig[Any], run: RunFolder) -> Need:
        """The need of a run from where it stands."""
        logging, steps = config.logging, config.trainer.steps
        if logging.kept is not None:
            most = logging.kept + 1
        else:  # all are kept
            most = math.ceil(steps / logging.checkpoint_every) if logging.checkpoint_every else 1
        folders = [*run.checkpoints(), *run.path.glob("best*")]
        there = sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
        each = size.model + size.training
        best = 2 + len(config.mixing.mix or ())
        return cls(each, most, best * size.model if config.measuring.eval_every else 0, there)

    @property
    def bytes(self) -> int:
        """Bytes that are still to be written."""
        return max(0, self.each * self.most + self.best - self.there)


def check_room(agent: VLMAgent, config: TrainConfig[Any], run: RunFolder, console: Console) -> None:
    """Tries to write into a run's folder, and tells how much room its checkpoints take. For the main rank.

    Raises:
        CheckpointError: The disk has less room than they need.
        OSError: The folder cannot be written.
    """
    folder = run.path / "checkpoints"
    folder = folder if folder.is_dir() else run.path
    tempfile.TemporaryFile(dir=folder).close()
    told, fits = room(agent, config, run)
    if not fits:
        raise CheckpointError(
            f"{folder}: the disk has too little room. {told[0].upper()}{told[1:]}. Lower --keep, train with "
            "--lora-rank, or give --output on another disk"
        )
    say(f"disk: {told}", console)


def room(agent: VLMAgent, config: TrainConfig[Any], run: RunFolder) -> tuple[str, bool]:
    """The room that a run's checkpoints take and that is free, in words, and whether they fit. Nothing is written."""
    need = Need.of(Size.of(agent, config.trainer.optimizer), config, run)
    free = shutil.disk_usage(_existing(run.path / "checkpoints")).free
    kept = f"{need.most} of them" if config.logging.kept is None else f"{need.most} at a time, one being written"
    best = " and the best model" if need.best else ""
    told = (
        f"a checkpoint takes {_human(need.each)}; {kept}{best} take {_human(need.each * need.most + need.best)}. "
        f"{_human(free)} are free"
    )
    return told, need.bytes <= free


def _existing(folder: Path) -> Path:
    """The nearest folder above that exists."""
    folder = folder.absolute()
    return next(one for one in (folder, *folder.parents) if one.is_dir())


def _human(size: float) -> str:
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 1000:
            return f"{size:.3g} {unit}"
    return f"{size / 1000:.3g} TB"
