"""Observations whose images and videos are masked, in part or in whole, or are those of another sample.

They tell how much a policy looks: `vlmenv.algos.papo`, `vlmenv.algos.vppo` and `vlmenv eval --visual-dependence`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from vlmenv.core.rollout import Observation
from vlmenv.core.spaces import Image
from vlmenv.core.video import Video

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
    """Observations whose images, and frames of videos, have a share of their patches masked.

    Copies of an image or a video, such as those of a group, share one masked image or video.

    Args:
        observations: [N].
        share: See `mask_patches`.
        seed: See there.
    """
    known: dict[int, Image] = {}
    clips: dict[int, Video] = {}

    def of(image: Image) -> Image:
        if id(image) not in known:
            known[id(image)] = mask_patches(image, share, seed)
        return known[id(image)]

    def of_video(video: Video) -> Video:
        if id(video) not in clips:
            frames = np.stack([mask_patches(frame, share, seed) for frame in video.frames])
            clips[id(video)] = Video(frames, video.seconds, video.duration)
        return clips[id(video)]

    return [
        _with(one, tuple(of(image) for image in one["images"]), tuple(of_video(own) for own in one.get("videos", ())))
        for one in observations
    ]


_Shown = tuple[tuple[Image, ...], tuple[Video, ...]]
"""Images and videos of a sample."""


def _with(observation: Observation, images: tuple[Image, ...], videos: tuple[Video, ...]) -> Observation:
    """An observation with other images and videos."""
    changed: Observation = {**observation, "images": images}
    if "videos" in observation:
        changed["videos"] = videos
    return changed


class Shuffle:
    """Gives each sample the images and videos of another sample that has as many.

    These are the images of the sample before it; the first one of a batch gets those of the last one. A sample that no
    other of its batch can exchange with gets those of an earlier batch, and if there are none, black images.

    Attributes:
        alone: Number of samples that had no images to exchange.
    """

    def __init__(self) -> None:
        self.alone = 0
        self._last: dict[tuple[int, int], _Shown] = {}

    def __call__(self, observations: Sequence[Observation]) -> list[Observation]:
        """Observations [N] with exchanged images. Neighbours with the same images are one sample."""
        samples: list[_Shown] = []
        index = []
        for one in observations:
            shown = (one["images"], one.get("videos", ()))
            if not samples or not _are_same(samples[-1], shown):
                samples.append(shown)
            index.append(len(samples) - 1)
        others = [self._other(samples, i) for i in range(len(samples))]
        self._last |= {_counts(shown): shown for shown in samples}
        return [_with(one, *others[i]) for one, i in zip(observations, index, strict=True)]

    def _other(self, samples: Sequence[_Shown], i: int) -> _Shown:
        counts = _counts(samples[i])
        if not any(counts):
            return samples[i]
        alike = [j for j, shown in enumerate(samples) if _counts(shown) == counts]
        if len(alike) > 1:
            return samples[alike[alike.index(i) - 1]]
        if counts in self._last:
            return self._last[counts]
        self.alone += 1
        images, videos = samples[i]
        blank = tuple(Video(np.zeros_like(one.frames), one.seconds, one.duration) for one in videos)
        return tuple(np.zeros_like(image) for image in images), blank


def _counts(shown: _Shown) -> tuple[int, int]:
    images, videos = shown
    return len(images), len(videos)


def _are_same(first: _Shown, second: _Shown) -> bool:
    return _counts(first) == _counts(second) and all(
        a is b for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=True)
    )


Change = Callable[[Sequence[Observation]], list[Observation]]
"""From observations [N] to those with other images."""
