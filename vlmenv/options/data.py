"""Options of `vlmenv data`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from vlmenv.core.errors import ConfigError
from vlmenv.options.task import ReadingOptions


@dataclass(frozen=True)
class DataCheckConfig:
    """Check a data set: every broken row with its place, and a summary. Ends with status 1 if a row is broken."""

    dataset: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders saved by `datasets`, or ids on the Hugging Face hub."""
    env: str = "VLM-REC-v0"
    """Environment that is to read the data set."""
    imports: Annotated[tuple[str, ...], tyro.conf.arg(name="import")] = ()
    """Modules of your own to import first, which register tasks."""
    decode: bool = False
    """Read every image too."""
    data: ReadingOptions = field(default_factory=ReadingOptions)

    def __post_init__(self) -> None:
        if not self.dataset:
            raise ConfigError("name the data set to check, as in `vlmenv data check rec.jsonl --env VLM-REC-v0`")
