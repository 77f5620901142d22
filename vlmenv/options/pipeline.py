"""Options of `vlmenv pipeline`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class PipelineConfig:
    """Run the stages of a pipeline, each in its own folder. The same command continues where it was interrupted."""

    pipeline: tyro.conf.Positional[str]
    """Pipeline: a YAML file, or the name of a published one, such as pebr_r1."""
    output: Path | None = None
    """Folder of the stages. None: runs/NAME."""
    launch: str | None = None
    """Command that starts a stage on several ranks, as in "accelerate launch --num_processes 8 -m vlmenv". None: stages
    run in this process."""
