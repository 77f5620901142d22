from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from vlmenv.core.text import printable, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("[/b] [red]x", "[/b] [red]x"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("two\nlines\r\t", "two\\nlines\\r\\t"),
        ("half \ud800 and right to left \u202e", "half \\ud800 and right to left \\u202e"),
        ("grüße 漢字 \\alpha", "grüße 漢字 \\alpha"),
    ],
)
def test_what_a_terminal_would_obey_is_written_out(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert printed(f"[bold]{printable(text)}[/] .") == f"{shown} .\n"


@given(st.text(st.characters(exclude_categories=()), max_size=40))
def test_no_text_is_markup(text: str) -> None:
    """Rich doubles a backslash at the end, lest it hide what follows; all else stands as it is."""
    shown = printed(f"{printable(text)} [bold].[/]")
    assert shown.replace("\\", "") == f"{visible(text)} .\n".replace("\\", "")


def printed(markup: str) -> str:
    out = io.StringIO()
    Console(file=out, emoji=False, soft_wrap=True, width=1000).print(markup, highlight=False)
    return out.getvalue()
