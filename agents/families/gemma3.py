"""Gemma 3: images of one size, whose features see each other; most layers see a window of the past."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from vlmenv.agents.families.base import Family
from vlmenv.agents.families.layers import FULL, WINDOW
from vlmenv.core.coordinates import CoordinateSpace, ResizeRule
from vlmenv.core.spaces import Image


class Gemma3(Family):
    """Gemma 3 (arXiv 2503.19786).

    No convention of coordinates is published. Every image is brought to one square, so the model cannot know its shape.
    Thousandths do not depend on it. Images are not cut (`do_pan_and_scan`), as in the published processor's defaults.
    """

    model_type: ClassVar[str] = "gemma3"
    coordinates: ClassVar[CoordinateSpace] = CoordinateSpace.NORM1000
    layers: ClassVar[frozenset[str]] = frozenset({FULL, WINDOW})
    sees_both_ways = layers

    def process_images(self, images: tuple[Image, ...]) -> tuple[dict[str, torch.Tensor], list[str]]:
        inputs = self.processor.image_processor(
            images=list(images), do_pan_and_scan=False, input_data_format="channels_last", return_tensors="pt"
        )
        return {"pixel_values": inputs["pixel_values"]}, [self._expanded] * len(images)

    def expanded(self, width: int, height: int) -> str:
        return self._expanded

    @property
    def _expanded(self) -> str:
        start, end = list(self.processor.tokenizer.convert_ids_to_tokens(self._sides))
        return f"\n\n{start}{self.image_token * self.model.config.mm_tokens_per_image}{end}\n\n"

    @property
    def spaced_mark(self) -> str:
        return f"\n\n{self.image_mark}\n\n"  # the tokenizer has tokens for several line breaks

    @property
    def _sides(self) -> list[int]:
        """Ids of the tokens around an image."""
        config = self.model.config
        return [config.boi_token_id, config.eoi_token_id]

    @property
    def image_mark(self) -> str:
        return str(self.processor.tokenizer.convert_ids_to_tokens(self._sides[0]))

    def unpacked_arguments(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"token_type_ids": (ids == self.model.config.image_token_id).int()}

    @classmethod
    def sizing(cls, settings: Mapping[str, Any]) -> str:
        size = settings.get("size", {})
        return f": they bring every image to {size.get('width')} x {size.get('height')} pixels"

    @classmethod
    def bound(cls, image_processor: Any) -> ResizeRule:
        """Four times the pixels of the square, as images of any shape are brought into it."""
        size = image_processor.size
        return ResizeRule(1, 1, 4 * size["height"] * size["width"])

    def modality_tokens(self) -> set[int]:
        return {self.model.config.image_token_id, *self._sides}
