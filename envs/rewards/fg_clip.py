"""FG-CLIP (arXiv 2505.05071) as transformers' own CLIP, without the code that its checkpoints bring."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

POSITIONS: Final = 248
"""Tokens of a long text."""
SHORT_POSITIONS: Final = 20
"""Positions at the beginning of a long text that keep CLIP's own embeddings (Long-CLIP, arXiv 2403.15378)."""


def is_fg_clip(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's configuration, as it is stored, is FG-CLIP's."""
    return "FGCLIPModel" in (config.get("architectures") or ())


def load_fg_clip(source: str) -> tuple[Any, Mapping[str, Any]]:
    """A `CLIPModel` that computes what FG-CLIP does for long texts and for images, and the loader's report.

    FG-CLIP is CLIP with two tables of 248 positions for long texts instead of 77. One is for the first 20 positions,
    the other for the rest. It also has its own projection for long texts. All of these replace CLIP's.

    Args:
        source: A folder, or a name on the Hugging Face hub.
    """
    import torch
    from torch import nn
    from transformers import CLIPModel

    class Stored(CLIPModel):
        """The weights under the names that the checkpoint has them by."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            width = config.text_config.hidden_size
            for name in ("position_embedding_ori", "position_embedding_res"):
                self.text_model.embeddings.add_module(name, nn.Embedding(POSITIONS, width))
            self.text_filip_projection = nn.Linear(width, config.projection_dim, bias=False)

    loaded: Any = Stored.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    model, report = loaded
    embeddings = model.text_model.embeddings
    first, others = embeddings.position_embedding_ori.weight, embeddings.position_embedding_res.weight
    table = torch.cat([first[:SHORT_POSITIONS], others[SHORT_POSITIONS:]])
    embeddings.position_embedding.weight = nn.Parameter(table.detach())
    embeddings.position_ids = torch.arange(len(table))[None]
    model.text_projection = model.text_filip_projection
    model.config.text_config.max_position_embeddings = len(table)
    return model, report
