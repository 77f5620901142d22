"""GLM-4.1V: fed as Qwen2-VL is, with tokens of its own; thinks, and marks its answers."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from vlmenv.agents.families.qwen2_vl import Qwen2VL
from vlmenv.core.coordinates import CoordinateSpace

_MARKS = ("<|begin_of_box|>", "<|end_of_box|>")
"""What published models write around the part of an answer that counts, be it a box or a number."""


class Glm4v(Qwen2VL):
    """GLM-4.1V (arXiv 2507.01006)."""

    model_type: ClassVar[str] = "glm4v"
    coordinates: ClassVar[CoordinateSpace] = CoordinateSpace.NORM1000

    @cached_property
    def control_tokens(self) -> set[int]:
        """Without the marks of answers: models were taught to write them."""
        return super().control_tokens - self._marks

    @cached_property
    def _marks(self) -> set[int]:
        known = self.processor.tokenizer.added_tokens_encoder
        return {known[mark] for mark in _MARKS if mark in known}

    def decode(self, token_ids: NDArray[np.int64]) -> str:
        """As elsewhere; the marks of answers are left out, since they are no part of what is answered."""
        return super().decode(token_ids[~np.isin(token_ids, list(self._marks))])

    def modality_tokens(self) -> set[int]:
        config = self.model.config
        sides = (f"{kind}_{side}_token_id" for kind in ("image", "video") for side in ("start", "end"))
        return {config.image_token_id, config.video_token_id, *(getattr(config, side) for side in sides)}

    def projectors(self) -> list[nn.Module]:
        """What joins neighbouring patches and widens them to the language model's size, and what follows it."""
        return [self.vision_tower().get_submodule(name) for name in ("downsample", "merger")]
