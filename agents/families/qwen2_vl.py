"""Qwen2-VL: images as grids of merged patches, M-RoPE positions, coordinates in thousandths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PILImage
from torch import nn

from vlmenv.agents.families.base import Family
from vlmenv.compat.transformers import places_of_patches
from vlmenv.core.coordinates import CoordinateSpace, ResizeRule
from vlmenv.core.errors import ConfigError
from vlmenv.core.pixels import PixelLimits
from vlmenv.core.spaces import Image
from vlmenv.core.video import Video

_GRIDS: Final = "image_grid_thw"
_LIMITS: Final = ("min_pixels", "max_pixels")
_EDGES: Final = ("shortest_edge", "longest_edge")
"""Names of the same limits within `size`."""


class Qwen2VL(Family):
    """Qwen2-VL (arXiv 2409.12191).

    A video is a grid of patches in time, height and width, of two frames each, in one sequence with those of images.
    """

    model_type: ClassVar[str] = "qwen2_vl"
    coordinates: ClassVar[CoordinateSpace] = CoordinateSpace.NORM1000
    packs_images: ClassVar[bool] = True
    takes_videos: ClassVar[bool] = True
    vllm_video_fault: ClassVar[str | None] = (
        "vLLM counts the positions after a video from its last step in time, transformers from the size of its frames"
    )

    def process_images(self, images: tuple[Image, ...]) -> tuple[dict[str, torch.Tensor], list[str]]:
        processor = self.processor.image_processor
        inputs = dict(processor(images=list(images), input_data_format="channels_last", return_tensors="pt"))
        features = inputs["image_grid_thw"].prod(dim=1) // processor.merge_size**2
        return inputs, [self.image_token * count for count in features.tolist()]

    def expanded(self, width: int, height: int) -> str:
        processor = self.processor.image_processor
        patches: int = processor.get_number_of_image_patches(height, width)
        return str(self.image_token * (patches // processor.merge_size**2))

    def process_video(self, video: Video) -> dict[str, torch.Tensor]:
        """Prepares frames as the image processor does. That has each frame in all places of a patch's time."""
        processor = self.processor.image_processor
        together, frames = processor.temporal_patch_size, list(self.resized_frames(video))
        frames += [frames[-1]] * (-len(frames) % together)
        patches = []
        for start in range(0, len(frames), together):
            some = frames[start : start + together]
            inputs = processor(images=some, do_resize=False, input_data_format="channels_last", return_tensors="pt")
            alike = inputs["pixel_values"].view(together, -1, 3, together, processor.patch_size**2)
            patches.append(torch.stack([alike[i, :, :, i] for i in range(together)], dim=2).flatten(1))
        grid = [len(patches), *(side // processor.patch_size for side in frames[0].shape[:2])]
        return {"pixel_values": torch.cat(patches), _GRIDS: torch.tensor([grid])}

    def resized_frames(self, video: Video) -> NDArray[np.uint8]:
        """Resizes frames by Pillow, as images are."""
        size = self.frame_size(video)
        shown = (PILImage.fromarray(one).resize(size, PILImage.Resampling.BICUBIC) for one in video.frames)
        return np.stack([np.asarray(one) for one in shown])

    def expanded_video(self, video: Video) -> str:
        return self.video_token * sum(self._video_features(video))

    @property
    def video_mark(self) -> str | None:
        return self.video_token if self.takes_videos else None

    def _video_features(self, video: Video) -> list[int]:
        """The number of features of each step in time."""
        processor = self.processor.image_processor
        width, height = self.frame_size(video)
        steps = -(-len(video.frames) // processor.temporal_patch_size)
        return [width * height // (processor.patch_size * processor.merge_size) ** 2] * steps

    def frame_size(self, video: Video) -> tuple[int, int]:
        """The width and height of a video's frames as the model sees them: each is brought within the limits of pixels.

        Raises:
            ValueError: They are over 200 times as long as wide.
        """
        height, width = video.frames.shape[1:3]
        least, most, factor = self._frame_limits(width, height)
        rows, columns = round(height / factor), round(width / factor)
        if rows * columns * factor**2 > most:
            scale = math.sqrt(height * width / most) * factor
            rows, columns = max(1, math.floor(height / scale)), max(1, math.floor(width / scale))
        elif rows * columns * factor**2 < least:
            scale = math.sqrt(least / (height * width)) / factor
            rows, columns = math.ceil(height * scale), math.ceil(width * scale)
        return columns * factor, rows * factor

    def _frame_limits(self, width: int, height: int) -> tuple[int, int, int]:
        """The limits of pixels, as the video processor's settings have them, and what sizes are multiples of.

        Raises:
            ValueError: Frames of this shape are too narrow.
        """
        if max(height, width) / min(height, width) > 200:
            raise ValueError(f"frames of {width} x {height} pixels are too narrow: at most 200 times as long as wide")
        processor, settings = self.processor.image_processor, self.processor.video_settings
        size = settings.get("size") or {}
        found = [
            settings.get(name) or size.get(edge) or processor.size[edge]
            for name, edge in zip(_LIMITS, _EDGES, strict=True)
        ]
        return int(found[0]), int(found[1]), processor.patch_size * processor.merge_size

    def as_seen(self, ids: torch.Tensor) -> torch.Tensor:
        """Tokens of videos become tokens of images, because the tower's features of both are one sequence."""
        if not self.takes_videos:
            return ids
        config = self.model.config
        return ids.masked_fill(ids == config.video_token_id, config.image_token_id)

    @classmethod
    def limited(cls, settings: Mapping[str, Any], limits: PixelLimits) -> dict[str, Any]:
        """Changes `size`, or `min_pixels` and `max_pixels`, whichever the processor's settings have."""
        changed, size = dict(settings), dict(settings.get("size") or {})
        frames = cls.frames(changed.get("temporal_patch_size", 2))
        for name, edge, value in zip(_LIMITS, _EDGES, (limits.min_pixels, limits.max_pixels), strict=True):
            if value is None:
                continue
            if edge in size:
                size[edge] = value * frames
            if name in changed or edge not in size:
                changed[name] = value * frames
        if size:
            changed["size"] = size
        _check_limits(changed, frames)
        return changed

    @classmethod
    def frames(cls, temporal_patch_size: int) -> int:
        """How many times the processor counts an image's pixels. Default: 1."""
        return 1

    @classmethod
    def bound(cls, image_processor: Any) -> ResizeRule:
        size, frames = image_processor.size, cls.frames(image_processor.temporal_patch_size)
        factor = image_processor.patch_size * image_processor.merge_size
        return ResizeRule(factor, size["shortest_edge"] // frames, size["longest_edge"] // frames)

    def vision_inputs(self, images: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, Any]:
        """Keeps the sizes of images on the host, with all that the tower computes from them: it asks for numbers."""
        rest = {name: one for name, one in images.items() if name != _GRIDS}
        places = self.vision_places(images[_GRIDS])
        sent = super().vision_inputs({**rest, **places}, device)
        return {**sent, _GRIDS: images[_GRIDS], **self.longest_segments(places)}

    def vision_places(self, grids: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the tower computes from sizes of images, in patches, by the names of its arguments."""
        return places_of_patches(self.vision_tower(), grids)

    def longest_segments(self, places: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """Lengths of the longest segments within which the tower attends, by the names of its arguments."""
        return {"max_seqlen": int(places["cu_seqlens"].diff().max())}

    def positions(
        self, ids: NDArray[np.int64], images: Mapping[str, torch.Tensor], shown: Sequence[Image | Video] = ()
    ) -> NDArray[np.int64]:
        """M-RoPE positions [3, T]: time, height and width for image tokens, thrice the same for text."""
        if not images:
            return np.tile(np.arange(len(ids)), (3, 1))
        input_ids = self.as_seen(torch.from_numpy(ids)[None])
        types = (input_ids == self.model.config.image_token_id).int()
        positions, _ = self.model.model.get_rope_index(
            input_ids, mm_token_type_ids=types, image_grid_thw=self.grids_in_text(images[_GRIDS])
        )
        return np.asarray(positions[:, 0])

    def grids_in_text(self, grids: torch.Tensor) -> torch.Tensor:
        """The grids int64 [runs, 3] of runs of image tokens, from those of images and videos. Default: the same."""
        return grids

    def modality_tokens(self) -> set[int]:
        config = self.model.config
        return {config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id}

    def vision_tower(self) -> nn.Module:
        return self.model.get_submodule("model.visual")

    def vision_blocks(self) -> nn.Module:
        return self.vision_tower().get_submodule("blocks")

    def projectors(self) -> list[nn.Module]:
        return [self.vision_tower().get_submodule("merger")]


def _check_limits(settings: Mapping[str, Any], frames: int) -> None:
    """Raises ConfigError if no size of an image is within the limits."""
    size = settings.get("size", {})
    least, most = (settings.get(name) or size.get(edge) for name, edge in zip(_LIMITS, _EDGES, strict=True))
    side = settings.get("patch_size", 14) * settings.get("merge_size", 2)
    if most is not None and most < side**2 * frames:
        raise ConfigError(f"max_pixels={most // frames} is below one image token of the model, {side} x {side} pixels")
    if least is not None and most is not None and least > most:
        raise ConfigError(
            f"min_pixels={least // frames} is above max_pixels={most // frames}: give both, as one of them is the "
            "processor's own"
        )
