"""Qwen2.5-VL: inputs as for Qwen2-VL, but coordinates in pixels of the resized image."""

from __future__ import annotations

from typing import ClassVar

from vlmenv.agents.families.qwen2_vl import Qwen2VL
from vlmenv.core.coordinates import CoordinateSpace


class Qwen25VL(Qwen2VL):
    """Qwen2.5-VL (arXiv 2502.13923)."""

    model_type: ClassVar[str] = "qwen2_5_vl"
    coordinates: ClassVar[CoordinateSpace] = CoordinateSpace.RESIZED
