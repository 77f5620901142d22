"""Qwen2.5-VL: images as grids of merged patches, M-RoPE positions, coordinates in pixels of the resized image."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from vlmenv.agents.families.base import Family
from vlmenv.core.coordinates import CoordinateSpace
from vlmenv.core.rollout import Observation, Prompt


class Qwen25VL(Family):
    """Qwen2.5-VL (arXiv 2502.13923)."""

    model_type: ClassVar[str] = "qwen2_5_vl"
    coordinates: ClassVar[CoordinateSpace] = CoordinateSpace.RESIZED

    def encode(self, observation: Observation) -> Prompt:
        ids = np.array(self.processor.tokenizer.encode(self.chat(observation), add_special_tokens=False))
        marks, images = ids == self.model.config.image_token_id, {}
        if marks.sum() != len(observation["images"]):
            raise ValueError(f"the chat template puts {marks.sum()} marks for {len(observation['images'])} images")
        if observation["images"]:
            images = dict(
                self.processor.image_processor(
                    images=list(observation["images"]), input_data_format="channels_last", return_tensors="pt"
                )
            )
            counts = np.ones(len(ids), dtype=np.int64)
            counts[marks] = self._tokens_per_image(images["image_grid_thw"])
            ids = np.repeat(ids, counts)
        return Prompt(ids, self._positions(ids, images.get("image_grid_thw")), images)

    def modality_tokens(self) -> set[int]:
        config = self.model.config
        return {config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id}

    def language_model(self) -> nn.Module:
        return self.model.get_submodule("model.language_model")

    def vision_tower(self) -> nn.Module:
        return self.model.get_submodule("model.visual")

    def projectors(self) -> list[nn.Module]:
        return [self.vision_tower().get_submodule("merger")]

    def _tokens_per_image(self, grid: torch.Tensor) -> NDArray[np.int64]:
        """Features of each image [images], from its grid [images, 3] of patches (time, height, width)."""
        merged = self.processor.image_processor.merge_size**2
        return np.asarray(grid.prod(dim=1) // merged, dtype=np.int64)

    def _positions(self, ids: NDArray[np.int64], grid: torch.Tensor | None) -> NDArray[np.int64]:
        """M-RoPE positions [3, T]: time, height and width for image tokens, thrice the same for text."""
        if grid is None:
            return np.tile(np.arange(len(ids)), (3, 1))
        input_ids = torch.from_numpy(ids)[None]
        types = (input_ids == self.model.config.image_token_id).int()
        positions, _ = self.model.model.get_rope_index(input_ids, mm_token_type_ids=types, image_grid_thw=grid)
        return np.asarray(positions[:, 0])
