"""`vlmenv data convert`: writes data sets of other layouts as rows that the tasks read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlmenv.core.console import open_console, say
from vlmenv.core.errors import ConfigError
from vlmenv.envs.data.convert import Summary, convert
from vlmenv.options.data import DataConvertConfig
from vlmenv.options.parsing import parse_plain

_SHOWN = 20


def parse(args: Sequence[str], program: str) -> DataConvertConfig:
    """The options of a command line."""
    config: DataConvertConfig = parse_plain(args, DataConvertConfig(source=Path(), target=Path()), program)
    if Path() in (config.source, config.target):
        raise ConfigError("name what to convert and the file to write, as in `vlmenv data convert VOC rows.jsonl`")
    return config


def run(config: DataConvertConfig) -> Summary:
    """Converts a data set, and prints the numbers of rows that were written and left out."""
    summary = convert(
        config.source,
        config.target,
        config.layout,
        images=config.images,
        split=config.split,
        expressions=config.expressions,
        skip_broken=config.skip_broken,
    )
    console = open_console()
    for fault in summary.faults[:_SHOWN]:
        say(fault, console, "red")
    if len(summary.faults) > _SHOWN:
        say(f"… and {len(summary.faults) - _SHOWN} more", console, "red")
    for note, count in summary.notes.items():
        say(f"{note} ({count})" if count else note, console)
    told = f"{summary.layout}: {summary.rows} rows with {summary.boxes} boxes are in {summary.target}"
    say(told, console)
    env = f" --env {summary.env}" if summary.env else ""
    say(f"check them by: vlmenv data check {summary.target}{env} --decode", console)
    return summary
