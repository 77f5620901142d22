"""Samples, where they come from, and the order in which they are shown."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from vlmenv.core.errors import DataError
from vlmenv.core.rollout import IMAGE_MARK, Turn
from vlmenv.core.spaces import Image
from vlmenv.envs.data.usage import Usage


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of a task, with its images loaded.

    `<image>` marks in the question and in the system and user turns are the places of the images, in reading
    order: as many marks as images, or none, and then the images precede the prompt. `rows.placed` checks this, and
    drops marks that only begin a question, since such images precede the prompt anyway.
    """

    id: str
    images: tuple[Image, ...]
    """uint8 arrays [H, W, 3], of all turns in reading order"""
    question: str
    target: Any
    """the truth; coordinates are pixels of the original image"""
    rationale: str = ""
    """what a reader might think on the way to the answer, where that is known"""
    subject: str = ""
    """what the question is about, for accuracy by subject; empty where that is not told"""
    term: str | None = None
    """the reward term that this row asks for in place of the task's first; None for none"""
    response: str = ""
    """a completion to imitate, where the row has one with its reasoning"""
    turns: tuple[Turn, ...] = ()
    """earlier turns, such as few-shot examples, as `{"role": "user", "text": "What is <image>?"}`; the row's own
    system turn is the first of them, and takes the place of the task's `system_prompt`"""

    @property
    def asked_images(self) -> tuple[Image, ...]:
        """The images that the question is about: its own, or those of the last turn that has any."""
        texts = [turn["text"] for turn in self.turns if turn["role"] != "assistant"]
        marks = [text.count(IMAGE_MARK) for text in (*texts, self.question)]
        return self.images[-next((count for count in reversed(marks) if count), len(self.images)) :]


class Source(ABC):
    """Samples by index. `get` may be called from several threads at once."""

    size: int | None
    """Number of samples; None for an endless stream."""
    faults: Sequence[str] = ()
    """Of each row that is broken and left out, where it is and what is wrong."""
    unwanted: Mapping[str, int] = MappingProxyType({})
    """How many rows were left out on request, by the reason."""
    usage: Usage | None = None
    """Which columns the rows are made of; None for built-in samples."""

    @abstractmethod
    def get(self, index: int) -> Sample:
        """Loads a sample, `0 <= index < size`.

        Raises:
            DataError: The sample, or one of its images, cannot be read; the message names its place.
        """

    def place(self, index: int, id: str) -> str:
        """Where a sample comes from, for messages: its file and line, if it has such, and its id."""
        return f"sample {id}"


class SampleOrder:
    """The order in which a source's samples are shown: a pure function of a key and a position.

    Finite sources are shuffled anew each epoch, and every sample is shown once an epoch; of endless
    ones, random samples are shown.
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
        """A number from 0 to below 1, drawn for a position."""
        return float(np.random.default_rng([self._key, position, 1]).random())
