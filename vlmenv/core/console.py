"""The console: where commands print. Text is shown as it is: no markup, no emoji codes, no control characters."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from vlmenv.core.text import visible, visible_lines


class PlainConsole(Console):
    """A console of rich's that reads no markup in text, and prints no character that a terminal obeys."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible_lines(text), **options)


class PlainTable(Table):
    """A table of rich's whose text is shown as it is, on whatever console.

    Args:
        headers: Names of columns, or columns.
        title: Text above, at the left.
        caption: Text below, at the left.
        options: Further ones of rich's.
    """

    def __init__(self, *headers: Column | str, title: str = "", caption: str = "", **options: Any) -> None:
        columns = (Column(styled(header)) if isinstance(header, str) else header for header in headers)
        super().__init__(*columns, title_justify="left", caption_justify="left", **options)
        self.title, self.caption = styled(title) if title else None, styled(caption) if caption else None

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*(styled(cell) if isinstance(cell, str) else cell for cell in cells), **options)


def styled(*parts: str | tuple[str, str]) -> Text:
    """A text of parts, each alone or with a style. Lines stay lines."""
    pairs = [(part, "") if isinstance(part, str) else part for part in parts]
    return Text.assemble(*((visible_lines(text), style) for text, style in pairs))


def say(message: str, console: Console, style: str = "") -> None:
    """Prints a line, which may hold text from data."""
    console.print(Text(visible(message), style), soft_wrap=True)


def warn(message: str, console: Console) -> None:
    """Prints a line that begins with "warning"."""
    console.print(Text.assemble(("warning:", "bold yellow"), f" {visible(message)}"), soft_wrap=True)


def open_console(*, quiet: bool = False, stderr: bool = False) -> Console:
    """The console of a command.

    In a notebook it shows progress as a widget. That takes ipywidgets; without it, it prints lines, and says so once.
    """
    console = PlainConsole(quiet=quiet, stderr=stderr)
    if not console.is_jupyter or importlib.util.find_spec("ipywidgets"):
        return console
    plain = PlainConsole(quiet=quiet, stderr=stderr, force_jupyter=False, force_terminal=False)
    if not quiet:
        _advise_widgets()
    return plain


@functools.cache
def _advise_widgets() -> None:
    """Prints what a progress bar takes, once in a process."""
    plain = PlainConsole(force_jupyter=False, force_terminal=False)
    say("install ipywidgets to see a progress bar here; until then, lines tell the progress", plain)
