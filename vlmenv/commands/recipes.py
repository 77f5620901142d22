"""`vlmenv recipes`: lists the published recipes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmenv.core.console import PlainTable, open_console
from vlmenv.options.files import packaged_files
from vlmenv.options.parsing import parse_plain


@dataclass(frozen=True)
class RecipesConfig:
    """List the published recipes, which `--recipe NAME` takes options from."""


def parse(args: Sequence[str], program: str) -> RecipesConfig:
    """The options of a command line."""
    config: RecipesConfig = parse_plain(args, RecipesConfig(), program)
    return config


def run(config: RecipesConfig) -> None:
    """Prints a table of recipes, each with the first comment of its file."""
    table = PlainTable("recipe", "what it trains", "file")
    for name, file in packaged_files("recipe").items():
        summary = file.read_text(encoding="utf-8").partition("\n#\n")[0]
        table.add_row(name, " ".join(line.removeprefix("#").strip() for line in summary.splitlines()), str(file))
    open_console().print(table)
