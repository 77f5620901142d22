"""Loads samples in threads, also those of the next step while this one updates the model."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from vlmenv.core.errors import SampleError
from vlmenv.core.rollout import Observation
from vlmenv.envs.base import VisualTaskEnv
from vlmenv.envs.data.source import Sample

_MOST_BYTES: Final = 2**29
"""Of images and videos that are loaded ahead: some 170 images of a megapixel."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A sample that a group of environments shows."""

    index: int
    sample: Sample
    observation: Observation

    @property
    def image_bytes(self) -> int:
        """Memory of its images and videos in bytes: as they were loaded, and as they are shown."""
        images = sum(image.nbytes for image in (*self.sample.images, *self.observation["images"]))
        return images + sum(video.frames.nbytes for video in self.sample.videos)  # which are shown as they are


class SampleLoader:
    """Loads a task's samples in threads, when they are asked for or ahead of that.

    Loading ahead changes no result. A sample that cannot be loaded ahead is loaded again when it is asked for, and its
    error is raised then.

    Args:
        task: The task's environment.
    """

    def __init__(self, task: VisualTaskEnv) -> None:
        self._task = task
        self._pool = ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1)), thread_name_prefix="vlmenv-images")
        self._ahead: dict[int, Future[Shown | None]] = {}
        self._room = 0
        self._lock = threading.Lock()

    def load(self, indices: Sequence[int]) -> Iterator[Shown | SampleError]:
        """The samples at these indices in turn, or their errors. Drops all others that were loaded ahead."""
        ahead, self._ahead = self._ahead, {}
        return self._pool.map(self._finish, indices, [ahead.get(index) for index in indices])

    def begin(self, indices: Sequence[int]) -> None:
        """Starts to load samples that are likely to be asked for next, as far as their images fit the memory."""
        self._room = _MOST_BYTES
        self._ahead = {index: self._pool.submit(self._load_ahead, index) for index in indices}

    def close(self) -> None:
        """Ends the threads, each after the sample that it is loading."""
        self._ahead = {}
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _load(self, index: int) -> Shown | SampleError:
        try:
            return Shown(index, *self._task.show(index))
        except SampleError as error:
            return error

    def _load_ahead(self, index: int) -> Shown | None:
        """A sample; None if it cannot be loaded, or others fill the memory."""
        if self._room <= 0:
            return None
        try:
            found = Shown(index, *self._task.show(index))
        except Exception:  # whatever it is, it is met again when the sample is asked for
            return None
        with self._lock:
            self._room -= found.image_bytes
        return found

    def _finish(self, index: int, ahead: Future[Shown | None] | None) -> Shown | SampleError:
        """A sample that may have been loaded ahead. The threads began that before they came here, so it ends."""
        return (ahead and ahead.result()) or self._load(index)
