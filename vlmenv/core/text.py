"""Text from data sets and models, made safe to print on a terminal."""

from __future__ import annotations

import unicodedata

from rich.markup import escape

_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
"""Unicode categories that a terminal obeys, or does not show: control characters, direction marks, surrogates."""


def visible(text: object) -> str:
    """A text in one line of visible characters: what a terminal would obey is written as an escape, such as `\\x1b`.

    For places that read no markup; elsewhere `printable`.
    """
    return "".join(
        one if unicodedata.category(one) not in _HIDDEN else one.encode("unicode_escape", "surrogatepass").decode()
        for one in str(text)
    )


def printable(text: object) -> str:
    """The same for a place that reads rich's markup, in which `[/b]` and `[red]` then stand as they are."""
    return escape(visible(text))


def printable_lines(text: object) -> str:
    """`printable`, but lines stay lines."""
    return "\n".join(map(printable, str(text).split("\n")))
