from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmenv.core.text import visible, visible_lines


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


@given(st.text(st.characters(exclude_categories=()), max_size=40))
def test_lines_stay_lines(text: str) -> None:
    assert visible_lines(text).replace("\n", "\\n") == visible(text)
