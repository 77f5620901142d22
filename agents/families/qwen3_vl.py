"""Qwen3-VL: image inputs as for Qwen2-VL; features of several blocks enter the language model; videos with times."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import nn

from vlmenv.agents.families.qwen2_vl import Qwen2VL
from vlmenv.core.coordinates import CoordinateSpace
from vlmenv.core.video import Video


class TimedVideos(Qwen2VL):
    """Videos as Qwen3-VL and Qwen3.5 take them: each step in time is an image after its seconds as text."""

    vllm_video_fault: ClassVar[str | None] = None

    def expanded_video(self, video: Video) -> str:
        """A step in time has two frames, and the mean of their seconds."""
        together = self.processor.image_processor.temporal_patch_size
        seconds = video.seconds.tolist()
        seconds += [seconds[-1]] * (-len(seconds) % together)
        texts = []
        for step, features in enumerate(self._video_features(video)):
            first, last = seconds[step * together], seconds[(step + 1) * together - 1]
            texts.append(f"<{(first + last) / 2:.1f} seconds>{self._enclosed(self.video_token * features)}")
        return "".join(texts)

    @property
    def video_mark(self) -> str | None:
        """With the tokens around it, in whose place stand those around each step."""
        return self._enclosed(self.video_token)

    def _enclosed(self, text: str) -> str:
        config = self.model.config
        ends = [config.vision_start_token_id, config.vision_end_token_id]
        start, end = list(self.processor.tokenizer.convert_ids_to_tokens(ends))
        return f"{start}{text}{end}"

    def frame_size(self, video: Video) -> tuple[int, int]:
        """The limits of pixels are those of all frames together."""
        frames, (height, width) = max(2, len(video.frames)), video.frames.shape[1:3]
        least, most, factor = self._frame_limits(width, height)
        if height < factor or width < factor:
            scale = max(factor / height, factor / width)
            height, width = int(height * scale), int(width * scale)
        rows, columns = round(height / factor), round(width / factor)
        pixels = round(frames / 2) * 2 * rows * columns * factor**2
        if pixels > most:
            scale = math.sqrt(frames * height * width / most) * factor
            rows, columns = max(1, math.floor(height / scale)), max(1, math.floor(width / scale))
        elif pixels < least:
            scale = math.sqrt(least / (frames * height * width)) / factor
            rows, columns = math.ceil(height * scale), math.ceil(width * scale)
        return columns * factor, rows * factor

    def grids_in_text(self, grids: torch.Tensor) -> torch.Tensor:
        """A grid for each step in time."""
        steps = grids.repeat_interleave(grids[:, 0], dim=0)
        steps[:, 0] = 1
        return steps


class Qwen3VL(TimedVideos):
    """Qwen3-VL (arXiv 2511.21631)."""

    model_type: ClassVar[str] = "qwen3_vl"
    coordinates: ClassVar[CoordinateSpace] = CoordinateSpace.NORM1000

    def projectors(self) -> list[nn.Module]:
        """Features of several blocks are merged, each by its own projector (DeepStack)."""
        return [*super().projectors(), self.vision_tower().get_submodule("deepstack_merger_list")]

    def join_features(self, parts: list[Any]) -> Any:
        joined = super().join_features(parts)
        blocks = zip(*(part.deepstack_features for part in parts), strict=True)
        joined.deepstack_features = [tuple(one for images in block for one in images) for block in blocks]
        return joined


class Qwen3VLMoe(Qwen3VL):
    """Qwen3-VL with mixtures of experts."""

    model_type: ClassVar[str] = "qwen3_vl_moe"
