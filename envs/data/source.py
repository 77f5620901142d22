"""Samples, sources of samples, and the order in which they are shown."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from vlmenv.core.errors import ConfigError, DataError
from vlmenv.core.rollout import IMAGE_MARK, Turn
from vlmenv.core.spaces import Image
from vlmenv.core.video import Video
from vlmenv.envs.data.usage import Usage


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of a task, with its images loaded.

    `<image>` marks in the question and in the system and user turns are the places of the images, in reading order.
    There are as many marks as images, or none; then the images precede the prompt. `rows.placed` checks this. It drops
    marks that only begin a question, because such images precede the prompt anyway.
    """

    id: str
    images: tuple[Image, ...]
    """uint8 arrays [H, W, 3], of all turns in reading order"""
    question: str
    target: Any
    """the truth; coordinates are pixels of the original image"""
    rationale: str = ""
    """reasoning that leads to the answer, if known"""
    subject: str = ""
    """subject of the question, for accuracy by subject; empty if unknown"""
    term: str | None = None
    """the reward term that this row chooses in place of the task's first; None: none"""
    response: str = ""
    """a completion to imitate, if the row has one with its reasoning"""
    turns: tuple[Turn, ...] = ()
    """earlier turns, such as few-shot examples, as `{"role": "user", "text": "What is <image>?"}`; the row's own
    system turn is the first of them, and takes the place of the task's `system_prompt`"""
    sizes: tuple[tuple[int, int], ...] = ()
    """full width and height of each image, which the target's places refer to; empty: those of `images`, which a
    bound on pixels may have made smaller"""
    videos: tuple[Video, ...] = ()
    """videos of all turns in reading order; `<video>` marks are their places, as `<image>` marks are those of images"""

    @property
    def full_sizes(self) -> tuple[tuple[int, int], ...]:
        """`sizes`, or those of `images`."""
        return self.sizes or tuple((image.shape[1], image.shape[0]) for image in self.images)

    @property
    def asked_sizes(self) -> tuple[tuple[int, int], ...]:
        """The full width and height of each of `asked_images`."""
        return self.full_sizes[len(self.images) - len(self.asked_images) :]

    @property
    def asked_images(self) -> tuple[Image, ...]:
        """The images of the question, or those of the last turn that has any."""
        texts = [turn["text"] for turn in self.turns if turn["role"] != "assistant"]
        marks = [text.count(IMAGE_MARK) for text in (*texts, self.question)]
        return self.images[-next((count for count in reversed(marks) if count), len(self.images)) :]


class Source(ABC):
    """Samples by index. `get` may be called from several threads at once."""

    size: int | None
    """Number of samples; None for an endless stream."""
    faults: Sequence[str] = ()
    """Place and fault of each broken row that is left out."""
    unwanted: Mapping[str, int] = MappingProxyType({})
    """Number of rows left out on request, by the reason."""
    usage: Usage | None = None
    """The columns that samples are made of; None for built-in samples."""
    reads_files: bool = False
    """Whether `get` reads files, so that it pays to load samples ahead."""

    @abstractmethod
    def get(self, index: int) -> Sample:
        """Loads a sample, `0 <= index < size`.

        Raises:
            DataError: The sample, or one of its images, cannot be read; the message names its place.
        """

    def outline(self, index: int) -> Sample:
        """As `get`, but with a blank image of the same size in the place of each image; see `blank_image`.

        Default: all images are loaded. Sources that can look at headers alone override it.
        """
        return self.get(index)

    def leave_out(self, indices: Sequence[int], reason: str) -> None:
        """Leaves samples out from now on, and counts them as unwanted for a reason. Later ones move up.

        Raises:
            ConfigError: The source cannot.
        """
        raise ConfigError(f"{type(self).__name__} cannot leave samples out: {reason}")

    def place(self, index: int, id: str) -> str:
        """The origin of a sample, for messages: its file and line, if it has such, and its id."""
        return f"sample {id}"


def has_images(source: Source) -> bool:
    """True if a sample has an image or a video. An endless source is taken to have some, and so is one with faults."""
    if source.size is None:
        return True
    try:
        return any(sample.images or sample.videos for sample in map(source.outline, range(source.size)))
    except DataError:  # of an image, which whoever loads it reports
        return True


class SampleOrder:
    """The order in which a source's samples are shown: a pure function of a key and a position.

    Finite sources are shuffled anew each epoch, and every sample is shown once per epoch. Endless sources show random
    samples.
    """

    def __init__(self, size: int | None, key: int) -> None:
        if size == 0:
            raise DataError("there are no samples to show: give a dataset")
        self._size = size
        self._key = key
        self._epoch = -1
        self._shuffled = np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> int:
        if self._size is None:
            return int(np.random.default_rng([self._key, position]).integers(2**62))
        epoch, place = divmod(position, self._size)
        if epoch != self._epoch:
            self._epoch = epoch
            self._shuffled = np.random.default_rng([self._key, epoch]).permutation(self._size)
        return int(self._shuffled[place])

    def chance(self, position: int) -> float:
        """A random number in [0, 1) for a position."""
        return float(np.random.default_rng([self._key, position, 1]).random())


def order_of(rng: np.random.Generator, size: int | None) -> SampleOrder:
    """The order that a generator of random numbers draws for a source of `size` samples."""
    return SampleOrder(size, key=int(rng.integers(2**62)))
