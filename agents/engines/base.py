"""The base class of engines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vlmenv.agents.sampling import Sampled
from vlmenv.core.rollout import Prompt
from vlmenv.core.sampling import Sampling
from vlmenv.core.spaces import Image
from vlmenv.core.video import Video


@dataclass(slots=True)
class Request:
    """A conversation to complete: a prompt, or an episode of several turns so far."""

    prompt: Prompt
    """the conversation as the trainer encodes it, with its earlier answers as they were sampled"""
    images: tuple[Image, ...]
    """its images, uint8 arrays [H, W, 3]"""
    videos: tuple[Video, ...] = ()
    """its videos, with frames at the size that they were read at"""

    @property
    def token_ids(self) -> list[int]:
        """Its tokens, with one mark in the place of each image and video."""
        marked = self.prompt.marked_ids
        ids: list[int] = (self.prompt.input_ids if marked is None else marked).tolist()
        return ids


class Engine(ABC):
    """A copy of the policy in another program, which samples faster and needs each update."""

    max_length: int
    """length limit of prompt and completion together, in tokens"""
    max_images: int | None = None
    """most images of a conversation; None: no limit"""
    max_videos: int = 0
    """most videos of a prompt"""

    @abstractmethod
    def generate(
        self, requests: Sequence[Request], index: NDArray[np.int64], sampling: Sampling, rng: np.random.Generator
    ) -> list[Sampled]:
        """Samples completions.

        Args:
            requests: P prompts or episodes so far.
            index: int64 [N], the request of each completion.
            sampling: Sampling options.
            rng: Random generator of the requests' seeds.

        Returns:
            [N].

        Raises:
            EngineError: The engine failed, or encodes a prompt differently from the trainer.
        """

    def generating(self, times: int) -> AbstractContextManager[None]:
        """Announces at most `times` calls of `generate` in the block, the same number on ranks that share an engine.

        At the end of the block, also after an error, this rank takes part in the remaining calls of the others.
        """
        return nullcontext()

    @abstractmethod
    def sync(self, weights: Mapping[str, Tensor], *, vision: tuple[int, ...] | None = None) -> None:
        """Loads new weights, and empties all caches of the old weights.

        Args:
            weights: All weights, by their names in the published checkpoint.
            vision: Fingerprint of the weights between images and features. Cached features stay valid while it is
                unchanged. None: these weights are trained, so features must be recomputed.

        Raises:
            EngineError: Names are missing or unknown; or the engine failed.
        """

    def sleep(self) -> None:  # noqa: B027 (engines without memory on the trainer's GPU)
        """Frees memory of the trainer's GPU. Until `wake` the engine must not be used."""

    def wake(self) -> None:  # noqa: B027
        """Allocates that memory again. Call it before `sync`."""

    def forget_images(self) -> None:  # noqa: B027 (engines that keep nothing)
        """Drops cached features of images at the next `sync`, though the vision tower is the same."""

    @abstractmethod
    def close(self) -> None:
        """Frees all resources."""


def assign_completions(index: NDArray[np.int64], written: Sequence[Sequence[Sampled]]) -> list[Sampled]:
    """Assigns completions to rows.

    Args:
        index: int64 [N], the request of each row.
        written: [P], the completions of each request. If there are too few, they repeat.

    Returns:
        [N].
    """
    taken = np.zeros(len(written), dtype=np.int64)
    result = []
    for i in index:
        result.append(written[i][taken[i] % len(written[i])])
        taken[i] += 1
    return result
