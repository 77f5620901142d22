"""`vlmenv envs`: lists the registered environments."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import gymnasium
import tyro
from gymnasium.envs.registration import load_env_creator

from vlmenv.core.console import PlainTable, open_console
from vlmenv.core.loading import import_modules
from vlmenv.envs.making import visual_tasks
from vlmenv.options.parsing import parse_plain


@dataclass(frozen=True)
class EnvsConfig:
    """List the registered environments."""

    imports: Annotated[tuple[str, ...], tyro.conf.arg(name="import")] = ()
    """Modules of your own to import first, which register tasks."""


def parse(args: Sequence[str], program: str) -> EnvsConfig:
    """The options of a command line."""
    config: EnvsConfig = parse_plain(args, EnvsConfig(), program)
    return config


def run(config: EnvsConfig) -> None:
    """Prints a table of environments, each with the first line of its module's docstring."""
    import_modules(config.imports)
    table = PlainTable("environment", "task")
    for name in visual_tasks():
        entry_point = gymnasium.registry[name].entry_point
        assert isinstance(entry_point, str)
        creator = load_env_creator(entry_point)
        table.add_row(name, (sys.modules[creator.__module__].__doc__ or "").partition("\n")[0])
    open_console().print(table)
