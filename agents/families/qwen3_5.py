"""Qwen3.5: inputs as for Qwen3-VL, in one stream of features; layers with recurrent states beside attention."""

from __future__ import annotations

from typing import ClassVar

from vlmenv.agents.families.qwen3_vl import TimedVideos
from vlmenv.core.coordinates import CoordinateSpace


class Qwen35(TimedVideos):
    """Qwen3.5, and later ones of its layout."""

    model_type: ClassVar[str] = "qwen3_5"
    coordinates: ClassVar[CoordinateSpace] = CoordinateSpace.NORM1000
    layers: ClassVar[frozenset[str]] = frozenset({"full_attention", "linear_attention"})


class Qwen35Moe(Qwen35):
    """Qwen3.5 with mixtures of experts."""

    model_type: ClassVar[str] = "qwen3_5_moe"
