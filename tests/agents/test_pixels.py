"""Limits of pixels reach the processor, prompts, the published processor and saved models alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import from_published, invent

from vlmenv.agents.families import image_bound, resize_rule, weightless_family
from vlmenv.agents.pixels import prepared_folder, with_limits
from vlmenv.agents.published import PublishedProcessor
from vlmenv.agents.vlm import VLMAgent, find_model
from vlmenv.core.errors import ConfigError
from vlmenv.core.pixels import PixelLimits

LIMITS = PixelLimits(min_pixels=20_000, max_pixels=26_000)
PHOTO: Any = {"images": (np.zeros((600, 400, 3), np.uint8),), "prompt": "Where?"}
DOT: Any = {"images": (np.zeros((40, 40, 3), np.uint8),), "prompt": "Where?"}


def pixels(family: Any, observation: Any) -> int:
    """Of an image as the model sees it."""
    grid = family.encode(observation).images["image_grid_thw"][0]
    return int(grid.prod()) * family.processor.image_processor.patch_size**2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "qwen2_vl", "glm4v"])
def test_all_that_read_the_folder_see_images_within_the_limits(name: str, tmp_path: Path) -> None:
    (invent if name in ("qwen2_vl", "glm4v") else from_published)(name, tmp_path)
    folder = with_limits(tmp_path, LIMITS)
    family, plain = weightless_family(folder), weightless_family(tmp_path)
    side = family.processor.image_processor.patch_size * family.processor.image_processor.merge_size
    assert pixels(family, PHOTO) <= 26_000
    assert pixels(family, DOT) >= 20_000
    for observation in (PHOTO, DOT):
        assert pixels(family, observation) != pixels(plain, observation)
        if name != "qwen2_vl":  # whose invented tokenizer goes with no published processor
            theirs, _ = PublishedProcessor(folder).read(observation)
            assert theirs.tolist() == family.encode(observation).input_ids.tolist()
    bound = image_bound(folder)
    assert bound is not None
    assert (bound.factor, bound.min_pixels, bound.max_pixels) == (side, 20_000, 26_000)
    if name != "glm4v":
        assert resize_rule(folder) == bound
    shown = np.zeros((*bound.size(400, 600)[::-1], 3), np.uint8)
    assert family.encode({**PHOTO, "images": (shown,)}).input_ids.tolist() == family.encode(PHOTO).input_ids.tolist()


def test_only_the_keys_of_the_limits_change(tmp_path: Path) -> None:
    base = find_model("builtin")
    folder = with_limits(base, PixelLimits(max_pixels=20_000))
    for file in base.iterdir():
        if file.name != "preprocessor_config.json" and file.is_file():
            assert (folder / file.name).read_bytes() == file.read_bytes()
    before, after = (json.loads((one / "preprocessor_config.json").read_text()) for one in (base, folder))
    assert after == before | {"size": {"shortest_edge": 1024, "longest_edge": 20_000}}
    assert with_limits(base, PixelLimits()) == base


@pytest.mark.parametrize("adapted", [False, True])
def test_a_saved_model_sees_images_as_it_was_trained(adapted: bool, tmp_path: Path) -> None:
    agent = VLMAgent.from_pretrained("builtin", pixels=PixelLimits(max_pixels=20_000))
    if adapted:
        pytest.importorskip("peft")
        agent.add_lora(rank=2, alpha=4, dropout=0.0)
    assert agent.base == find_model("builtin")
    agent.save(tmp_path / "saved")
    saved = VLMAgent.from_pretrained(tmp_path / "saved")
    assert pixels(saved.family, PHOTO) == pixels(agent.family, PHOTO) <= 20_000
    assert pixels(VLMAgent.from_pretrained("builtin").family, PHOTO) > 20_000
    assert not any(file.is_symlink() for file in (tmp_path / "saved").iterdir())
    again = tmp_path / "again"
    saved.save(again)
    assert pixels(VLMAgent.from_pretrained(again).family, PHOTO) == pixels(agent.family, PHOTO)
    assert image_bound(prepared_folder(again, PixelLimits())) == image_bound(saved.folder)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "own"), [("internvl3_hf", "max_patches=12 tiles of 448 x 448"), ("smolvlm", "2048")])
def test_a_family_with_other_limits_refuses_and_names_them(name: str, own: str, tmp_path: Path) -> None:
    from_published(name, tmp_path)
    with pytest.raises(ConfigError, match="take no min_pixels and max_pixels") as error:
        with_limits(tmp_path, LIMITS)
    assert own in str(error.value)


def test_limits_that_contradict_each_other_are_refused() -> None:
    base = find_model("builtin")
    with pytest.raises(ConfigError, match="min_pixels=50000 is above max_pixels=36864: give both"):
        with_limits(base, PixelLimits(min_pixels=50_000))
    with pytest.raises(ConfigError, match="below one image token of the model, 32 x 32 pixels"):
        with_limits(base, PixelLimits(min_pixels=1, max_pixels=900))
    with pytest.raises(ConfigError, match="min_pixels=3 is above max_pixels=2"):
        PixelLimits(3, 2)
    with pytest.raises(ConfigError, match="at least 1"):
        PixelLimits(max_pixels=0)
