"""Rows with two images in their places, a system turn and an example, and one without an image."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

ROWS = (
    {
        "id": "two",
        "images": ["a.png", "b.png"],
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Which is red, <image> or <image>?"},
            {"role": "assistant", "content": "the first"},
        ],
    },
    {
        "id": "shown",
        "images": ["b.png", "a.png"],
        "messages": [
            {"role": "user", "content": "<image>Colour?"},
            {"role": "assistant", "content": "blue"},
            {"role": "user", "content": "<image>Colour?"},
            {"role": "assistant", "content": "red"},
        ],
    },
)


def write_rows(folder: Path) -> Path:
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (30, 20), colour).save(folder / name)
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file
