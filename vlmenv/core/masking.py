"""Observations whose images and videos are masked, in part or in whole, or are those of another sample.

They tell how much a policy looks: `vlmenv.algos.papo`, `vlmenv.algos.vppo` and `vlmenv eval --visual-dependence`.
"""

from __future__ import annotations

import hashlib
import itertools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
        share: Share of the patches, 0 to 1, rounded to whole patches, at least one if the share is above 0. Patches at
            the right and lower edge may be smaller.
        seed: Seed of the draw. The same image has the same patches masked in any batch and on any rank.

    Returns:
        A copy of the image.
    """
    rows, columns = (-(-side // PATCH) for side in image.shape[:2])
    rng = np.random.default_rng([seed, zlib.crc32(np.ascontiguousarray(image).tobytes())])
    masked = np.zeros(rows * columns, np.bool_)
    count = max(share > 0, round(share * len(masked)))
    masked[rng.permutation(len(masked))[:count]] = True
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


def _with(observation: Observation, images: tuple[Image, ...], videos: tuple[Video, ...]) -> Observation:
    """An observation with other images and videos."""
    changed: Observation = {**observation, "images": images}
    if "videos" in observation:
        changed["videos"] = videos
    return changed


class Shuffle:
    """Gives each sample the images and videos of another sample that has as many, and none of its own.

    That sample is drawn from the others of the batch. Where none is like this, it is drawn from the newest batch that
    had as many, and where there is none either, the images are black. Images are the same if their pixels are.

    Args:
        seed: Seed of the draws.
        fits: Tells if observations, which ask about the same images, leave room for answers. Samples whose images do
            not fit are passed over. Default: all do.

    Attributes:
        alone: Number of observations that had no images to exchange.
    """

    def __init__(self, seed: int = 0, fits: Callable[[list[Observation]], bool] = lambda shown: True) -> None:
        self.alone = 0
        self._seed, self._fits = seed, fits
        self._earlier: dict[tuple[int, int], list[_Sample]] = {}

    def __call__(self, observations: Sequence[Observation]) -> list[Observation]:
        """Observations [N] with exchanged images. Neighbours with the same images are one sample."""
        samples = _samples(observations)
        found: list[Observation] = []
        runs = itertools.groupby(zip(observations, samples, strict=True), key=lambda pair: pair[1].contents)
        for _, run in runs:
            asked, (own, *_) = zip(*run, strict=True)
            shown = self._exchanged(asked, own, samples)
            self.alone += 0 if shown else len(asked)
            found += shown or own.blank().shown_to(asked)
        self._earlier |= {own.counts: [one for one in samples if one.counts == own.counts] for own in samples}
        return found

    def _exchanged(
        self, asked: Sequence[Observation], own: _Sample, samples: Sequence[_Sample]
    ) -> list[Observation] | None:
        """A sample's observations with another one's images; as they are without images, and None if there is none."""
        if not own.contents:
            return list(asked)
        rng = np.random.default_rng([self._seed, zlib.crc32(b"".join(own.contents))])
        for batch in (samples, self._earlier.get(own.counts, ())):
            unlike = [one for one in batch if own.may_get(one)]
            while unlike:
                other = unlike[rng.integers(len(unlike))]
                if self._fits(shown := other.shown_to(asked)):
                    return shown
                unlike = [one for one in unlike if one.contents != other.contents]
        return None


@dataclass(frozen=True)
class _Sample:
    """Images and videos of a sample."""

    images: tuple[Image, ...]
    videos: tuple[Video, ...]
    contents: tuple[bytes, ...] = ()
    """a digest of each"""

    @property
    def counts(self) -> tuple[int, int]:
        return len(self.images), len(self.videos)

    def shown_to(self, asked: Sequence[Observation]) -> list[Observation]:
        """Observations with these images and videos in the place of their own."""
        return [_with(one, self.images, self.videos) for one in asked]

    def may_get(self, other: _Sample) -> bool:
        """True if another sample has as many images and videos, and none of these."""
        return self.counts == other.counts and not set(self.contents) & set(other.contents)

    def blank(self) -> _Sample:
        """One with black images and videos of the same sizes."""
        videos = tuple(Video(np.zeros_like(one.frames), one.seconds, one.duration) for one in self.videos)
        return _Sample(tuple(np.zeros_like(image) for image in self.images), videos)


def _samples(observations: Sequence[Observation]) -> list[_Sample]:
    """The samples of observations [N]. The contents of an object are computed once."""
    known: dict[int, bytes] = {}

    def name(shown: Image | Video) -> bytes:
        if id(shown) not in known:
            pixels = np.ascontiguousarray(shown.frames if isinstance(shown, Video) else shown)
            known[id(shown)] = hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).digest()
        return known[id(shown)]

    pairs = [(one["images"], one.get("videos", ())) for one in observations]
    return [_Sample(images, videos, (*map(name, images), *map(name, videos))) for images, videos in pairs]


Change = Callable[[Sequence[Observation]], list[Observation]]
"""From observations [N] to those with other images."""
