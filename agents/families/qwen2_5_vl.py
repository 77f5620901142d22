"""Qwen2.5-VL: inputs as for Qwen2-VL, but coordinates in pixels of the resized image, and positions in seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from vlmenv.agents.families.qwen2_vl import Qwen2VL
from vlmenv.compat.transformers import places_of_windows
from vlmenv.core.coordinates import CoordinateSpace
from vlmenv.core.spaces import Image
from vlmenv.core.video import Video


class Qwen25VL(Qwen2VL):
    """Qwen2.5-VL (arXiv 2502.13923)."""

    model_type: ClassVar[str] = "qwen2_5_vl"
    coordinates: ClassVar[CoordinateSpace] = CoordinateSpace.RESIZED
    vllm_video_fault: ClassVar[str | None] = (
        "vLLM counts the positions after a video from its last second, transformers from the size of its frames"
    )

    def positions(
        self, ids: NDArray[np.int64], images: Mapping[str, torch.Tensor], shown: Sequence[Image | Video] = ()
    ) -> NDArray[np.int64]:
        """As for Qwen2-VL, but the positions of a video in time follow its seconds."""
        if not any(isinstance(one, Video) for one in shown):
            return super().positions(ids, images, shown)
        input_ids = self.as_seen(torch.from_numpy(ids)[None])
        together = self.processor.image_processor.temporal_patch_size
        seconds = [together / one.rate if isinstance(one, Video) else 1.0 for one in shown]
        positions, _ = self.model.model.get_rope_index(
            input_ids,
            mm_token_type_ids=2 * (input_ids == self.model.config.image_token_id).int(),  # images have one step in time
            video_grid_thw=images["image_grid_thw"],
            second_per_grid_ts=torch.tensor(seconds),
        )
        return np.asarray(positions[:, 0])

    def vision_places(self, grids: torch.Tensor) -> dict[str, torch.Tensor]:
        return super().vision_places(grids) | places_of_windows(self.vision_tower(), grids)

    def longest_segments(self, places: Mapping[str, torch.Tensor]) -> dict[str, int]:
        longest = int(places["cu_window_seqlens"].diff().max())
        return super().longest_segments(places) | {"max_window_seqlen": longest}
