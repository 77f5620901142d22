"""The command line: `vlmenv train`, `eval`, `sample`, `pipeline`, `serve`, `doctor`, `data check` and `envs`."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import gymnasium
import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import vlmenv  # noqa: F401 (registers the environments)
from vlmenv.building import visual_tasks
from vlmenv.commands.data import DataConfig, check_data
from vlmenv.commands.pipeline import PipelineConfig, run_pipeline
from vlmenv.commands.sample import SampleConfig, run_sampling
from vlmenv.commands.serve import ServeConfig, run_server
from vlmenv.commands.suite import run_suite
from vlmenv.commands.train import RIVALS, TrainConfig, default_config, run_training
from vlmenv.core.errors import ConfigError, VLMEnvError
from vlmenv.doctor import DoctorConfig, run_doctor
from vlmenv.evaluation import EvalConfig, run_evaluation
from vlmenv.options.files import flatten, gathered, option_value, with_config_file

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
    except RuntimeError as error:
        if not re.search("Connection (closed|reset) by peer", str(error)):
            raise
        _fail(error, debug, "another process has ended; its own message says why")
    except (OSError, MemoryError) as error:
        _fail(error, debug, f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        sys.exit(130)


def _fail(error: BaseException, debug: bool, message: str) -> None:
    if debug:
        raise error
    where = f" in process {os.environ.get('RANK')}" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    Console(stderr=True).print(f"[bold red]error{where}:[/] {escape(message)}", soft_wrap=True)
    sys.exit(1)


def _run(args: list[str]) -> None:
    config = _config(args)
    RUN[type(config)](config)


def _config(args: list[str]) -> Any:
    """What a command line asks for, with the files of options that it names."""
    command, rest = (args[0], args[1:]) if args else ("", [])
    rest = _of_resumed_run(rest) if command == "train" else rest
    defaults: dict[str, Any] = {"eval": EvalConfig(), "sample": SampleConfig(), "doctor": DoctorConfig()}
    if command == "train":
        defaults["train"] = default_config(option_value(rest, "algo") or "grpo")
    if command in defaults:
        known = list(flatten(defaults[command]))
        passed_over = _of_training(rest) - set(known) if command == "doctor" else set()
        rest = with_config_file(gathered(rest, "server"), known, RIVALS if command == "train" else (), passed_over)
    return _parse([command, *rest] if args else ["--help"], defaults.get("train", TrainConfig()))


def _of_training(args: list[str]) -> set[str]:
    """The options of the training that a file holds."""
    return set(flatten(default_config(option_value(args, "algo") or "grpo")))


def _of_resumed_run(args: list[str]) -> list[str]:
    """The arguments of `vlmenv train`; with `--resume` those that the run was started with.

    Raises:
        ConfigError: There is no such run, or other options are given beside it.
    """
    folder = option_value([arg for arg in args if not arg.startswith("--config")], "resume")
    if folder is None:
        return args
    if len(args) > 2 or (len(args) == 2 and args[0] != "--resume"):
        raise ConfigError("a run is resumed with its own options: give --resume RUN_FOLDER alone")
    if not (Path(folder) / "config.yaml").is_file():
        raise ConfigError(
            f"{folder} is no folder of a run: it holds no config.yaml. A run that was killed before that was written "
            "has nothing to go on from: give its command again"
        )
    return ["--config", str(Path(folder) / "config.yaml"), "--resume", folder]


def _parse(args: list[str], train: TrainConfig[Any]) -> Any:
    commands: Any = (
        Annotated[TrainConfig[type(train.algorithm)], tyro.conf.subcommand("train", default=train)]  # type: ignore[misc]
        | Annotated[EvalConfig, tyro.conf.subcommand("eval")]
        | Annotated[SampleConfig, tyro.conf.subcommand("sample")]
        | Annotated[PipelineConfig, tyro.conf.subcommand("pipeline")]
        | Annotated[ServeConfig, tyro.conf.subcommand("serve")]
        | Annotated[DoctorConfig, tyro.conf.subcommand("doctor")]
        | Annotated[DataConfig, tyro.conf.subcommand("data")]
        | Annotated[EnvsConfig, tyro.conf.subcommand("envs")]
    )
    description = "Train vision-language models with reinforcement learning. With --debug, errors show a traceback."
    return tyro.cli(
        commands, args=args, prog=PROGRAM, description=description, config=(tyro.conf.OmitSubcommandPrefixes,)
    )


def measure(config: EvalConfig) -> None:
    """`vlmenv eval`, on one data set or on a paper's."""
    if config.suite is None:
        run_evaluation(config)
    else:
        run_suite(config)


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
    EvalConfig: measure,
    SampleConfig: run_sampling,
    PipelineConfig: lambda config: run_pipeline(config, _config, lambda stage: RUN[type(stage)](stage)),
    ServeConfig: run_server,
    DoctorConfig: run_doctor,
    DataConfig: check_data,
    EnvsConfig: list_environments,
}
