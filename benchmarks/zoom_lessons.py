"""What teaches a model to read crops and to ask for them, and not when one is worth its cost, for `zoom.py`."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from vlmenv.core.rollout import Observation
from vlmenv.envs import Sample, Source, Split, register_task
from vlmenv.envs.data.details import REACH, Dots
from vlmenv.envs.zoom import ZoomEnv

DIALOGUES: Final = "VLM-Zoom-Dialogues-v0"
WIDE: Final = "VLM-Zoom-Wide-v0"
CLOSE_UPS: Final = "VLM-Zoom-CloseUps-v0"


class CloseUps(ZoomEnv):
    """The questions of `VLM-Zoom-v0` about dots, with crops alone."""

    def builtin_source(self, split: Split) -> Source:
        return Dots(split, plain=0.0)

    def observe(self, sample: Sample) -> Observation:
        request = super().write_request(sample, ())
        assert request is not None
        crop = self.bring(sample, self.answer_format.write(request))
        assert crop is not None
        return super().observe(replace(sample, images=crop.images))

    def write_request(self, sample: Sample, texts: Sequence[str]) -> str | None:
        return None


class Dialogues(ZoomEnv):
    """`VLM-Zoom-v0` with a teacher who asks for a crop, or answers at once, by a coin that knows no detail."""

    def write_turn(self, sample: Sample, texts: Sequence[str]) -> str:
        asks = zlib.crc32(sample.id.encode()) % 2 == 0
        return super().write_turn(sample, texts) if asks else self.write_answer(sample)


class Wide(Dialogues):
    """Dialogues whose crops are as large as a small shape, whose edges the built-in model knows how to tell."""

    def builtin_source(self, split: Split) -> Source:
        return Dots(split, reach=2 * REACH)


register_task(WIDE, "zoom_lessons:Wide")
register_task(CLOSE_UPS, "zoom_lessons:CloseUps")
register_task(DIALOGUES, "zoom_lessons:Dialogues")
