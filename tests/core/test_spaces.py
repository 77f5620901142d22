from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from gymnasium.spaces import Space, Tuple
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate

from vlmenv.core.spaces import FreeText, OneOfTexts, RGBImage

SPACES = (FreeText, RGBImage, partial(OneOfTexts, ("user", "assistant")))


@pytest.mark.parametrize("make", SPACES)
def test_a_space_keeps_gymnasiums_promises(make: Callable[..., Space]) -> None:
    space = make(seed=1)
    samples = [space.sample() for _ in range(20)]
    assert all(space.contains(sample) for sample in samples)
    again = make(seed=1)
    for sample in samples:
        np.testing.assert_equal(again.sample(), sample)
    written = json.loads(json.dumps(space.to_jsonable(samples)))
    for ours, read in zip(samples, space.from_jsonable(written), strict=True):
        np.testing.assert_equal(ours, read)
    assert space == make()
    assert space != object()


@pytest.mark.parametrize("make", SPACES)
def test_a_space_can_be_batched(make: Callable[..., Space]) -> None:
    space = make(seed=1)
    batched = batch_space(space, 3)
    assert isinstance(batched, Tuple)
    items = [space.sample() for _ in range(3)]
    joined = concatenate(space, items, create_empty_array(space, 3))
    assert batched.contains(joined)
    np.testing.assert_equal(list(iterate(batched, joined)), items)


def test_free_text_holds_any_text_and_nothing_else() -> None:
    assert all(FreeText().contains(text) for text in ("", "é中😀", "\ud800", "x" * 10**6))
    assert not any(FreeText().contains(thing) for thing in (None, 1, b"x", ["x"]))


def test_rgb_image_holds_images_of_any_size_and_nothing_else() -> None:
    assert RGBImage().contains(np.zeros((1, 700, 3), dtype=np.uint8))
    for shape, dtype in [((4, 4), np.uint8), ((4, 4, 4), np.uint8), ((4, 4, 3), np.float32), ((0, 4, 3), np.uint8)]:
        assert not RGBImage().contains(np.zeros(shape, dtype=dtype))


def test_one_of_texts_holds_them_and_nothing_else() -> None:
    space = OneOfTexts(("user", "assistant"))
    assert {space.sample() for _ in range(40)} == {"user", "assistant"}
    assert not any(space.contains(thing) for thing in ("User", "", None, 1, ["user"]))
    assert space != OneOfTexts(("user",))
