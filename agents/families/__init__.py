"""The model families that agents can be built from, by the `model_type` of their configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    is_torchvision_available,
)

from vlmenv.agents.families.base import Family, Processor, PromptReading, read_json, require_processor
from vlmenv.agents.families.gemma3 import Gemma3
from vlmenv.agents.families.gemma4 import Gemma4
from vlmenv.agents.families.glm4v import Glm4v, Glm4vMoe, Glm46V
from vlmenv.agents.families.idefics3 import Idefics3, SmolVLM
from vlmenv.agents.families.internvl import InternVL
from vlmenv.agents.families.layers import unknown_family
from vlmenv.agents.families.llava_onevision import LlavaOnevision
from vlmenv.agents.families.mistral3 import Mistral3
from vlmenv.agents.families.qwen2_5_vl import Qwen25VL
from vlmenv.agents.families.qwen2_vl import Qwen2VL
from vlmenv.agents.families.qwen3_5 import Qwen35, Qwen35Moe
from vlmenv.agents.families.qwen3_vl import Qwen3VL, Qwen3VLMoe
from vlmenv.agents.untrainable import read_config
from vlmenv.core.coordinates import CoordinateSpace, ResizeRule
from vlmenv.core.errors import ConfigError, ModelError

FAMILIES: Final[dict[str, type[Family]]] = {
    family.model_type: family
    for family in (
        *(Qwen2VL, Qwen25VL, Qwen3VL, Qwen3VLMoe, Qwen35, Qwen35Moe, InternVL, Idefics3, SmolVLM),
        *(Glm4v, Glm4vMoe, Glm46V, Mistral3, LlavaOnevision, Gemma3, Gemma4),
    )
}


def register_family(family: type[Family]) -> None:
    """Registers a family of models under the `model_type` of its class.

    Raises:
        ConfigError: That type is registered already.
    """
    if family.model_type in FAMILIES:
        raise ConfigError(f"a family of type '{family.model_type}' is registered already")
    FAMILIES[family.model_type] = family


def family_of(model_type: str, config: PreTrainedConfig | None = None) -> type[Family]:
    """Finds the family of a configuration's `model_type`.

    Args:
        model_type: The type.
        config: The configuration, by which a message tells what a new family would need. Default: the type's usual one.

    Raises:
        ModelError: No family has that type.
    """
    if model_type not in FAMILIES:
        raise ModelError(unknown_family(model_type, FAMILIES, config))
    return FAMILIES[model_type]


def weightless_family(folder: Path, chat_template_kwargs: Mapping[str, Any] | None = None) -> Family:
    """The family of a folder's model with its processor, without weights. It encodes prompts, and computes nothing.

    Raises:
        ConfigError: The chat template never reads one of `chat_template_kwargs`.
        ModelError: The model's configuration cannot be read, its family is not known, or its processor is missing.
    """
    transformers.utils.logging.disable_progress_bar()
    config = read_config(folder)
    family, processor = family_of(config.model_type, config), Processor.from_pretrained(folder, chat_template_kwargs)
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return family(model, processor)


def coordinate_space(folder: Path) -> CoordinateSpace:
    """The convention of coordinates of the model in a folder: that of its `vlmenv.json`, otherwise its family's.

    Raises:
        ModelError: The configuration cannot be read, or its family is not known.
    """
    try:
        if (folder / "vlmenv.json").is_file():
            return CoordinateSpace(read_json(folder / "vlmenv.json")["coordinates"])
        return family_of(read_json(folder / "config.json")["model_type"]).coordinates
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: the model's configuration cannot be read: {error!r}") from error


def resize_rule(folder: Path) -> ResizeRule:
    """The rule of the image processor in a folder for image sizes.

    Raises:
        ModelError: Its configuration cannot be read, or is not of the kind that Qwen's have.
    """
    try:
        if (folder / "preprocessor_config.json").is_file():
            settings = read_json(folder / "preprocessor_config.json")
        else:
            settings = read_json(folder / "processor_config.json")["image_processor"]
        if not settings["image_processor_type"].startswith("Qwen2VLImageProcessor"):
            raise ModelError(
                f"{folder}: this model does not size images as Qwen2.5-VL does, for which coordinates 'resized' are; "
                "choose 'norm1000' or 'original'"
            )
        size = settings.get("size", {})
        return ResizeRule(
            settings["patch_size"] * settings["merge_size"],
            settings.get("min_pixels") or size["shortest_edge"],
            settings.get("max_pixels") or size["longest_edge"],
        )
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder}: how images are resized cannot be read: {error!r}") from error


def image_bound(folder: Path) -> ResizeRule | None:
    """The rule for images with more pixels than a model sees, which need not be decoded at their full size.

    Returns:
        The rule, or None for a family that has none.

    Raises:
        ModelError: The configuration or the image processor cannot be read, or the family is not known.
    """
    require_processor(folder)
    try:
        backend = None if is_torchvision_available() else "pil"
        family = family_of(read_json(folder / "config.json").get("model_type", ""))
        return family.bound(AutoImageProcessor.from_pretrained(folder, backend=backend))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{folder}: the image processor cannot be loaded: {error}") from error


__all__ = [
    "FAMILIES",
    "Family",
    "Processor",
    "PromptReading",
    "coordinate_space",
    "family_of",
    "image_bound",
    "register_family",
    "resize_rule",
    "weightless_family",
]
