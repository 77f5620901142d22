from __future__ import annotations

import numpy as np
import pytest

from vlmenv.core.masking import PATCH, Shuffle, mask_patches, masked
from vlmenv.core.rollout import Observation
from vlmenv.core.spaces import Image
from vlmenv.core.video import Video


def picture(height: int, width: int, value: int = 200) -> Image:
    return np.full((height, width, 3), value, np.uint8)


def shown(*images: Image) -> Observation:
    return {"images": images, "prompt": "what?", "turns": ()}


@pytest.mark.parametrize(("height", "width"), [(70, 70), (65, 100), (5, 3), (14, 28)])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.6, 1.0])
def test_a_share_of_whole_patches_is_black(height: int, width: int, share: float) -> None:
    image = picture(height, width)
    found = mask_patches(image, share, seed=3)
    assert found.shape == image.shape
    assert found.dtype == np.uint8
    assert (image == 200).all()
    blocks = [found[y : y + PATCH, x : x + PATCH] for y in range(0, height, PATCH) for x in range(0, width, PATCH)]
    assert all((block == block[0, 0, 0]).all() for block in blocks)
    assert sum(int(block[0, 0, 0] == 0) for block in blocks) == max(share > 0, round(share * len(blocks)))


def test_a_mask_depends_on_seed_and_image_alone() -> None:
    first, other = picture(70, 70), picture(70, 70, 100)
    again = masked([shown(other), shown(first, first)], 0.5, seed=1)
    assert again[1]["images"][0] is again[1]["images"][1]  # copies stay one prompt
    np.testing.assert_array_equal(again[1]["images"][0], mask_patches(first.copy(), 0.5, seed=1))
    assert not np.array_equal(mask_patches(first, 0.5, seed=1), mask_patches(first, 0.5, seed=2))
    assert not np.array_equal(again[0]["images"][0] > 0, again[1]["images"][0] > 0)


def test_samples_exchange_their_images() -> None:
    """Members of a group stay together; a sample with a number of images of its own waits for another such one."""
    a, b, c, d = (picture(20, 20, value) for value in (10, 20, 30, 40))
    shuffle = Shuffle()
    found = shuffle([shown(a), shown(a), shown(b), shown(c, d), shown()])
    values = [[int(image[0, 0, 0]) for image in one["images"]] for one in found]
    assert values == [[20], [20], [10], [0, 0], []]
    assert shuffle.alone == 1
    (later,) = shuffle([shown(a, b)])
    assert [int(image[0, 0, 0]) for image in later["images"]] == [30, 40]
    assert shuffle.alone == 1
    assert later["prompt"] == "what?"


def test_images_are_told_apart_by_their_pixels() -> None:
    """Four questions about each of four images, each read anew, do not get their own image; nor one of a pair."""
    batch = [shown(picture(20, 20, 10 * (i // 4 + 1))) for i in range(16)]
    found = [int(one["images"][0][0, 0, 0]) for one in Shuffle(seed=3)(batch)]
    assert all(value in {10, 20, 30, 40} - {10 * (i // 4 + 1)} for i, value in enumerate(found))
    assert [int(one["images"][0][0, 0, 0]) for one in Shuffle(seed=3)(batch)] == found
    drawn = [[int(one["images"][0][0, 0, 0]) for one in Shuffle(seed)(batch)] for seed in range(9)]
    assert any(one != found for one in drawn)
    pairs = Shuffle()
    a, b, c = (picture(20, 20, value) for value in (10, 20, 30))
    assert not any(image.any() for one in pairs([shown(a, b), shown(b, c)]) for image in one["images"])
    assert pairs.alone == 2


def test_samples_without_another_image_are_counted() -> None:
    shuffle = Shuffle()
    found = shuffle([shown(picture(20, 20)) for _ in range(3)])
    assert not any(one["images"][0].any() for one in found)
    assert found[0]["images"][0] is found[2]["images"][0]  # one prompt of a group
    assert shuffle.alone == 3
    shuffle([shown(), shown()])
    assert shuffle.alone == 3


def test_images_that_do_not_fit_are_passed_over() -> None:
    """The room is that of all questions about an image; they are asked once for each other image."""
    images = [picture(20, 20, value) for value in (10, 20, 30)]
    batch = [{**shown(images[0]), "prompt": "short"}, {**shown(images[0]), "prompt": "long"}, *map(shown, images[1:])]
    asked: list[list[str]] = []

    def fits(seen: list[Observation]) -> bool:
        asked.append([one["prompt"] for one in seen])
        return not (asked[-1] == ["short", "long"] and seen[0]["images"][0][0, 0, 0] == 20)

    found = [[int(one["images"][0][0, 0, 0]) for one in Shuffle(seed, fits)(batch)] for seed in range(8)]  # type: ignore[arg-type]
    assert all(values[:2] == [30, 30] and 0 not in values for values in found)
    assert asked.count(["short", "long"]) > 8  # the image that does not fit was drawn too
    none = Shuffle(fits=lambda seen: False)
    assert not any(one["images"][0].any() for one in none(batch))  # type: ignore[arg-type]
    assert none.alone == 4


def test_frames_of_videos_are_masked_and_exchanged() -> None:
    rng = np.random.default_rng(5)
    one, other = (Video(rng.integers(1, 256, (3, 28, 42, 3), np.uint8), np.arange(3.0), 3.0) for _ in range(2))
    first: Observation = {"images": (), "videos": (one,), "prompt": "?"}
    second: Observation = {"images": (), "videos": (other,), "prompt": "?"}
    half = masked([first, first], 0.5, seed=1)
    assert half[0]["videos"][0] is half[1]["videos"][0]
    for before, after in zip(one.frames, half[0]["videos"][0].frames, strict=True):
        np.testing.assert_array_equal(after, mask_patches(before, 0.5, seed=1))
    assert not masked([first], 1.0)[0]["videos"][0].frames.any()
    shuffle = Shuffle()
    assert [seen["videos"] for seen in shuffle([first, first, second])] == [(other,), (other,), (one,)]
    assert shuffle.alone == 0
    assert not Shuffle()([first])[0]["videos"][0].frames.any()
