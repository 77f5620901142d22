"""`vlmenv data check`: reads a data set as a task would, and tells everything that is wrong with it."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vlmenv.building import make_envs
from vlmenv.core.errors import ConfigError, DataError
from vlmenv.envs.data.dataset import open_dataset
from vlmenv.envs.data.source import Source


@dataclass(frozen=True)
class DataConfig:
    """Check a data set: every broken row with its place, and a summary. Ends with status 1 if a row is broken."""

    action: tyro.conf.Positional[Literal["check"]]
    """What to do."""
    dataset: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders saved by `datasets`, or ids on the Hugging Face hub."""
    env: str = "VLM-REC-v0"
    """The environment that is to read it."""
    image_root: tuple[Path, ...] | None = None
    """Folder that image paths are relative to, or one for each file; the file's own where left out."""
    split: str | None = None
    """Of a Hugging Face data set."""
    columns: dict[str, str] | None = None
    """Columns that hold the parts of a row, as in `--columns question query answer label`."""
    decode: bool = False
    """Read every image too."""

    def __post_init__(self) -> None:
        if not self.dataset:
            raise ConfigError("name the data set to check, as in `vlmenv data check rec.jsonl --env VLM-REC-v0`")


def check_data(config: DataConfig) -> None:
    """`vlmenv data check`."""
    task = make_envs(config.env, 1).task
    roots = config.image_root if config.image_root is None or len(config.image_root) > 1 else config.image_root[0]
    reading = task.reading(config.columns, skip_broken=True)
    source = open_dataset(list(config.dataset), reading, roots, config.split)
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


def _summary(config: DataConfig, source: Source, faults: int, sizes: Counter[str]) -> Table:
    table = Table(title=f"{', '.join(config.dataset)} for {config.env}", show_header=False, title_justify="left")
    table.add_row("rows", str((source.size or 0) + len(source.faults)))
    table.add_row("broken", str(faults))
    if sizes:
        table.add_row("images", str(sizes.total()))
        table.add_row("most frequent sizes", ", ".join(f"{size} ({count})" for size, count in sizes.most_common(5)))
    return table
