"""Videos as chosen frames with their times, and the rule by which frames are chosen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from gymnasium.spaces import Space
from numpy.typing import NDArray

from vlmenv.core.errors import require
from vlmenv.core.spaces import Image

VIDEO_MARK: Final = "<video>"
"""Mark for the place of a video in a prompt."""
LEAST_FRAMES: Final = 4
"""Frames that a longer video has at least, as in qwen-vl-utils (`FPS_MIN_FRAMES`)."""


@dataclass(frozen=True, slots=True, eq=False)
class Video:
    """The chosen frames of a video. F frames of H x W pixels."""

    frames: NDArray[np.uint8]
    """[F, H, W, 3], F >= 1"""
    seconds: NDArray[np.float64]
    """[F], when each frame is shown, from the start of the video"""
    duration: float
    """of the whole video in seconds, above 0"""

    @property
    def rate(self) -> float:
        """Chosen frames per second of the video."""
        return len(self.frames) / self.duration

    def __eq__(self, other: object) -> bool:
        """Whether both show the same at the same times."""
        return self is other or (
            isinstance(other, Video)
            and self.duration == other.duration
            and np.array_equal(self.seconds, other.seconds)
            and np.array_equal(self.frames, other.frames)
        )

    __hash__ = None  # type: ignore[assignment]  # frames may be written to

    def copy(self) -> Video:
        """A copy, whose frames may be written to."""
        return Video(self.frames.copy(), self.seconds.copy(), self.duration)


@dataclass(frozen=True)
class FrameRule:
    """The choice of a video's frames.

    `fps` frames per second are taken at equal distances, the first and the last frame among them; at least 4, at most
    `most`, and no more than the video has. qwen-vl-utils has this rule too, but rounds the number down to an even one.

    Raises:
        ConfigError: A number is out of its range.
    """

    fps: float = 2.0
    """frames per second, above 0"""
    most: int = 64
    """maximum number of frames, at least 1"""
    pixels: int = 100_352
    """maximum number of pixels of a frame, at least 784; larger frames are scaled down as they are read. The default is
    128 times 28 x 28 pixels"""

    def __post_init__(self) -> None:
        require(0 < self.fps <= 1000, f"video_fps must be above 0 and at most 1000, not {self.fps}")
        require(self.most >= 1, f"video_frames must be at least 1, not {self.most}")
        require(self.pixels >= 784, f"video_pixels must be at least 784, not {self.pixels}")

    def choose(self, total: int, duration: float) -> NDArray[np.int64]:
        """The numbers of the chosen frames, ascending, of a video with `total` frames in `duration` seconds."""
        wanted = max(LEAST_FRAMES, int(min(duration * self.fps, self.most)))
        count = max(1, min(wanted, self.most, total))
        return np.linspace(0, total - 1, count).round().astype(np.int64)

    def size(self, width: int, height: int) -> tuple[int, int]:
        """The width and height at which frames of `width` x `height` pixels are read."""
        scale = min(1.0, (self.pixels / (width * height)) ** 0.5)
        return max(1, int(width * scale)), max(1, int(height * scale))


class VideoSpace(Space[Video]):
    """Videos of any number and size of frames."""

    def __init__(self, seed: int | np.random.Generator | None = None) -> None:
        super().__init__(shape=None, dtype=None, seed=seed)

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def sample(self, mask: None = None, probability: None = None) -> Video:
        """Draws noise: up to 4 frames of up to 32 x 32 pixels, one per second."""
        if mask is not None or probability is not None:
            raise ValueError("VideoSpace samples without mask or probability")
        count, height, width = (int(one) for one in self.np_random.integers(1, (5, 33, 33)))
        frames = self.np_random.integers(256, size=(count, height, width, 3), dtype=np.uint8)
        return Video(frames, np.arange(count, dtype=np.float64), float(count))

    def contains(self, x: Any) -> bool:
        if not isinstance(x, Video) or not isinstance(x.frames, np.ndarray):
            return False
        frames = x.frames
        well = frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[3] == 3 and frames.size > 0
        return bool(well and x.seconds.shape == frames.shape[:1] and x.duration > 0)

    def to_jsonable(self, sample_n: Iterable[Video]) -> list[Any]:
        return [[one.frames.tolist(), one.seconds.tolist(), one.duration] for one in sample_n]

    def from_jsonable(self, sample_n: list[Any]) -> list[Video]:
        return [
            Video(np.asarray(frames, np.uint8), np.asarray(seconds, np.float64), duration)
            for frames, seconds, duration in sample_n
        ]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VideoSpace)

    def __repr__(self) -> str:
        return "VideoSpace()"


def spread(video: Video, most: int) -> list[tuple[float, Image]]:
    """Up to `most` frames of a video at equal distances, with their seconds, to be looked at."""
    count = min(most, len(video.frames))
    chosen = np.linspace(0, len(video.frames) - 1, count).round().astype(int).tolist()
    return [(float(video.seconds[i]), video.frames[i]) for i in chosen]
