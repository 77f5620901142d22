"""What a model's config.json asks for that cannot be trained or used here; nothing else is read."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from transformers import AutoConfig, PreTrainedConfig

from vlmenv.agents.families.base import read_json
from vlmenv.compat.transformers import set_attention
from vlmenv.core.errors import ModelError

_log = logging.getLogger(__name__)

_QUANTISED: Final = {
    "awq": "AWQ",
    "gptq": "GPTQ",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8 (fbgemm)",
    "compressed-tensors": "compressed-tensors",
    "bitsandbytes": "bitsandbytes",
}
"""Names of kinds of quantisation, by `quant_method` in config.json; others are named as they are."""
_KEYS: Final = ("quantization_config", "compression_config")
_ATTENTION: Final = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_KNOWN: Final = ("sdpa", "eager")
_INSTEAD: Final = "sdpa"


def refuse_untrainable(folder: Path) -> None:
    """Refuses weights that are quantised: their numbers stand for others, and no gradient changes them.

    Raises:
        ModelError: They are; the message names the kind.
    """
    kinds = [_kind(part[key]) for part in _parts(folder) for key in _KEYS if part.get(key)]
    other = folder / "hf_quant_config.json"
    if other.is_file():
        kinds.append(_kind(read_json(other).get("quantization") or {}))
    if kinds:
        raise ModelError(
            f"{folder}: the weights are quantised ({kinds[0]}), and quantised weights cannot be trained: give the "
            "unquantised weights of the same model, in bfloat16 or float32"
        )


def _kind(settings: Any) -> str:
    """The kind of quantisation that settings describe."""
    if not isinstance(settings, Mapping):
        return str(settings)
    bits = {"load_in_4bit": "4 bits", "load_in_8bit": "8 bits"}
    width = next((f", {text}" for name, text in bits.items() if settings.get(name)), "")
    method = settings.get("quant_method") or settings.get("quant_algo") or ("bitsandbytes" if width else "of no kind")
    return _QUANTISED.get(str(method).lower(), str(method)) + width


def read_config(folder: Path) -> PreTrainedConfig:
    """Reads a model's configuration, and sets the attention to one that can be used if it names another.

    Raises:
        ModelError: It cannot be read.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: the model's configuration cannot be read: {error}") from error
    assert isinstance(config, PreTrainedConfig)
    if _other_attention(folder):
        set_attention(config, _INSTEAD)
    return config


def tell_attention(folder: Path) -> None:
    """Logs a line if config.json asks for an attention that is not used."""
    if (asked := _other_attention(folder)) and os.environ.get("RANK", "0") == "0":
        _log.warning(
            "%s: config.json asks for attention by %s; %s is used instead, and checkpoints keep config.json as it is",
            folder,
            asked,
            _INSTEAD,
        )


def _other_attention(folder: Path) -> str | None:
    asked = [part[key] for part in _parts(folder) for key in _ATTENTION if isinstance(part.get(key), str)]
    return next((name for name in asked if name not in _KNOWN), None)


def _parts(folder: Path) -> Iterator[Mapping[str, Any]]:
    """The configuration, and those of the model's parts in it."""
    config = read_json(folder / "config.json")
    yield config
    yield from (part for name, part in config.items() if name.endswith("_config") and isinstance(part, Mapping))
