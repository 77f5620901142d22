"""Qwen3-VL: image inputs as for Qwen2-VL; features of several blocks enter the language model."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from vlmenv.agents.families.qwen2_vl import Qwen2VL
from vlmenv.core.coordinates import CoordinateSpace


class Qwen3VL(Qwen2VL):
    """Qwen3-VL (arXiv 2511.21631)."""

    model_type: ClassVar[str] = "qwen3_vl"
    coordinates: ClassVar[CoordinateSpace] = CoordinateSpace.NORM1000

    def projectors(self) -> list[nn.Module]:
        """Features of several blocks are merged, each by its own projector (DeepStack)."""
        return [*super().projectors(), self.vision_tower().get_submodule("deepstack_merger_list")]

    def join_features(self, parts: list[Any]) -> Any:
        joined = super().join_features(parts)
        blocks = zip(*(part.deepstack_features for part in parts), strict=True)
        joined.deepstack_features = [tuple(one for images in block for one in images) for block in blocks]
        return joined


class Qwen3VLMoe(Qwen3VL):
    """Qwen3-VL with mixtures of experts."""

    model_type: ClassVar[str] = "qwen3_vl_moe"
