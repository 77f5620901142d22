"""The record of a run: what was asked, and everything that was used."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from accelerate import Accelerator
from packaging.requirements import Requirement
from rich.console import Console

import vlmenv
from vlmenv.agents.checkpoints import ADAPTER_CONFIG, find_adapter, find_model
from vlmenv.agents.fast_paths import FastPath
from vlmenv.agents.lora import ADAPTER_WEIGHTS
from vlmenv.core.console import say, styled
from vlmenv.core.files import file_digest
from vlmenv.core.names import hub_name
from vlmenv.envs.data.dataset import hub_commits
from vlmenv.envs.mixed import by_task
from vlmenv.envs.vector import VisualTaskVectorEnv
from vlmenv.options.fields import flatten, options_of
from vlmenv.options.files import to_yaml
from vlmenv.options.mixing import names_by_task, parts_of
from vlmenv.options.resolve import NAMING, RECORD, grouped
from vlmenv.options.train import TrainConfig
from vlmenv.runs.by_task import Envs, told_of
from vlmenv.runs.lengths import Lengths
from vlmenv.runs.run_folder import RunFolder

_PLACES: Final = (*NAMING, "output")
"""Options that say where a run is, not what it is."""
_LARGE: Final = 1 << 30  # bytes; of larger files the ends are summed, and the record says so
_END: Final = 1 << 24


def asked_yaml(config: TrainConfig[Any], names: Collection[str], identity: str) -> str:
    """The content of config.yaml: the options that were asked for, the algorithm's own in a group.

    Args:
        config: All options.
        names: Those that files, flags or keyword arguments gave.
        identity: The run's id, which its checkpoints carry.
    """
    always = {"algo", "model"} if config.mixing.mix else {"env", "algo", "model"}
    kept = [name for name in options_of(config) if name in {*names, *always} and name not in _PLACES]
    return to_yaml(grouped(config.located(), kept) | {RECORD: {"run": identity}})


def resolved_yaml(
    config: TrainConfig[Any],
    envs: Envs,
    held_out: Envs | None,
    accelerator: Accelerator,
    identity: str | None = None,
    lengths: Mapping[str, Lengths] = MappingProxyType({}),
    paths: Sequence[FastPath] = (),
) -> str:
    """The content of resolved.yaml: all options with the values that are used, and how the run is made.

    `vlmenv train --config RUN/resolved.yaml` repeats the run, also if defaults have changed since.

    Args:
        config: All options.
        envs: The environments of training.
        held_out: The environments of measuring. None: nothing is measured.
        accelerator: Device and ranks.
        identity: The run's id. None: nothing is run.
        lengths: The lengths of the prompts of training by task, of those with a data set.
        paths: The fast paths of the model. Default: none, as no model is loaded.
    """
    tasks, commits = by_task(envs), _commits(envs, held_out)
    rows = {
        f"{name} {what}" if name else what: value
        for name, own in lengths.items()
        for what, value in (("prompt_tokens", own.figures()), ("left_out", dict(tasks[name].task.source.unwanted)))
    }
    record = _record(config, commits, accelerator)
    if paths:
        record["fast_paths"] = {path.name: path.written for path in paths}
    config = _pinned(config.located() if config.mixing.mix else used(config, tasks[""]), commits)
    names = [name for name in options_of(config) if name not in _PLACES]
    return to_yaml(grouped(config, names) | {RECORD: {"run": identity, **record, **rows}})


def _commits(*envs: Envs | None) -> dict[str, str]:
    """The commits of data sets on the hub."""
    sources = [one.task.source for several in envs for one in by_task(several).values()]
    return {name: commit for source in sources for name, commit in hub_commits(source).items()}


def sections_yaml(config: TrainConfig[Any], envs: Envs, held_out: Envs | None) -> str:
    """The content of mix.yaml: the options of each task of a mix, with the values that are used; empty without."""
    tasks, commits = by_task(envs), _commits(envs, held_out)
    parts = {name: _pinned(used(part.config, tasks[name]), commits) for name, part in parts_of(config).items()}
    return to_yaml({name: of_section(one) for name, one in parts.items()}) if parts else ""


def of_section(config: TrainConfig[Any]) -> dict[str, Any]:
    """The options of a task of a mix that its section may have."""
    values = flatten(config)
    return {name: values[name] for name in ("env", *names_by_task(config))}


def used(config: TrainConfig[Any], envs: VisualTaskVectorEnv) -> TrainConfig[Any]:
    """The options with what the task uses where they leave the choice to it."""
    task = envs.task
    prompts = replace(
        config.prompts,
        rewards=task.rewards,
        prompt_template=task.template,
        answer_format=task.answer_format.value,
        coordinates=task.coordinates.space.value,
    )
    return replace(config.located(), prompts=prompts)


def _pinned(config: TrainConfig[Any], commits: Mapping[str, str]) -> TrainConfig[Any]:
    """The options with names on the hub that stay what they are, also if a branch moves on."""

    def pinned(name: str, commit: str | None) -> str:
        named = hub_name(name)
        return f"{named[0]}@{commit}" if named and commit else name

    def all_pinned(names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return names and tuple(pinned(name, commits.get(name)) for name in names)

    return replace(
        config,
        model=pinned(config.model, _commit(find_adapter(config.model) or find_model(config.model)).get("commit")),
        data=replace(config.data, dataset=all_pinned(config.data.dataset)),
        measuring=replace(config.measuring, eval_dataset=all_pinned(config.measuring.eval_dataset)),
    )


def _record(config: TrainConfig[Any], commits: Mapping[str, str], accelerator: Accelerator) -> dict[str, Any]:
    """How the run is made: programs, devices, files."""
    model = find_model(config.model)
    record: dict[str, Any] = {
        "versions": {"vlmenv": vlmenv.__version__, "python": platform.python_version(), **_versions()},
        "git": _revision(),
        "device": _device(accelerator),
        "ranks": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "model": _commit(model) | _model(config.model),
        "data": {name: _described(name, commits) for one in _alone(config) for name in _datasets(one)},
    }
    return record


def _versions() -> dict[str, str]:
    """The versions of all packages that this one may use, as far as they are installed."""
    names = dict.fromkeys(Requirement(line).name for line in requires("vlmenv") or ())
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _revision() -> str | None:
    """The git revision of this package's source, and whether it has been changed; None outside a repository."""
    folder = Path(vlmenv.__file__).parent
    if not (folder.parent / ".git").exists():
        return None
    commands = (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
    try:
        head, changes = (
            subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=10, check=True)
            for command in commands
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + (", with changes" if changes.stdout.strip() else "")


def _device(accelerator: Accelerator) -> str:
    if accelerator.device.type == "cuda":
        return torch.cuda.get_device_name(accelerator.device)
    return f"{accelerator.device.type}: {_processor()}"


def _processor() -> str:
    """The processor's name as Linux tells it, else as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _counted(envs: VisualTaskVectorEnv) -> str:
    size = envs.task.source.size
    return "built-in samples" if size is None else f"{size} samples"


def _alone(config: TrainConfig[Any]) -> list[TrainConfig[Any]]:
    """The options of each task."""
    return [part.config for part in parts_of(config).values()] or [config]


def _datasets(config: TrainConfig[Any]) -> list[str]:
    return [*(config.data.dataset or ()), *(config.measuring.eval_dataset or ())]


def _commit(model: Path) -> dict[str, str]:
    """The commit of a model from the hub, whose cache has a folder for each."""
    return {"commit": model.name} if model.parent.name == "snapshots" else {}


def _described(name: str, commits: Mapping[str, str]) -> Any:
    """The size and checksum of a data set's files; of one on the hub, its commit."""
    path = Path(name)
    if path.is_file():
        return dict(_files([path]))[str(path)]
    if path.is_dir():
        return dict(_files(sorted(file for file in path.rglob("*") if file.is_file())))
    return {"commit": commits.get(name, "unknown")}


def _model(name: str) -> dict[str, Any]:
    """The configuration and weights of a model, and the adapters on it."""
    folder, adapter = find_model(name), find_adapter(name)
    adapters = [] if adapter is None else [adapter / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
    return dict(_files([folder / "config.json"])) | _weights(folder) | dict(_files(adapters))


def model_digests(name: str) -> dict[str, Any]:
    """The checksums of a model's files by their names: of its configuration, weights and adapters."""
    folder, adapter = find_model(name), find_adapter(name)
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    files += [] if adapter is None else [adapter / ADAPTER_CONFIG, adapter / ADAPTER_WEIGHTS]
    return {file.name: _checksum(file) for file in files}


def _weights(folder: Path) -> dict[str, Any]:
    """The sizes of a model's weights; their names in the hub's cache are checksums already."""
    return {str(file): {"bytes": file.stat().st_size} for file in sorted(folder.glob("*.safetensors"))}


def _files(files: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in files:
        yield str(file), {"bytes": file.stat().st_size, **_checksum(file)}


def _checksum(file: Path) -> dict[str, str]:
    """The SHA-256 of a file; of one above 1 GiB, that of its first and last 16 MiB."""
    with file.open("rb") as stream:
        if file.stat().st_size <= _LARGE:
            return {"sha256": file_digest(file)}
        digest = hashlib.sha256(stream.read(_END))
        stream.seek(-_END, os.SEEK_END)
        digest.update(stream.read(_END))
        return {"sha256_of_ends": digest.hexdigest()}


def print_dry_run(
    config: TrainConfig[Any],
    envs: Envs,
    held_out: Envs | None,
    run: RunFolder,
    accelerator: Accelerator,
    disk: str,
    console: Console,
) -> None:
    """Prints the resolved options, the files to be read, the folder to be written, and the room on its disk."""
    console.print(styled(resolved_yaml(config, envs, held_out, accelerator)), soft_wrap=True)
    if config.mixing.mix:
        console.print(styled(sections_yaml(config, envs, held_out)), soft_wrap=True)
    samples = ", ".join(f"{told_of(name)}{_counted(own)}" for name, own in by_task(envs).items())
    lines = [
        f"reads the model {find_model(config.model)}",
        *(f"reads the data set {name}" for one in _alone(config) for name in _datasets(one)),
        f"trains on {samples}, {config.trainer.steps} steps of {config.batches.prompts_per_step} prompts",
        f"writes to {run.path}",
        f"disk: {disk}",
        "nothing has been written: leave out --dry-run to train",
    ]
    for line in lines:
        say(line, console)
