"""GLM-4.1V, 4.5V and 4.6V: inputs as for Qwen2-VL, with other tokens. They think, and mark their answers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from vlmenv.agents.families.base import Family
from vlmenv.agents.families.qwen2_vl import Qwen2VL
from vlmenv.core.coordinates import CoordinateSpace

_MARKS = ("<|begin_of_box|>", "<|end_of_box|>")
"""Marks that published models write around the answer, be it a box or a number."""


class Glm4v(Qwen2VL):
    """GLM-4.1V (arXiv 2507.01006)."""

    model_type: ClassVar[str] = "glm4v"
    coordinates: ClassVar[CoordinateSpace] = CoordinateSpace.NORM1000
    takes_videos: ClassVar[bool] = False

    @cached_property
    def control_tokens(self) -> set[int]:
        """Without the marks of answers, because models were trained to write them."""
        return super().control_tokens - self._marks

    @cached_property
    def _marks(self) -> set[int]:
        known = self.processor.tokenizer.added_tokens_encoder
        return {known[mark] for mark in _MARKS if mark in known}

    def decode(self, token_ids: NDArray[np.int64]) -> str:
        """As in the base class, without the marks of answers, which are not part of the answer."""
        return super().decode(token_ids[~np.isin(token_ids, list(self._marks))])

    def vision_inputs(self, images: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, Any]:
        """All on the device: the tower's embeddings take the sizes of images there."""
        return Family.vision_inputs(self, images, device)

    @classmethod
    def frames(cls, temporal_patch_size: int) -> int:
        """The processor takes an image for as many equal frames."""
        return temporal_patch_size

    def modality_tokens(self) -> set[int]:
        config = self.model.config
        sides = (f"{kind}_{side}_token_id" for kind in ("image", "video") for side in ("start", "end"))
        return {config.image_token_id, config.video_token_id, *(getattr(config, side) for side in sides)}

    def projectors(self) -> list[nn.Module]:
        """The module that joins neighbouring patches, widens them to the language model's size, and the layers after
        it."""
        return [self.vision_tower().get_submodule(name) for name in ("downsample", "merger")]


class Glm4vMoe(Glm4v):
    """GLM-4.5V, with mixtures of experts (arXiv 2507.01006)."""

    model_type: ClassVar[str] = "glm4v_moe"


class Glm46V(Glm4v):
    """GLM-4.6V: GLM-4.1V's layers, with a processor of its own."""

    model_type: ClassVar[str] = "glm46v"
