"""`vlmenv doctor`: checks that model, processor, engine and data fit together."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, cast

from accelerate import Accelerator
from rich.console import Console

from vlmenv.algos import find_algorithm
from vlmenv.building import check_device
from vlmenv.core.console import open_console, say, styled
from vlmenv.doctor import Finding, examine, findings_table
from vlmenv.doctor.forecast import forecast_on_card
from vlmenv.options.command_line import Asked, parse_with_files
from vlmenv.options.doctor import DoctorConfig
from vlmenv.options.mixing import parts_of
from vlmenv.runs.models import with_checkpoint


def default(algo: str) -> DoctorConfig[Any]:
    """The defaults of all options for an algorithm."""
    return DoctorConfig(algo=algo, algorithm=find_algorithm(algo).preset)


def parse(args: Sequence[str], program: str) -> Asked:
    """The options of a command line."""
    return parse_with_files(args, default, program)


def run(asked: Asked) -> list[Finding]:
    """Prints a table of findings, or a card's memory; ends the process with status 1 if a check failed."""
    config: DoctorConfig[Any] = asked.config
    check_device(config.device)
    console = open_console()
    for note in asked.notes:
        say(note, console)
    config = with_checkpoint(config, console)
    if config.card is not None:
        fits = [forecast_on_card(one, console) for one in _alone(config)]
        if not all(fits):
            sys.exit(1)
        return []
    findings = [one for own in _alone(config) for one in _examined(own, console)]
    if failed := [one.check for one in findings if one.passed is False]:
        console.print(styled((f"{len(failed)} of {len(findings)} checks failed:", "red"), f" {', '.join(failed)}"))
        sys.exit(1)
    say("everything adds up", console)
    return findings


def _alone(config: DoctorConfig[Any]) -> list[DoctorConfig[Any]]:
    """The options of each task of a mix, or those of the single task."""
    return [cast(DoctorConfig[Any], part.config) for part in parts_of(config).values()] or [config]


def _examined(config: DoctorConfig[Any], console: Console) -> list[Finding]:
    """Examines one task, and prints its findings."""
    findings = examine(config, Accelerator(cpu=config.device == "cpu").device, console)
    console.print(findings_table(config, findings))
    return findings
