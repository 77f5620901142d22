"""Dialogues that teach a model what a crop is, and not when it is worth its cost; `benchmarks/zoom.py` uses them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Final

from vlmenv.envs import Sample, register_task
from vlmenv.envs.zoom import ZoomEnv

NAME: Final = "VLM-Zoom-Lessons-v0"


class Lessons(ZoomEnv):
    """`VLM-Zoom-v0` with a teacher who asks for a crop, or answers at once, by a coin that knows no detail."""

    def write_turn(self, sample: Sample, texts: Sequence[str]) -> str:
        asks = zlib.crc32(sample.id.encode()) % 2 == 0
        return super().write_turn(sample, texts) if asks else self.write_answer(sample)


register_task(NAME, "zoom_lessons:Lessons")
