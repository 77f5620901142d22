"""InternVL 3 in transformers' own layout: images cut into tiles, coordinates in thousandths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from vlmenv.agents.families.base import Family
from vlmenv.core.coordinates import CoordinateSpace, ResizeRule
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

    def expanded(self, width: int, height: int) -> str:
        processor = self.processor.image_processor
        tiles = processor.get_number_of_image_patches(height, width, {"crop_to_patches": True})
        features = self._features(processor.size["height"]) * self._features(processor.size["width"])
        return f"<img>{self.image_token * features * tiles}</img>"

    @classmethod
    def sizing(cls, settings: Mapping[str, Any]) -> str:
        size = settings.get("size", {})
        return (
            f": they cut images into up to max_patches={settings.get('max_patches')} tiles of {size.get('width')} x "
            f"{size.get('height')} pixels. Lower max_patches in the model's preprocessor_config.json"
        )

    @classmethod
    def bound(cls, image_processor: Any) -> ResizeRule:
        """Four times the pixels of all tiles, as the model stretches images to the shape of its tiles."""
        size = image_processor.size
        return ResizeRule(1, 1, 4 * image_processor.max_patches * size["height"] * size["width"])

    def _features(self, pixels: int) -> int:
        """Features along a tile's side."""
        config = self.model.config
        return int(pixels // config.vision_config.patch_size[0] * config.downsample_ratio)

    def modality_tokens(self) -> set[int]:
        return {self.model.config.image_token_id, *self.token_ids("<img>", "</img>")}

    def vision_blocks(self) -> nn.Module:
        return self.vision_tower().get_submodule("encoder.layer")
