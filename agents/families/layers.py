"""The kinds of layers that a language model has, by its configuration."""

from __future__ import annotations

from typing import Any, Final

WINDOW: Final = "sliding_attention"


def layer_kinds(config: Any) -> set[str]:
    """The kinds of a model's layers, as in its `layer_types`; of one without them, by its sliding window."""
    text = config.get_text_config()
    if kinds := getattr(text, "layer_types", None):
        return set(kinds)
    return {WINDOW if getattr(text, "sliding_window", None) else "full_attention"}
