"""Qwen2-VL: images as grids of merged patches, M-RoPE positions, coordinates in thousandths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from vlmenv.agents.families.base import Family
from vlmenv.compat.transformers import places_of_patches
from vlmenv.core.coordinates import CoordinateSpace, ResizeRule
from vlmenv.core.errors import ConfigError
from vlmenv.core.pixels import PixelLimits
from vlmenv.core.spaces import Image

_GRIDS: Final = "image_grid_thw"
_LIMITS: Final = ("min_pixels", "max_pixels")
_EDGES: Final = ("shortest_edge", "longest_edge")
"""Names of the same limits within `size`."""


class Qwen2VL(Family):
    """Qwen2-VL (arXiv 2409.12191)."""

    model_type: ClassVar[str] = "qwen2_vl"
    coordinates: ClassVar[CoordinateSpace] = CoordinateSpace.NORM1000
    packs_images: ClassVar[bool] = True

    def process_images(self, images: tuple[Image, ...]) -> tuple[dict[str, torch.Tensor], list[str]]:
        processor = self.processor.image_processor
        inputs = dict(processor(images=list(images), input_data_format="channels_last", return_tensors="pt"))
        features = inputs["image_grid_thw"].prod(dim=1) // processor.merge_size**2
        return inputs, [self.image_token * count for count in features.tolist()]

    def expanded(self, width: int, height: int) -> str:
        processor = self.processor.image_processor
        patches: int = processor.get_number_of_image_patches(height, width)
        return str(self.image_token * (patches // processor.merge_size**2))

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

    def positions(self, ids: NDArray[np.int64], images: Mapping[str, torch.Tensor]) -> NDArray[np.int64]:
        """M-RoPE positions [3, T]: time, height and width for image tokens, thrice the same for text."""
        if not images:
            return np.tile(np.arange(len(ids)), (3, 1))
        input_ids = torch.from_numpy(ids)[None]
        types = (input_ids == self.model.config.image_token_id).int()
        grid = images["image_grid_thw"]
        positions, _ = self.model.model.get_rope_index(input_ids, mm_token_type_ids=types, image_grid_thw=grid)
        return np.asarray(positions[:, 0])

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
