"""Qwen3-VL: for images it is fed as Qwen2.5-VL is, but writes coordinates in thousandths."""

from __future__ import annotations

from typing import ClassVar

from vlmenv.agents.families.qwen2_5_vl import Qwen25VL
from vlmenv.core.coordinates import CoordinateSpace


class Qwen3VL(Qwen25VL):
    """Qwen3-VL (arXiv 2511.21631)."""

    model_type: ClassVar[str] = "qwen3_vl"
    coordinates: ClassVar[CoordinateSpace] = CoordinateSpace.NORM1000


class Qwen3VLMoe(Qwen3VL):
    """The mixtures of experts among them."""

    model_type: ClassVar[str] = "qwen3_vl_moe"
