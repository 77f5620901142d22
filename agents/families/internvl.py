"""InternVL 3 in transformers' own layout: images cut into tiles, coordinates in thousandths."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from vlmenv.agents.families.base import Family
from vlmenv.core.coordinates import CoordinateSpace
from vlmenv.core.spaces import Image


class InternVL(Family):
    """InternVL 3 (arXiv 2504.10479), and other models with the layout of the checkpoints named "-hf"."""

    model_type: ClassVar[str] = "internvl"
    coordinates: ClassVar[CoordinateSpace] = CoordinateSpace.NORM1000

    def process_images(self, images: tuple[Image, ...]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Cuts each image into up to `max_patches` square tiles, chosen by its shape, and adds one of the whole
        image."""
        # The published processor too sets `crop_to_patches` itself, whatever the image processor's configuration says.
        inputs = self.processor.image_processor(
            images=list(images), crop_to_patches=True, input_data_format="channels_last", return_tensors="pt"
        )
        tiles = inputs["pixel_values"]
        features = self._features(tiles.shape[2]) * self._features(tiles.shape[3])
        expanded = [f"<img>{self.image_token * features * count}</img>" for count in inputs["num_patches"].tolist()]
        return {"pixel_values": tiles}, expanded

    def _features(self, pixels: int) -> int:
        """Features along a tile's side."""
        config = self.model.config
        return int(pixels // config.vision_config.patch_size[0] * config.downsample_ratio)

    def modality_tokens(self) -> set[int]:
        return {self.model.config.image_token_id, *self.token_ids("<img>", "</img>")}

    def language_model(self) -> nn.Module:
        return self.model.get_submodule("model.language_model")

    def vision_tower(self) -> nn.Module:
        return self.model.get_submodule("model.vision_tower")

    def vision_blocks(self) -> nn.Module:
        return self.vision_tower().get_submodule("encoder.layer")

    def projectors(self) -> list[nn.Module]:
        return [self.model.get_submodule("model.multi_modal_projector")]
