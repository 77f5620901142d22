"""Qwen2.5-VL: inputs as for Qwen2-VL, but coordinates in pixels of the resized image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from vlmenv.agents.families.qwen2_vl import Qwen2VL
from vlmenv.compat.transformers import places_of_windows
from vlmenv.core.coordinates import CoordinateSpace


class Qwen25VL(Qwen2VL):
    """Qwen2.5-VL (arXiv 2502.13923)."""

    model_type: ClassVar[str] = "qwen2_5_vl"
    coordinates: ClassVar[CoordinateSpace] = CoordinateSpace.RESIZED

    def vision_places(self, grids: torch.Tensor) -> dict[str, torch.Tensor]:
        return super().vision_places(grids) | places_of_windows(self.vision_tower(), grids)

    def longest_segments(self, places: Mapping[str, torch.Tensor]) -> dict[str, int]:
        longest = int(places["cu_window_seqlens"].diff().max())
        return super().longest_segments(places) | {"max_window_seqlen": longest}
