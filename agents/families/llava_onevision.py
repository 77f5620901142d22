"""LLaVA-OneVision: a single image in tiles and as a whole; of several images, each as a whole."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from vlmenv.agents.families.base import Family
from vlmenv.compat.transformers import best_resolution
from vlmenv.core.coordinates import CoordinateSpace, ResizeRule
from vlmenv.core.spaces import Image


class LlavaOnevision(Family):
    """LLaVA-OneVision in transformers' own layout (arXiv 2408.03326).

    It was taught boxes in fractions of 1, which is no convention here. Thousandths are next to them.
    """

    model_type: ClassVar[str] = "llava_onevision"
    coordinates: ClassVar[CoordinateSpace] = CoordinateSpace.NORM1000

    def process_images(self, images: tuple[Image, ...]) -> tuple[dict[str, torch.Tensor], list[str]]:
        inputs = self.processor.image_processor(
            images=[list(images)], input_data_format="channels_last", return_tensors="pt"
        )
        tiles = inputs["pixel_values"].flatten(0, 1)  # a single image, or single tiles: nothing is padded
        sizes, count = torch.as_tensor(inputs["image_sizes"]), torch.tensor([len(images)])
        features = self.image_lengths([(width, height) for height, width in sizes.tolist()])
        expanded = [self.image_token * number for number in features]
        return {"pixel_values": tiles, "image_sizes": sizes, "batch_num_images": count}, expanded

    def expanded(self, width: int, height: int) -> str:
        """The text of an image that is its prompt's only one."""
        return self.image_token * self._features(width, height)

    def image_lengths(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        """Several images have a tile each, and an end of line."""
        if len(sizes) > 1:
            return [self._side**2 + 1] * len(sizes)
        return [self._features(*size) for size in sizes]

    @property
    def _side(self) -> int:
        """Features along a tile's side."""
        config = self.model.config.vision_config
        return int(config.image_size // config.patch_size)

    def _features(self, width: int, height: int) -> int:
        """Features of the whole image, and those of its tiles line by line, without the tiles' padding.

        Above the limit of the configuration the latter are interpolated to fewer.
        """
        config, side = self.model.config, self._side
        tall, wide = best_resolution(width, height, config.image_grid_pinpoints)
        rows, columns = (size // config.vision_config.image_size * side for size in (tall, wide))
        if width / height > columns / rows:
            rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
        else:
            columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
        most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(rows * columns / (most * side**2))
        if ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
        return int(side**2 + rows * (columns + 1))

    @classmethod
    def sizing(cls, settings: Mapping[str, Any]) -> str:
        most = max(settings.get("image_grid_pinpoints") or [None], key=lambda size: math.prod(size or ()))
        return (
            f": they cut a single image of up to {most} pixels into tiles. Leave the larger sizes out of "
            "image_grid_pinpoints, in the model's preprocessor_config.json and config.json alike"
        )

    @classmethod
    def bound(cls, image_processor: Any) -> ResizeRule:
        """Four times the pixels of the largest grid of tiles, as images of any shape are brought into one."""
        return ResizeRule(1, 1, 4 * max(math.prod(size) for size in image_processor.image_grid_pinpoints))

    def modality_tokens(self) -> set[int]:
        return {self.model.config.image_token_id, self.model.config.video_token_id}

    def projectors(self) -> list[nn.Module]:
        """The projector, and the feature that ends a line, which is the model's own."""
        newline = nn.ParameterList([self.model.get_parameter("model.image_newline")])
        return [*super().projectors(), newline]
