"""The command line: `vlmenv train`, `vlmenv eval`, `vlmenv data check`, `vlmenv envs`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import gymnasium
import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import vlmenv  # noqa: F401 (registers the environments)
from vlmenv.core.config import flatten, with_config_file
from vlmenv.core.errors import VLMEnvError
from vlmenv.data import DataConfig, check_data
from vlmenv.evaluation import EvalConfig, run_evaluation
from vlmenv.tasks import visual_tasks
from vlmenv.training import TrainConfig, run_training

PROGRAM = "vlmenv"


@dataclass(frozen=True)
class EnvsConfig:
    """List the registered environments."""


def main(args: Sequence[str] | None = None) -> None:
    """Runs a command; ends the process with status 1 and one message where the input is wrong."""
    args = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in args
    try:
        _run([arg for arg in args if arg != "--debug"])
    except (VLMEnvError, gymnasium.error.Error) as error:
        _fail(error, debug, str(error))
    except torch.OutOfMemoryError as error:
        less = "--micro-batch-size, --prompts-per-step, --batch-size or --max-new-tokens"
        _fail(error, debug, f"the GPU's memory is full: lower {less}. {error}")
    except (OSError, MemoryError) as error:
        _fail(error, debug, f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        sys.exit(130)


def _fail(error: BaseException, debug: bool, message: str) -> None:
    if debug:
        raise error
    Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    sys.exit(1)


def _run(args: list[str]) -> None:
    command, rest = (args[0], args[1:]) if args else ("", [])
    defaults: dict[str, Any] = {"train": TrainConfig(), "eval": EvalConfig()}
    if command in defaults:
        rest = with_config_file(rest, list(flatten(defaults[command])))
    config = _parse([command, *rest] if args else ["--help"])
    RUN[type(config)](config)


def _parse(args: list[str]) -> TrainConfig | EvalConfig | DataConfig | EnvsConfig:
    commands: Any = (
        Annotated[TrainConfig, tyro.conf.subcommand("train")]
        | Annotated[EvalConfig, tyro.conf.subcommand("eval")]
        | Annotated[DataConfig, tyro.conf.subcommand("data")]
        | Annotated[EnvsConfig, tyro.conf.subcommand("envs")]
    )
    description = "Train vision-language models with reinforcement learning. With --debug, errors show a traceback."
    parsed: TrainConfig | EvalConfig | DataConfig | EnvsConfig = tyro.cli(
        commands, args=args, prog=PROGRAM, description=description, config=(tyro.conf.OmitSubcommandPrefixes,)
    )
    return parsed


def list_environments(config: EnvsConfig) -> None:
    table = Table("environment", "task")
    for name in visual_tasks():
        entry_point = gymnasium.registry[name].entry_point
        assert isinstance(entry_point, str)
        creator = gymnasium.envs.registration.load_env_creator(entry_point)
        table.add_row(name, (sys.modules[creator.__module__].__doc__ or "").partition("\n")[0])
    Console().print(table)


RUN: dict[type, Callable[[Any], object]] = {
    TrainConfig: run_training,
    EvalConfig: run_evaluation,
    DataConfig: check_data,
    EnvsConfig: list_environments,
}
