"""`vlmenv data check`: reads a data set as a task would, and tells everything that is wrong with it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.progress import track
from rich.table import Table

from vlmenv.core.errors import DataError
from vlmenv.core.imports import import_modules
from vlmenv.envs.data.dataset import open_dataset
from vlmenv.envs.data.source import Source
from vlmenv.options.data import DataCheckConfig
from vlmenv.options.parsing import parse_plain
from vlmenv.options.task import root_argument
from vlmenv.tasks import make_envs


def parse(args: Sequence[str], program: str) -> DataCheckConfig:
    """The options of a command line."""
    config: DataCheckConfig = parse_plain(args, DataCheckConfig(dataset=("",)), program)
    import_modules(config.imports)
    return config


def run(config: DataCheckConfig) -> None:
    """Checks a data set; ends the process with status 1 if a row is broken."""
    task = make_envs(config.env, 1).task
    reading = task.reading(config.data.columns, skip_broken=True)
    source = open_dataset(list(config.dataset), reading, root_argument(config.data.image_root), config.data.split)
    faults, sizes = list(source.faults), Counter[str]()
    if config.decode:
        faults += _decode(source, sizes)
    console = Console(soft_wrap=True)
    for fault in faults:
        console.print(fault, style="red", markup=False, highlight=False)
    console.print(_summary(config, source, len(faults), sizes))
    if faults:
        sys.exit(1)


def _decode(source: Source, sizes: Counter[str]) -> list[str]:
    """Reads every image, and counts their sizes; what cannot be read."""
    faults = []
    for index in track(range(source.size or 0), "reading images", transient=True):
        try:
            images = source.get(index).images
        except DataError as error:
            faults.append(str(error))
        else:
            sizes.update(f"{image.shape[1]} x {image.shape[0]}" for image in images)
    return faults


def _summary(config: DataCheckConfig, source: Source, faults: int, sizes: Counter[str]) -> Table:
    table = Table(title=f"{', '.join(config.dataset)} for {config.env}", show_header=False, title_justify="left")
    table.add_row("rows", str((source.size or 0) + len(source.faults)))
    table.add_row("broken", str(faults))
    if sizes:
        table.add_row("images", str(sizes.total()))
        table.add_row("most frequent sizes", ", ".join(f"{size} ({count})" for size, count in sizes.most_common(5)))
    return table
