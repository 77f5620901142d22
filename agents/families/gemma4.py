"""Gemma 4: images of any shape, whose features may see each other; layers that share keys, and inputs per layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from vlmenv.agents.families.base import Family, Processor
from vlmenv.agents.families.layers import FULL, WINDOW
from vlmenv.compat.transformers import resized_by_gemma4
from vlmenv.core.coordinates import CoordinateSpace, ResizeRule
from vlmenv.core.errors import ModelError
from vlmenv.core.spaces import Image


class Gemma4(Family):
    """Gemma 4, of images and text; its tower for sound stays as it is.

    Raises:
        ModelError: The model has no vision tower, or all its tokens attend to later ones.
    """

    model_type: ClassVar[str] = "gemma4"
    coordinates: ClassVar[CoordinateSpace] = CoordinateSpace.NORM1000
    layers: ClassVar[frozenset[str]] = frozenset({FULL, WINDOW})

    def __init__(self, model: PreTrainedModel, processor: Processor) -> None:
        if model.config.vision_config is None:
            raise ModelError("the model has no vision tower (vision_config is null in config.json), and sees no images")
        both_ways = model.config.get_text_config().use_bidirectional_attention
        if both_ways not in (None, "vision"):
            raise ModelError(
                f"use_bidirectional_attention is {both_ways!r} in config.json: such a model attends to later tokens, "
                "and writes no text"
            )
        if both_ways:
            self.sees_both_ways = frozenset({WINDOW})
        super().__init__(model, processor)

    def process_images(self, images: tuple[Image, ...]) -> tuple[dict[str, torch.Tensor], list[str]]:
        inputs = self.processor.image_processor(
            images=list(images), input_data_format="channels_last", return_tensors="pt"
        )
        kept = {name: inputs[name] for name in ("pixel_values", "image_position_ids")}
        return kept, [self._text(int(count)) for count in inputs["num_soft_tokens_per_image"]]

    def expanded(self, width: int, height: int) -> str:
        processor = self.processor.image_processor
        size = resized_by_gemma4(processor, width, height)
        if size is None:
            return super().expanded(width, height)
        side = processor.patch_size * processor.pooling_kernel_size
        return self._text(size[0] // side * (size[1] // side))

    def _text(self, features: int) -> str:
        config = self.model.config
        start, end = list(self.processor.tokenizer.convert_ids_to_tokens([config.boi_token_id, config.eoi_token_id]))
        return f"{start}{self.image_token * features}{end}"

    def unpacked_arguments(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"mm_token_type_ids": (ids == self.model.config.image_token_id).int()}

    @classmethod
    def sizing(cls, settings: Mapping[str, Any]) -> str:
        most = settings.get("max_soft_tokens", 280)
        return f": they bring every image to about {most} features, as max_soft_tokens says in preprocessor_config.json"

    @classmethod
    def bound(cls, image_processor: Any) -> ResizeRule:
        """Four times the pixels of the largest image that the model sees."""
        side = image_processor.patch_size * image_processor.pooling_kernel_size
        return ResizeRule(1, 1, 4 * image_processor.max_soft_tokens * side**2)

    def modality_tokens(self) -> set[int]:
        config = self.model.config
        names = (
            *("image_token_id", "boi_token_id", "eoi_token_id", "video_token_id"),
            *("audio_token_id", "boa_token_id", "eoa_token_id", "eoa_token_index"),
        )
        return {token for name in names if (token := getattr(config, name, None)) is not None}

    def projectors(self) -> list[nn.Module]:
        return [self.model.get_submodule("model.embed_vision")]

    def unused(self) -> list[nn.Module]:
        named = dict(self.model.get_submodule("model").named_children())
        return [named[name] for name in ("audio_tower", "embed_audio") if name in named]

    @property
    def experts_per_token(self) -> int:
        return int(self.model.config.get_text_config().top_k_experts)
