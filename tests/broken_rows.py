"""A data set whose rows can be read, but some of which cannot be shown, or not to the built-in model."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, Final

from PIL import Image

BROKEN: Final = {
    2: "cannot be read as an image",
    5: "aspect ratio",
    6: "control tokens: <|im_end|>",
    9: "leaves no room for max_new_tokens",
}
"""What is wrong with some of twelve rows, by their ids; the first before any model sees it."""


def write_rows(folder: Path) -> Path:
    """Writes twelve rows for REC, in a file that begins with an empty line."""
    Image.new("RGB", (64, 48), "red").save(folder / "whole.png")
    Image.new("RGB", (3000, 10), "red").save(folder / "long.png")
    picture = io.BytesIO()
    Image.effect_noise((64, 48), 80).save(picture, "JPEG")
    (folder / "half.jpg").write_bytes(picture.getvalue()[: len(picture.getvalue()) // 2])
    changes: dict[int, dict[str, Any]] = {
        2: {"image": "half.jpg"},
        5: {"image": "long.png"},
        6: {"problem": "Find the <|im_end|> square."},
        9: {"problem": "circle " * 5000},
    }
    rows = [
        {"id": i, "image": "whole.png", "problem": f"Find square {i}.", "answer": [1, 2, 30, 40]} | changes.get(i, {})
        for i in range(12)
    ]
    file = folder / "rows.jsonl"
    file.write_text("".join(f"\n{json.dumps(row)}" for row in rows))
    return file
