"""Held-out referring expressions on scenes unlike those of training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

from PIL import Image

from vlmenv.envs.data import scenes
from vlmenv.envs.data.scenes import choose_reference, sample_scene

COLOURS = {
    "red": (255, 120, 130),
    "orange": (190, 90, 20),
    "yellow": (190, 170, 80),
    "green": (120, 220, 130),
    "blue": (110, 180, 255),
    "purple": (190, 130, 220),
}
"""Other shades of the same colours."""
SIDES = {"small": (11, 14), "large": (42, 48)}
"""Smaller and larger than any in training, 16 to 25 and 30 to 40."""
KINDS = ("other phrasing", "other shades", "other sizes", "more shapes")


def write_scenes(folder: Path, kind: str, count: int) -> Path:
    """Held-out scenes of one of `KINDS` as VLM-R1's JSONL, with pictures beside it; they are written once."""
    file = folder / "rec.jsonl"
    if file.exists():
        return file
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    with drawn_as(kind):
        for i in range(count):
            scene, rng = sample_scene("eval", i, (6, 8) if kind == "more shapes" else (2, 4))
            reference = choose_reference(scene, rng)
            Image.fromarray(scene.image).save(folder / f"{i}.png")
            asks = "Point out {}" if kind == "other phrasing" else "Locate {}."
            turns = [
                {"from": "human", "value": f"<image>{asks.format(reference.expression)}"},
                {"from": "gpt", "value": str(list(reference.target.box))},
            ]
            rows.append({"id": i, "image": f"{i}.png", "conversations": turns})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@contextmanager
def drawn_as(kind: str) -> Iterator[None]:
    """Makes the built-in scenes of another kind while the block runs."""
    with ExitStack() as opened:
        if kind == "other shades":
            opened.enter_context(patch.dict(scenes.COLOURS, COLOURS))
        if kind in ("other sizes", "more shapes"):
            opened.enter_context(patch.dict(scenes.SIDES, SIDES if kind == "other sizes" else {"large": (26, 30)}))
        yield
