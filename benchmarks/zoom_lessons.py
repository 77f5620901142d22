"""What teaches a model to read crops and to ask for them, and not when one is worth its cost, for `zoom.py`."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from vlmenv.agents.families import resize_rule
from vlmenv.agents.pixels import prepared_folder
from vlmenv.core.names import BUILTIN
from vlmenv.core.pixels import PixelLimits
from vlmenv.core.rollout import Observation
from vlmenv.envs import Sample, Source, Split, register_task
from vlmenv.envs.data.details import Dots
from vlmenv.envs.vqa import VQAEnv
from vlmenv.envs.zoom import ZoomEnv

CLOSE_UPS: Final = "VLM-Zoom-CloseUps-v0"
FIRST_TURNS: Final = "VLM-Zoom-FirstTurns-v0"
DIALOGUES: Final = "VLM-Zoom-Dialogues-v0"
PIXELS: Final = 96 * 96
"""At which images are shown."""
SHOWN: Final[Mapping[str, Any]] = {
    "prompt_template": VQAEnv.prompt_template,
    "coordinates": "resized",
    "resize": resize_rule(prepared_folder(BUILTIN, PixelLimits(max_pixels=PIXELS))),
}
"""How a run shows samples."""


class CloseUps(ZoomEnv):
    """The questions of `VLM-Zoom-v0` about dots, with crops alone."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**SHOWN, **kwargs})

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
    """`VLM-Zoom-v0` with a teacher who asks for a crop in a third of the cases, drawn without regard to the detail."""

    def write_request(self, sample: Sample, texts: Sequence[str]) -> str | None:
        asks = zlib.crc32(sample.id.encode()) % 3 == 0
        return super().write_request(sample, texts) if asks else None


class FirstTurns(Dialogues):
    """What that teacher says first."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**SHOWN, **kwargs})

    def write_answer(self, sample: Sample) -> str:
        request = self.write_request(sample, ())
        return super().write_answer(sample) if request is None else self.answer_format.write(request, sample.rationale)


register_task(CLOSE_UPS, "zoom_lessons:CloseUps")
register_task(FIRST_TURNS, "zoom_lessons:FirstTurns")
register_task(DIALOGUES, "zoom_lessons:Dialogues")
