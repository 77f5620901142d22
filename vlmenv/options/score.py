"""Options of `vlmenv score`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from vlmenv.options.scorers import ScorerConfig
from vlmenv.options.task import DataOptions, PromptOptions


@dataclass(frozen=True)
class ScoreConfig:
    """Score existing answers with every reward term, and compare the scores with your own verdicts."""

    answers: tyro.conf.Positional[Path]
    """File of answers (.jsonl), one a line: a text, or an object with the answer and the `id` or `index` of its sample.
    Without those, lines answer the samples in their order. The answers.jsonl of `vlmenv eval` is such a file."""
    env: str = "VLM-REC-v0"
    """Environment with the reward terms."""
    imports: Annotated[tuple[str, ...], tyro.conf.arg(name="import")] = ()
    """Modules of your own to import first, which register tasks and rewards."""
    column: str | None = None
    """Name of the answer in a line. None: completion, response, answer, prediction or output."""
    bare: bool = False
    """Put each answer into the task's format first, as for answers without tags or sections."""
    verdict: str | None = None
    """Name of your own verdict in a line (true, false, or a number), to be compared with the first reward term."""
    output: Path | None = None
    """File (.jsonl) for the terms of each answer. None: a table alone."""
    data: DataOptions = field(default_factory=DataOptions)
    prompts: PromptOptions = field(default_factory=PromptOptions)
    scorers: ScorerConfig = field(default_factory=ScorerConfig)
