"""What an engine is to an agent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vlmenv.agents.sampling import Sampled
from vlmenv.core.rollout import Observation, Prompt
from vlmenv.core.sampling import Sampling


@dataclass(slots=True)
class Request:
    """A prompt to be completed."""

    observation: Observation
    chat: str
    """the observation in the model's chat format, one mark for each image"""
    prompt: Prompt
    """the same as the trainer's own model takes it in"""


class Engine(ABC):
    """Another program's copy of the policy, which samples faster and has to be told of each update."""

    max_length: int
    """tokens of prompt and completion together that it can take"""

    @abstractmethod
    def generate(
        self, requests: Sequence[Request], index: NDArray[np.int64], sampling: Sampling, rng: np.random.Generator
    ) -> list[Sampled]:
        """Samples a completion for each entry of `index` [N], the request of each.

        Raises:
            EngineError: The engine failed, or takes prompts in otherwise than the trainer does.
        """

    def generating(self, times: int) -> AbstractContextManager[None]:
        """Within, this process asks for completions at most so many times; those that share an engine, as many times.

        It takes part in what the others ask to the end, also where it has nothing to ask, or fails.
        """
        return nullcontext()

    @abstractmethod
    def sync(self, weights: Mapping[str, Tensor], *, vision: tuple[int, ...] | None = None) -> None:
        """Takes over weights, by their names in the published checkpoint, and forgets all that came of the old ones.

        Args:
            weights: All of them.
            vision: A fingerprint of those that turn images into features, where they are frozen: features may be kept
                while it stays the same.

        Raises:
            EngineError: Names are missing or unknown; or the engine failed.
        """

    def sleep(self) -> None:  # noqa: B027 (most hold nothing that another needs)
        """Gives up what memory it can of the trainer's GPU; not to be asked for anything but to `wake`."""

    def wake(self) -> None:  # noqa: B027
        """Takes that memory back, before weights are handed over."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of what the engine holds."""


def dealt(index: NDArray[np.int64], written: Sequence[Sequence[Sampled]]) -> list[Sampled]:
    """Deals out the completions of each request [P] to the entries of `index` [N]; fewer than asked for repeat."""
    taken = np.zeros(len(written), dtype=np.int64)
    result = []
    for i in index:
        result.append(written[i][taken[i] % len(written[i])])
        taken[i] += 1
    return result
