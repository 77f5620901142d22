"""Observations whose images are masked, in part or in whole, or are those of another sample.

They tell how much a policy looks: `vlmenv.algos.papo`, `vlmenv.algos.vppo` and `vlmenv eval --visual-dependence`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from vlmenv.core.rollout import Observation
from vlmenv.core.spaces import Image

PATCH: Final = 14
"""Side of a masked patch in pixels of the image as it is shown, as in PAPO's code (arXiv 2507.06448)."""


def mask_patches(image: Image, share: float, seed: int = 0) -> Image:
    """Blackens patches of an image, drawn at random.

    Args:
        image: uint8 [H, W, 3].
        share: Share of the patches, 0 to 1, rounded to whole patches. Patches at the right and lower edge may be
            smaller.
        seed: Seed of the draw. The same image has the same patches masked in any batch and on any rank.

    Returns:
        A copy of the image.
    """
    rows, columns = (-(-side // PATCH) for side in image.shape[:2])
    rng = np.random.default_rng([seed, zlib.crc32(np.ascontiguousarray(image).tobytes())])
    masked = np.zeros(rows * columns, np.bool_)
    masked[rng.permutation(len(masked))[: round(share * len(masked))]] = True
    pixels = masked.reshape(rows, columns).repeat(PATCH, axis=0).repeat(PATCH, axis=1)
    found: Image = np.where(pixels[: image.shape[0], : image.shape[1], None], np.uint8(0), image)
    return found


def masked(observations: Sequence[Observation], share: float, seed: int = 0) -> list[Observation]:
    """Observations whose images have a share of their patches masked.

    Copies of an image, such as those of a group, share one masked image.

    Args:
        observations: [N].
        share: See `mask_patches`.
        seed: See there.
    """
    known: dict[int, Image] = {}

    def of(image: Image) -> Image:
        if id(image) not in known:
            known[id(image)] = mask_patches(image, share, seed)
        return known[id(image)]

    return [{**one, "images": tuple(of(image) for image in one["images"])} for one in observations]


class Shuffle:
    """Gives each sample the images of another sample that has as many.

    These are the images of the sample before it; the first one of a batch gets those of the last one. A sample that no
    other of its batch can exchange with gets those of an earlier batch, and if there are none, black images.

    Attributes:
        alone: Number of samples that had no images to exchange.
    """

    def __init__(self) -> None:
        self.alone = 0
        self._last: dict[int, tuple[Image, ...]] = {}

    def __call__(self, observations: Sequence[Observation]) -> list[Observation]:
        """Observations [N] with exchanged images. Neighbours with the same images are one sample."""
        samples: list[tuple[Image, ...]] = []
        index = []
        for one in observations:
            if not samples or not _are_same(samples[-1], one["images"]):
                samples.append(one["images"])
            index.append(len(samples) - 1)
        others = [self._other(samples, i) for i in range(len(samples))]
        self._last |= {len(images): images for images in samples}
        return [{**one, "images": others[i]} for one, i in zip(observations, index, strict=True)]

    def _other(self, samples: Sequence[tuple[Image, ...]], i: int) -> tuple[Image, ...]:
        if not samples[i]:
            return ()
        alike = [j for j, images in enumerate(samples) if len(images) == len(samples[i])]
        if len(alike) > 1:
            return samples[alike[alike.index(i) - 1]]
        if len(samples[i]) in self._last:
            return self._last[len(samples[i])]
        self.alone += 1
        return tuple(np.zeros_like(image) for image in samples[i])


def _are_same(first: tuple[Image, ...], second: tuple[Image, ...]) -> bool:
    return len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))


Change = Callable[[Sequence[Observation]], list[Observation]]
"""From observations [N] to those with other images."""
