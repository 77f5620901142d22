"""Qwen2-VL: images as grids of merged patches, M-RoPE positions, coordinates in thousandths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from vlmenv.agents.families.base import Family
from vlmenv.core.coordinates import CoordinateSpace
from vlmenv.core.spaces import Image


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

    def language_model(self) -> nn.Module:
        return self.model.get_submodule("model.language_model")

    def vision_tower(self) -> nn.Module:
        return self.model.get_submodule("model.visual")

    def vision_blocks(self) -> nn.Module:
        return self.vision_tower().get_submodule("blocks")

    def projectors(self) -> list[nn.Module]:
        return [self.vision_tower().get_submodule("merger")]
