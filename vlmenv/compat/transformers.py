"""Private parts of transformers: conversion of weights, processors without videos, and attributes of modules."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from vlmenv.compat import Use


def convert_back(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts a model's weights to the names and shapes of its published files.

    Raises:
        ImportError: This release of transformers has no such conversion.
    """
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, Tensor] = revert_weight_conversion(model, dict(weights))
    return found


def _check_conversion() -> str | None:
    from transformers.core_model_loading import revert_weight_conversion

    arguments = list(inspect.signature(revert_weight_conversion).parameters)
    return None if arguments == ["model", "state_dict"] else f"the conversion takes {', '.join(arguments)}"


def image_text_types() -> frozenset[str]:
    """Values of `model_type` of the models of images and text that this release of transformers has."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return frozenset(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def _check_types() -> str | None:
    return None if "qwen2_5_vl" in image_text_types() else "there are no names of models"


def attention_of(module: nn.Module) -> str | None:
    """The name of the attention that a module is configured for; None if it does not tell."""
    name: str | None = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return name


def set_attention(config: PreTrainedConfig, name: str) -> None:
    """Sets the attention of all parts of a configuration, also of one whose file names another."""
    config._attn_implementation = name


def _check_attention() -> str | None:
    module, config = nn.Module(), PreTrainedConfig.from_dict({"attn_implementation": "eager"})
    module.config = config  # type: ignore[assignment]
    before = attention_of(module)
    set_attention(config, "sdpa")
    return None if (before, attention_of(module)) == ("eager", "sdpa") else "configurations do not tell their attention"


def block_of(attention: nn.Module) -> int:
    """The index of the block that an attention module belongs to."""
    return int(attention.layer_idx)  # type: ignore[arg-type]


def source_of(attention: nn.Module) -> int | None:
    """The index of the earlier block whose keys and values an attention module takes; None if it has its own."""
    if not getattr(attention, "is_kv_shared_layer", False):
        return None
    config: Any = attention.config
    kinds = list(config.layer_types)
    own = kinds[: config.num_hidden_layers - config.num_kv_shared_layers]
    return max(i for i, kind in enumerate(own) if kind == kinds[block_of(attention)])


def keys_of_blocks(text: PreTrainedConfig) -> list[tuple[int, int]]:
    """Heads of keys, and their size, in each block of a language model that keeps keys and values of its own."""
    own = text.num_hidden_layers - (getattr(text, "num_kv_shared_layers", 0) or 0)
    kinds = getattr(text, "layer_types", None) or [None] * own
    parts = getattr(text, "per_layer_config", None)
    configs: list[Any] = [text if parts is None else parts[i] for i in range(own)]
    return [_keys(one) for one, kind in zip(configs, kinds, strict=False) if kind != "linear_attention"]


def _keys(text: Any) -> tuple[int, int]:
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return getattr(text, "num_key_value_heads", None) or heads, size


def tapped_blocks(tower: nn.Module) -> list[int]:
    """Blocks of a vision tower whose outputs the first blocks of the language model take too (DeepStack)."""
    blocks: Any = tower.deepstack_visual_indexes if hasattr(tower.config, "deepstack_visual_indexes") else []
    return list(blocks)


def tap_blocks(tower: nn.Module, blocks: list[int]) -> None:
    """Sets `tapped_blocks` of a tower that has some."""
    if tapped_blocks(tower):
        tower.deepstack_visual_indexes = blocks  # type: ignore[assignment]


def resized(image_processor: Any, width: int, height: int) -> tuple[int, int] | None:
    """The size that Idefics3's processor brings an image to, before it cuts it; None if it does not tell."""
    module = importlib.import_module(type(image_processor).__module__)
    told = getattr(module, "get_resize_output_image_size", None)
    if told is None:
        return None
    outline = np.broadcast_to(np.zeros((), np.uint8), (3, height, width))
    height, width = told(outline, image_processor.size["longest_edge"])
    return width, height


def resized_by_pixtral(width: int, height: int, longest: int, side: int) -> tuple[int, int] | None:
    """The height and width that Pixtral's processor brings an image to; None if it does not tell."""
    try:
        from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size
    except ImportError:
        return None
    outline = np.broadcast_to(np.zeros((), np.uint8), (height, width, 3))
    height, width = get_resize_output_image_size(outline, longest, side)
    return int(height), int(width)


def resized_by_gemma4(image_processor: Any, width: int, height: int) -> tuple[int, int] | None:
    """The height and width that Gemma 4's processor brings an image to; None if it does not tell.

    Raises:
        ValueError: It refuses images of this shape.
    """
    module = importlib.import_module(type(image_processor).__module__)
    told = getattr(module, "get_aspect_ratio_preserving_size", None)
    if told is None:
        return None
    patch, pool = image_processor.patch_size, image_processor.pooling_kernel_size
    height, width = told(height, width, patch, image_processor.max_soft_tokens * pool**2, pool)
    return int(height), int(width)


def best_resolution(width: int, height: int, resolutions: Any) -> tuple[int, int]:
    """The height and width, among those of LLaVA-OneVision's configuration, that suit an image best.

    Raises:
        ImportError: This release of transformers does not tell.
    """
    from transformers.image_processing_utils import select_best_resolution

    tall, wide = select_best_resolution((height, width), resolutions)
    return int(tall), int(wide)


def _check_sizes() -> str | None:
    loaded = [module for name, module in sys.modules.items() if _WITH_SIZES.fullmatch(name)]
    missing = [module.__name__ for module in loaded if not hasattr(module, "get_resize_output_image_size")]
    missing += [] if best_resolution(2, 2, [[1, 1], [2, 2]]) == (2, 2) else ["transformers.image_processing_utils"]
    return f"{missing[0]} does not tell sizes" if missing else None


_WITH_SIZES: Final = re.compile(r"transformers\.models\.\w+\.image_processing_(pil_)?(idefics3|smolvlm|pixtral)")


def places_of_patches(tower: Any, grids: Tensor) -> dict[str, Tensor]:
    """What a tower of Qwen's families computes from sizes of images, by the names of its arguments.

    Args:
        tower: The vision tower.
        grids: int64 [images, 3], numbers of patches in time, height and width.

    Raises:
        ImportError: This release of transformers does not tell.
    """
    from transformers.vision_utils import get_vision_cu_seqlens, get_vision_interpolation_indices_and_weights
    from transformers.vision_utils import get_vision_position_ids as positions

    size = int(tower.config.spatial_merge_size)
    places = {"position_ids": positions(grids, size), "cu_seqlens": get_vision_cu_seqlens(grids)}
    if hasattr(tower, "num_grid_per_side"):  # positions learned on a grid, between whose points it interpolates
        places["interp_indices"], places["interp_weights"] = get_vision_interpolation_indices_and_weights(
            grids,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=size,
        )
    return places


def places_of_windows(tower: Any, grids: Tensor) -> dict[str, Tensor]:
    """The windows of Qwen2.5-VL's tower, as `places_of_patches`."""
    from transformers.vision_utils import get_vision_window_index

    sizes = {name: getattr(tower.config, name) for name in ("spatial_merge_size", "window_size", "patch_size")}
    order, starts = get_vision_window_index(grids, **sizes)
    return {"window_index": order, "cu_window_seqlens": starts}


def _check_places() -> str | None:
    grids = torch.tensor([[1, 4, 4]])
    tower = SimpleNamespace(config=SimpleNamespace(spatial_merge_size=2, window_size=28, patch_size=14))
    found = places_of_patches(tower, grids) | places_of_windows(tower, grids)
    ends = found["cu_seqlens"].tolist(), found["cu_window_seqlens"].tolist()
    return None if ends == ([0, 16], [0, 4, 8, 12, 16]) else "towers place patches in another way"


def processor_without_videos(folder: Path) -> ProcessorMixin:
    """The processor of a model's type around the folder's tokenizer and image processor. It needs no torchvision.

    Raises:
        AttributeError: This release of transformers makes processors in another way. (So do other errors tell.)
    """
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    kind: Any = PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(folder))]
    unchecked: Any = type(kind.__name__, (kind,), {"check_argument_for_proper_class": lambda *_: None})
    parts = {
        "image_processor": AutoImageProcessor.from_pretrained(folder, backend="pil"),
        "tokenizer": AutoTokenizer.from_pretrained(folder),
    }
    settings, _ = kind.get_processor_dict(folder)
    processor = unchecked.from_args_and_dict([parts.get(name) for name in kind.get_attributes()], settings)
    assert isinstance(processor, ProcessorMixin)
    return processor


def _check_processors() -> str | None:
    from transformers.models.auto import processing_auto

    names = ("get_processor_dict", "from_args_and_dict", "get_attributes", "check_argument_for_proper_class")
    missing = [name for name in names if not hasattr(ProcessorMixin, name)]
    missing += [] if hasattr(processing_auto, "PROCESSOR_MAPPING") else ["PROCESSOR_MAPPING"]
    return f"processors have no {', '.join(missing)}" if missing else None


USES: Final = (
    Use("sizes of images", _check_sizes, "whole images are processed to count their tokens, which is slower"),
    Use("weight conversion", _check_conversion, "runs end before step 1, as checkpoints could not be written"),
    Use("places of patches", _check_places, "Qwen's families cannot see images"),
    Use("types of models", _check_types, "reports on models of unknown families fail"),
    Use("names of attention", _check_attention, "images in one call are reported as off"),
    Use("processors without videos", _check_processors, "prompts are not compared with the published processor"),
)
