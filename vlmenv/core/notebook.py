"""HTML for notebooks: small tables and pictures, in which text from data and models stays text."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

from PIL import Image as PILImage

from vlmenv.core.spaces import Image
from vlmenv.core.text import visible, visible_lines

LONGEST_SIDE = 320
"""Pixels of a picture."""
_MOST_CHARACTERS = 2000


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table with a title above it. Without `head` it has no line of column names."""
    names = "".join(f"<th>{_escaped(name)}</th>" for name in head)
    lines = ["".join(f"<td>{_escaped(cell)}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in ([names] if head else []) + lines)
    return f"<div><b>{_escaped(title)}</b><table>{body}</table></div>"


def text_block(text: str) -> str:
    """Lines of text as they are, of which the end is left out if they are very long."""
    left_out = len(text) - _MOST_CHARACTERS
    shown = text if left_out <= 0 else f"{text[:_MOST_CHARACTERS]} … ({left_out} more characters)"
    return f"<pre style='white-space: pre-wrap'>{html.escape(visible_lines(shown))}</pre>"


def picture(image: Image, name: str) -> str:
    """A picture, uint8 [H, W, 3], at most `LONGEST_SIDE` pixels wide or high; `name` says what it shows."""
    small = PILImage.fromarray(image)
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return png(buffer.getvalue(), name)


def png(content: bytes, name: str) -> str:
    """The content of a PNG file as a picture, which a narrow window scales down."""
    data = base64.b64encode(content).decode()
    return f"<img style='max-width: 100%' src='data:image/png;base64,{data}' alt='{_escaped(name)}'>"


def _escaped(text: object) -> str:
    return html.escape(visible(text))
