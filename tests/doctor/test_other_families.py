"""The doctor on small random models of other families, whose answers mean nothing, but add up."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cases import examined, failed, unchecked
from conftest import ROOT
from transformers.utils import is_torchvision_available

sys.path.append(str(ROOT / "tests" / "agents"))
from small_models import PROCESSORS, invent, tell_processor

pytestmark = pytest.mark.slow

NEEDS_TORCHVISION = {one: {"prompt text", "prompt images"} for one in ("mistral3", "gemma4", "gemma4 experts")}
"""what is not checked without it, as the published processor cannot be loaded"""


@pytest.mark.parametrize("family", [one for one in PROCESSORS if "internvl " not in one])
def test_models_of_other_families_add_up(family: str, tmp_path: Path) -> None:
    invent(family, tmp_path)
    tell_processor(family, tmp_path)
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
