"""`vlmenv data export`: writes a task's samples and its rewards as files for another trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlmenv.adapters.export import Exported, export
from vlmenv.adapters.task import PortableTask
from vlmenv.core.console import open_console, say
from vlmenv.core.errors import ConfigError
from vlmenv.options.data import DataExportConfig
from vlmenv.options.parsing import parse_plain
from vlmenv.options.task import given_arguments


def parse(args: Sequence[str], program: str) -> DataExportConfig:
    """The options of a command line."""
    config: DataExportConfig = parse_plain(args, DataExportConfig(target=Path()), program)
    if config.target == Path():
        raise ConfigError("name the file to write, as in `vlmenv data export train.parquet --to verl --rows 2048`")
    return config


def run(config: DataExportConfig) -> Exported:
    """Writes the files, and prints the options of the trainer that take them."""
    of_model = {} if config.model is None else _of_model(config)
    task = PortableTask(config.env, **given_arguments(config.data, config.prompts) | of_model)
    done = export(task, config.to, config.target, config.rows, config.seed)
    console = open_console()
    say(f"{done.rows} rows are in {config.target}, and the function that scores them in {done.reward}", console)
    say(f"options of {config.to}: {done.options}", console)
    return done


def _of_model(config: DataExportConfig) -> dict[str, object]:
    """The arguments that follow from a model: its convention of coordinates, and the sizes at which it sees images."""
    from vlmenv.building import task_arguments  # imports torch
    from vlmenv.options.task import TaskConfig
    from vlmenv.runs.models import checkpoint_name

    assert config.model is not None
    model = checkpoint_name(config.model)
    own = task_arguments(TaskConfig(env=config.env, model=model, prompts=config.prompts, pixels=config.pixels))
    return {name: own[name] for name in ("coordinates", "resize", "image_bound") if own[name] is not None}
