"""The doctor on small random models of other families, whose answers mean nothing, but add up."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from cases import examined, failed, unchecked
from conftest import ROOT

sys.path.append(str(ROOT / "tests" / "agents"))
from small_models import invent

pytestmark = pytest.mark.slow

SETTINGS = {"qwen2_5_vl": {}, "internvl": {"image_seq_length": 4}, "glm4v": {}}
PROCESSORS = {"qwen2_5_vl": "Qwen2_5_VLProcessor", "internvl": "InternVLProcessor", "glm4v": "Glm4vProcessor"}


@pytest.mark.parametrize("family", SETTINGS)
def test_models_of_other_families_add_up(family: str, tmp_path: Path) -> None:
    invent(family, tmp_path)
    settings = {"processor_class": PROCESSORS[family], **SETTINGS[family]}
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    findings = examined(model=str(tmp_path), max_new_tokens=12)
    assert failed(findings) <= {"answers read", "answers cut off"}
    assert unchecked(findings) <= {"coordinates", "rewards"}


def test_a_processor_that_expands_images_otherwise_is_found(tmp_path: Path) -> None:
    """Without its settings, InternVL's writes 256 tokens for each tile, whatever its size."""
    invent("internvl", tmp_path)
    (tmp_path / "processor_config.json").write_text('{"processor_class": "InternVLProcessor"}')
    findings = examined(model=str(tmp_path), max_new_tokens=12)
    assert failed(findings) - {"answers read", "answers cut off"} == {"prompt images"}
    assert findings["prompt images"].figure.startswith("22 image tokens are the trainer's, 1282 the published")
