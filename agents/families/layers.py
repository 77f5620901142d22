"""The kinds of layers that a language model has, and what a family that is not known would need, by configuration."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from transformers import AutoConfig

from vlmenv.compat.transformers import image_text_types

WINDOW: Final = "sliding_attention"
FULL: Final = "full_attention"
STATE: Final = "linear_attention"
_STATES: Final = (STATE, "conv", "mamba", "recurrent", "ssm", "kda", "rwkv", "hybrid")
_WINDOWS: Final = ("sliding", "chunked", "local", "sparse")
_STATE_KEYS: Final = ("mamba_", "ssm_", "hybrid_", "conv_l_cache", "linear_conv_", "attn_layer_indices")


def layer_kinds(config: Any) -> set[str]:
    """The kinds of a model's layers, as in its `layer_types`; of one without them, by its sliding window."""
    text = config.get_text_config()
    if kinds := getattr(text, "layer_types", None):
        return set(kinds)
    return {WINDOW if getattr(text, "sliding_window", None) else FULL}


def unknown_family(model_type: str, known: Iterable[str], config: Any = None) -> str:
    """A message about a family that is not known: what it would need, and which are known.

    It names no family as near: models of another family have other layers, and their weights mean nothing there.

    Args:
        model_type: Of the model's configuration.
        known: The families that are known.
        config: The configuration. Default: that with which transformers would make a model of the type.
    """
    return (
        f"models of type '{model_type}' are of no known family: {_need(model_type, config or _usual(model_type))}. "
        f"Known: {', '.join(sorted(known))}; see docs/families.md"
    )


def _usual(model_type: str) -> Any:
    """Transformers' own configuration of a type; None where it has none."""
    try:
        return AutoConfig.for_model(model_type)
    except (ValueError, TypeError, AttributeError, KeyError, ImportError):
        return None


def _need(model_type: str, config: Any) -> str:
    """What a family of a configuration would need."""
    if config is None:
        return "the installed transformers does not know the type either, so it cannot be said what one would need"
    if model_type not in image_text_types():
        return "transformers has no model of this type that reads images and writes text"
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        return "its answers attend to the output of an encoder, and only decoders that read the prompt themselves work"
    if getattr(text, "cross_attention_layers", None):
        return "its layers attend to images beside the prompt, and only images within the prompt work"
    kinds = layer_kinds(config)
    named = ", ".join(sorted(kinds - {FULL}))
    if _has(kinds, _STATES) or any(key.lower().startswith(_STATE_KEYS) for key in text.to_dict()):
        told = f" ({named})" if named else ""
        return f"one would need a file, and for its layers with states{told} a mixer that branches a prompt's state"
    if _has(kinds, _WINDOWS) or getattr(text, "attention_chunk_size", None):
        told = f" ({named})" if named else ""
        return f"one would need a file, and for its layers with windows{told} a mixer that knows them"
    if kinds != {FULL}:
        return f"one would need a file, and mixers for its layers of {named}"
    return "one would need a file, as its language model has full attention alone"


def _has(kinds: Iterable[str], marks: Iterable[str]) -> bool:
    return any(mark in kind for kind in kinds for mark in marks)
