"""`vlmenv data convert`: writes data sets of other layouts as rows that the tasks read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from vlmenv.core.errors import ConfigError
from vlmenv.core.text import printable
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
        skip_broken=config.skip_broken,
    )
    console = Console(emoji=False, soft_wrap=True)
    for fault in summary.faults[:_SHOWN]:
        console.print(printable(fault), style="red", highlight=False, emoji=False)
    if len(summary.faults) > _SHOWN:
        console.print(f"… and {len(summary.faults) - _SHOWN} more", style="red", highlight=False)
    for note, count in summary.notes.items():
        console.print(printable(f"{note} ({count})" if count else note), highlight=False, emoji=False)
    told = f"{summary.layout}: {summary.rows} rows with {summary.boxes} boxes are in {summary.target}"
    console.print(printable(told), highlight=False)
    env = f" --env {summary.env}" if summary.env else ""
    console.print(printable(f"check them by: vlmenv data check {summary.target}{env} --decode"), highlight=False)
    return summary
