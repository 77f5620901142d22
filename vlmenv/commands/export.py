"""`vlmenv export`: writes a trained model as others load it, and uploads it if asked to."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Final

import httpx2
import torch
import transformers
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from rich.console import Console

from vlmenv.agents.checkpoints import ADAPTER_CONFIG, find_adapter, find_model
from vlmenv.agents.families.base import read_json
from vlmenv.agents.saving import BASE_GENERATION, GENERATION
from vlmenv.agents.vlm import VLMAgent
from vlmenv.core.console import open_console, say, warn
from vlmenv.core.errors import ConfigError, ModelError
from vlmenv.core.loading import import_modules
from vlmenv.core.names import SHIPPED, hub_name
from vlmenv.options.export import ExportConfig
from vlmenv.options.parsing import parse_plain
from vlmenv.runs.card import MERGED, TOWER, UNSERVED, Origin, write_card
from vlmenv.runs.models import checkpoint_of
from vlmenv.runs.run_folder import RunFolder

_DTYPES: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_REPLACED: Final = ("model*.safetensors*", "adapter_*")
"""Weights and adapters of an earlier upload. They are deleted, unless the new one has files of these names: who loads
the model would take them for its own."""


def parse(args: Sequence[str], program: str) -> ExportConfig:
    """The options of a command line."""
    config: ExportConfig = parse_plain(args, ExportConfig(model=""), program)
    if not config.model:
        raise ConfigError("name the run or model, as in `vlmenv export runs/my-run my-model`")
    import_modules(config.imports)
    return config


def run(config: ExportConfig) -> Path:
    """Writes the folder, uploads it if asked to, and returns it."""
    console = open_console()
    source, run, step = _source(config)
    target = config.target or Path(f"{Path(config.model).absolute().name}-export")
    if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
        raise ConfigError(f"{target} exists already: name a new folder to write")
    transformers.utils.logging.disable_progress_bar()
    merged = config.merged or find_adapter(str(source)) is None
    if config.adapter and merged:
        raise ConfigError(f"{source} has no adapters to write alone: all weights were trained. Leave out --adapter")
    agent = VLMAgent.from_pretrained(source)
    agent.publish(target, dtype=None if config.dtype is None else _DTYPES[config.dtype], merged=merged)
    _keep_settings(source, target)
    tower = not merged and agent.sees_by_adapters
    served = not (tower and agent.family.model_type in UNSERVED)
    write_card(target, Origin.of(find_model(str(source)), run, step), adapter=not merged, tower=tower, served=served)
    say(f"{target} holds {source}{'' if merged else ', adapters alone'}", console)
    if not served:
        say(MERGED, console)
    elif tower:
        say(f"the vision tower has adapters too, which vLLM leaves out unless it is given {TOWER}", console)
    if config.hub is not None:
        if not merged:
            _warn_of_base(target, console)
        say(f"uploaded to {_upload(target, config.hub)}", console)
    return target


def _source(config: ExportConfig) -> tuple[Path, RunFolder | None, int | None]:
    """The checkpoint to export, its run and its step.

    Raises:
        ModelError: There is none.
    """
    run = RunFolder(Path(config.model))
    found = checkpoint_of(config.model)
    if found is None:
        if config.step is not None:
            raise ConfigError(f"step goes with a run's folder, and {config.model} is none")
        folder = find_adapter(config.model) or find_model(config.model)
        owner = next((RunFolder(one) for one in folder.parents[:2] if (one / "resolved.yaml").is_file()), None)
        return folder, owner, None if owner is None else _step_of(owner, folder)
    folder = found[0] if config.step is None else _asked(run, config.step)
    return folder, run, _step_of(run, folder)


def _asked(run: RunFolder, step: str) -> Path:
    folder = run.path / "best" if step == "best" else run.checkpoint(int(step))
    if not (folder / "config.json").is_file():
        there = ", ".join(str(run.step_of(one)) for one in run.checkpoints())
        best = ", and best" if (run.path / "best").is_dir() else ""
        raise ModelError(f"{run.path} has no checkpoint {step}: there are {there or 'none'}{best}")
    return folder


def _step_of(run: RunFolder, folder: Path) -> int | None:
    if folder.name == "best":
        return run.best().get("step")
    return run.step_of(folder) if folder.name.startswith("step-") else None


def _keep_settings(source: Path, target: Path) -> None:
    """Copies generation settings as the source has them: they are those of its training."""
    for name in (GENERATION, BASE_GENERATION):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
        else:
            (target / name).unlink(missing_ok=True)


def _warn_of_base(adapters: Path, console: Console) -> None:
    """Tells that others cannot load adapters whose base model is a folder of this machine."""
    base = read_json(adapters / ADAPTER_CONFIG)["base_model_name_or_path"]
    if base not in SHIPPED and hub_name(base) is None:
        warn(
            f"the adapters' base model is {base}, which others do not have: upload that model too and write its name "
            f"into {ADAPTER_CONFIG}, or export with --merged",
            console,
        )


def _upload(folder: Path, name: str) -> str:
    """Uploads a folder to the Hugging Face hub, and returns its address.

    Raises:
        ModelError: It is not uploaded; the folder stays.
    """
    api = HfApi()
    try:
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, delete_patterns=list(_REPLACED))
    except (OSError, ValueError, RuntimeError, httpx2.HTTPError) as error:
        again = ["hf", "upload", name, str(folder), ".", "--private"]
        reason, advice = _explained(error, name)
        raise ModelError(
            f"{folder} is written, but the upload to {name} failed: {reason}. {advice}, then upload it by: "
            + shlex.join([*again, *(part for one in _REPLACED for part in ("--delete", one))])
        ) from error
    return str(address)


def _explained(error: BaseException, name: str) -> tuple[str, str]:
    """Why an upload failed, and what to do about it."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:  # which says no more than where it was
        error = error.__cause__
    reason = f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}"
    if isinstance(error, OfflineModeIsEnabled):
        return reason, "Unset HF_HUB_OFFLINE"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == HTTPStatus.UNAUTHORIZED:
        return reason, "Log in by `hf auth login`, or set HF_TOKEN to a token that may write"
    if status == HTTPStatus.FORBIDDEN:
        return reason, f"Name a repository of your own, or take a token that may write to {name}"
    return reason, "Check the connection"
