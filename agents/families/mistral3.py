"""Mistral 3: images in their own shape, as rows of features that end with a token each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from vlmenv.agents.families.base import Family
from vlmenv.compat.transformers import resized_by_pixtral
from vlmenv.core.coordinates import CoordinateSpace, ResizeRule
from vlmenv.core.spaces import Image

_BREAK, _END = "[IMG_BREAK]", "[IMG_END]"


class Mistral3(Family):
    """Mistral Small 3.1 and later, and Ministral 3, with Pixtral's vision tower (arXiv 2410.07073).

    No convention of coordinates is published. Thousandths do not depend on the size to which images are brought.
    """

    model_type: ClassVar[str] = "mistral3"
    coordinates: ClassVar[CoordinateSpace] = CoordinateSpace.NORM1000
    packs_images: ClassVar[bool] = True

    def process_images(self, images: tuple[Image, ...]) -> tuple[dict[str, torch.Tensor], list[str]]:
        inputs = self.processor.image_processor(
            images=list(images), patch_size=self._side, input_data_format="channels_last", return_tensors="pt"
        )
        sizes = torch.as_tensor(inputs["image_sizes"])
        expanded = [self._expanded(height, width) for height, width in sizes.tolist()]
        return {"pixel_values": inputs["pixel_values"], "image_sizes": sizes}, expanded

    def expanded(self, width: int, height: int) -> str:
        longest = self.processor.image_processor.size["longest_edge"]
        size = resized_by_pixtral(width, height, longest, self._side)
        return super().expanded(width, height) if size is None else self._expanded(*size)

    @property
    def _side(self) -> int:
        """Pixels along the side of a feature."""
        config = self.model.config
        return int(config.vision_config.patch_size * config.spatial_merge_size)

    def _expanded(self, height: int, width: int) -> str:
        """The text of an image of some pixels."""
        row = self.image_token * (width // self._side)
        return _BREAK.join([row] * (height // self._side)) + _END

    def stack_images(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Pads pixels to those of the largest image. The vision tower leaves the padding out."""
        if parts[0].ndim != 4:  # sizes
            return super().stack_images(parts)
        height, width = (max(part.shape[axis] for part in parts) for axis in (2, 3))
        return torch.cat([nn.functional.pad(one, (0, width - one.shape[3], 0, height - one.shape[2])) for one in parts])

    @classmethod
    def sizing(cls, settings: Mapping[str, Any]) -> str:
        longest = settings.get("size", {}).get("longest_edge")
        return (
            f": they shrink images to a longer side of {longest} pixels. Lower longest_edge of size in the model's "
            "preprocessor_config.json"
        )

    @classmethod
    def bound(cls, image_processor: Any) -> ResizeRule:
        """A square of the longer side, within which every shape keeps more pixels than the model sees."""
        return ResizeRule(1, 1, image_processor.size["longest_edge"] ** 2)

    def modality_tokens(self) -> set[int]:
        return {self.model.config.image_token_id, *self.token_ids(_BREAK, _END)}

    def vision_blocks(self) -> nn.Module:
        return self.vision_tower().get_submodule("transformer.layers")
