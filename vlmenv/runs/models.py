"""Models by name: a run's folder serves wherever a model does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from vlmenv.agents.checkpoints import find_adapter, find_model
from vlmenv.core.console import say
from vlmenv.core.errors import ModelError
from vlmenv.core.urls import is_server
from vlmenv.options.task import TaskConfig
from vlmenv.options.train import TrainConfig
from vlmenv.runs.manifest import damage, read_manifest
from vlmenv.runs.run_folder import RunFolder

ConfigT = TypeVar("ConfigT", bound=TaskConfig)


def with_checkpoint(config: ConfigT, console: Console) -> ConfigT:
    """The options with a checkpoint as the model if a run's folder is given, which is printed.

    Raises:
        ModelError: The run has no checkpoint yet.
    """
    if (found := checkpoint_of(config.model)) is None:
        return config
    folder, which = found
    say(f"the model is {folder}, the {which} of {config.model}", console)
    changed: Any = replace(config, model=str(folder))
    return changed  # type: ignore[no-any-return]


def with_teacher(config: TrainConfig[Any], console: Console) -> TrainConfig[Any]:
    """The options with a checkpoint as the teacher if a run's folder is given, which is printed.

    So the record names the checkpoint, and a resumed run has the same teacher, also if that run has gone on since.

    Raises:
        ModelError: The run has no checkpoint yet.
    """
    name = getattr(config.algorithm, "teacher", None)
    if name is None or is_server(name) or (found := checkpoint_of(name)) is None:
        return config
    folder, which = found
    say(f"the teacher is {folder}, the {which} of {name}", console)
    return replace(config, algorithm=replace(config.algorithm, teacher=str(folder.absolute())))


def model_folder(name: str) -> Path:
    """The folder of a model; of a run, that of its best or newest checkpoint.

    Raises:
        ModelError: There is no such model.
    """
    return find_model(checkpoint_name(name))


def checkpoint_name(name: str) -> str:
    """The name of a model; of a run, the folder of its best or newest checkpoint.

    Raises:
        ModelError: The run has no checkpoint yet.
    """
    found = checkpoint_of(name)
    return name if found is None else str(found[0])


def adapter_folder(name: str) -> Path | None:
    """The folder of the adapters that a model or a run's checkpoint consists of; None for a whole model.

    Raises:
        ModelError: There is no such model.
    """
    return find_adapter(checkpoint_name(name))


def checkpoint_of(name: str) -> tuple[Path, str] | None:
    """The best checkpoint of a run's folder if one was measured, else the newest, and which; None for other names.

    Raises:
        ModelError: The run has no checkpoint yet, or its best one is damaged.
    """
    run = RunFolder(Path(name))
    if (run.path / "config.json").is_file() or not (run.path / "config.yaml").is_file():
        return None
    if (run.path / "best" / "config.json").is_file():
        if (fault := model_damage(run.path / "best")) is not None:
            raise ModelError(
                f"{run.path / 'best'}: {fault}. Remove the folder to use the run's newest checkpoint, or name a "
                "checkpoint's folder"
            )
        best = run.best()
        measured = f"{best.get('metric')} {best.get('value')} at step {best.get('step')}"
        return run.path / "best", f"best checkpoint ({measured})"
    folder, is_newest = newest_model(run)
    which = "newest checkpoint" if is_newest else "newest whole checkpoint"
    return folder, f"{which} (step {run.step_of(folder)})"


def newest_model(run: RunFolder) -> tuple[Path, bool]:
    """The newest checkpoint of a run whose model is whole, and whether there is no newer one.

    Raises:
        ModelError: There is none.
    """
    faults: list[str] = []
    for folder in reversed(run.checkpoints()):
        if (fault := model_damage(folder)) is None:
            return folder, not faults
        faults.append(f"{folder}: {fault}")
    raise ModelError(
        f"{run.path}: the run has no whole checkpoint. {faults[0]}"
        if faults
        else f"{run.path}: the run has no checkpoint yet"
    )


def model_damage(folder: Path) -> str | None:
    """What is wrong with the model in a checkpoint; None if nothing is, or if it has no manifest."""
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return str(error)
    return None if manifest is None else damage(folder, manifest, model=True)
