"""The doctor on small random models of other families, whose answers mean nothing, but add up."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from cases import examined, failed, unchecked
from conftest import ROOT
from transformers.utils import is_torchvision_available

sys.path.append(str(ROOT / "tests" / "agents"))
from small_models import invent

pytestmark = pytest.mark.slow

SETTINGS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {},
    "internvl": {"image_seq_length": 4},
    "glm4v": {},
    "glm4v_moe": {},
    "glm46v": {},
    "qwen3_5": {},
    "qwen3_5_moe": {},
    "mistral3": {"patch_size": 8, "spatial_merge_size": 2},
    "llava_onevision": {
        "num_image_tokens": 16,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_4",
    },
    "gemma3": {"image_seq_length": 4},
    "gemma4": {},
    "gemma4 experts": {},
}
PROCESSORS = {
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "internvl": "InternVLProcessor",
    "glm4v": "Glm4vProcessor",
    "glm4v_moe": "Glm4vProcessor",
    "glm46v": "Glm46VProcessor",
    "qwen3_5": "Qwen3VLProcessor",
    "qwen3_5_moe": "Qwen3VLProcessor",
    "mistral3": "PixtralProcessor",
    "llava_onevision": "LlavaOnevisionProcessor",
    "gemma3": "Gemma3Processor",
    "gemma4": "Gemma4Processor",
    "gemma4 experts": "Gemma4Processor",
}
NEEDS_TORCHVISION = {one: {"prompt text", "prompt images"} for one in ("mistral3", "gemma4", "gemma4 experts")}
"""what is not checked without it, as the published processor cannot be loaded"""


@pytest.mark.parametrize("family", SETTINGS)
def test_models_of_other_families_add_up(family: str, tmp_path: Path) -> None:
    invent(family, tmp_path)
    settings = {"processor_class": PROCESSORS[family], **SETTINGS[family]}
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    findings = examined(model=str(tmp_path), max_new_tokens=12)
    assert failed(findings) <= {"answers read", "answers cut off"}
    not_here = set() if is_torchvision_available() else NEEDS_TORCHVISION.get(family, set())
    assert unchecked(findings) - not_here <= {"coordinates", "rewards"}


def test_a_processor_that_expands_images_otherwise_is_found(tmp_path: Path) -> None:
    """Without its settings, InternVL's writes 256 tokens for each tile, whatever its size."""
    invent("internvl", tmp_path)
    (tmp_path / "processor_config.json").write_text('{"processor_class": "InternVLProcessor"}')
    findings = examined(model=str(tmp_path), max_new_tokens=12)
    assert failed(findings) - {"answers read", "answers cut off"} == {"prompt images"}
    assert findings["prompt images"].figure.startswith("22 image tokens are the trainer's, 1282 the published")
