"""Text from data sets and models, made safe to print on a terminal."""

from __future__ import annotations

import unicodedata

_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
"""Unicode categories that a terminal obeys, or does not show: control characters, direction marks, surrogates."""


def visible(text: object) -> str:
    """A text in one line of visible characters: what a terminal would obey is written as an escape, such as `\\x1b`."""
    whole = str(text)
    if whole.isprintable():  # most texts are, and a look at each character takes long
        return whole
    return "".join(
        one if unicodedata.category(one) not in _HIDDEN else one.encode("unicode_escape", "surrogatepass").decode()
        for one in whole
    )


def visible_lines(text: object) -> str:
    """`visible`, but lines stay lines."""
    return "\n".join(map(visible, str(text).split("\n")))
