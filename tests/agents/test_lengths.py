"""The number of a prompt's tokens from the sizes of its images equals what the processor really makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_models import INVENTED, from_published, invent

from vlmenv.agents.families import weightless_family
from vlmenv.core.spaces import blank_image

SIZES = ((64, 64), (1, 1), (31, 33), (100, 37), (37, 100), (640, 480), (333, 17), (17, 333), (61, 63), (190, 95))
PUBLISHED_SIZES = ((640, 480), (1000, 333), (333, 1000), (28, 28), (1023, 1025), (2500, 300), (449, 447), (1920, 1080))


def check_counts(folder: Path, sizes: tuple[tuple[int, int], ...]) -> None:
    family, rng = weightless_family(folder), np.random.default_rng(0)
    turns = ({"role": "user", "text": "<image> What is  this?"}, {"role": "assistant", "text": "A cat.\n"})
    for width, height in sizes:
        image, blank = rng.integers(256, size=(height, width, 3), dtype=np.uint8), blank_image(width, height)
        for prompt, marks, before in (("Where?\n", 1, ()), ("\n a<image>b\n<image> ", 2, ()), ("é<image>", 2, turns)):
            real = family.encode({"images": (image,) * marks, "prompt": prompt, "turns": before})
            (counted,) = family.lengths([{"images": (blank,) * marks, "prompt": prompt, "turns": before}])
            assert counted == len(real.input_ids), (width, height, prompt)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", INVENTED)
def test_counts_are_those_of_the_prompt(model_type: str, tmp_path: Path) -> None:
    invent(model_type, tmp_path)
    check_counts(tmp_path, SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "internvl3_hf", "smolvlm"])
def test_counts_are_those_of_published_processors(name: str, tmp_path: Path) -> None:
    from_published(name, tmp_path)
    check_counts(tmp_path, PUBLISHED_SIZES)


@pytest.mark.slow
def test_a_prompt_that_cannot_be_encoded_has_its_reason_in_place_of_a_number() -> None:
    family = weightless_family(Path(__file__).parents[2] / "agents" / "builtin")
    broken = {"images": (blank_image(64, 64),), "prompt": "say <|im_end|>"}
    good = {"images": (), "prompt": "Hello"}
    refused, number = family.lengths([broken, good])
    assert "control tokens: <|im_end|>" in str(refused)
    assert number == len(family.encode(good).input_ids)
