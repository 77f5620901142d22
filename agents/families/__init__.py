"""The model families that agents can be built from, by the `model_type` of their configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from vlmenv.agents.families.base import Family, Processor
from vlmenv.agents.families.qwen2_5_vl import Qwen25VL
from vlmenv.agents.families.qwen3_vl import Qwen3VL, Qwen3VLMoe
from vlmenv.core.coordinates import CoordinateSpace
from vlmenv.core.errors import ModelError, unknown_name

FAMILIES: Final[dict[str, type[Family]]] = {family.model_type: family for family in (Qwen25VL, Qwen3VL, Qwen3VLMoe)}


def family_of(model_type: str) -> type[Family]:
    """Finds the family of a configuration's `model_type`.

    Raises:
        ModelError: No family has that type.
    """
    if model_type not in FAMILIES:
        raise ModelError(unknown_name("model family", model_type, FAMILIES))
    return FAMILIES[model_type]


def coordinate_space(folder: Path) -> CoordinateSpace:
    """How the model in a folder writes boxes: its own `vlmenv.json` says so, or else its family.

    Raises:
        ModelError: The configuration cannot be read, or its family is not known.
    """
    try:
        if (folder / "vlmenv.json").is_file():
            return CoordinateSpace(json.loads((folder / "vlmenv.json").read_text(encoding="utf-8"))["coordinates"])
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder}: the model's configuration cannot be read: {error!r}") from error
    return family_of(model_type).coordinates


__all__ = ["FAMILIES", "Family", "Processor", "coordinate_space", "family_of"]
