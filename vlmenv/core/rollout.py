"""What an agent sees and what it hands back: observations, prompts, completions, rollouts.

Shapes: P distinct prompts, N completions, T tokens of a prompt, L tokens of a completion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from vlmenv.core.spaces import Image


class Observation(TypedDict):
    """What one environment shows."""

    images: tuple[Image, ...]
    """uint8 arrays [H, W, 3]; empty for a text-only prompt."""
    prompt: str


Observations = Sequence[Observation] | Mapping[str, Any]
"""A sequence of observations, or the batched one of a vector environment."""

FinishReason = Literal["stop", "length"]

Rows = slice | NDArray[np.int64]
"""Which rows of a batch."""


@dataclass(slots=True)
class Prompt:
    """An observation as a model takes it in."""

    input_ids: NDArray[np.int64]
    """[T], with one pad token per image feature"""
    position_ids: NDArray[np.int64]
    """[axes, T]; three axes (time, height, width) under M-RoPE, else one"""
    images: Mapping[str, Any]
    """what the vision tower wants, by the model's own argument names; first axis joins over prompts"""
    features: tuple[Any, Any] | None = None
    """a frozen vision tower, and what it saw in the images; filled in by whoever runs it first"""


@dataclass(slots=True)
class Completion:
    """What a policy wrote after a prompt."""

    text: str
    """decoded, without control tokens"""
    token_ids: NDArray[np.int64]
    """[L], the end token included where one was sampled"""
    logprobs: NDArray[np.float32]
    """[L], of the distribution that was sampled from"""
    finish_reason: FinishReason
    """`length` where the limit cut the completion off before an end token"""


@dataclass(slots=True)
class Rollout:
    """N completions of P distinct prompts, in the order of the environments."""

    prompts: list[Prompt]
    """[P]"""
    prompt_index: NDArray[np.int64]
    """[N], the prompt of each completion"""
    completions: list[Completion]
    """[N]"""
    temperature: float
    """at which the completions were sampled; 0 means greedy"""
    full_distribution: bool = True
    """True if `logprobs` are of the full distribution at this temperature; false after top-k or top-p"""
    from_trainer: bool = True
    """True if the trainer's own module sampled them; false for an engine, with older or less precise weights"""

    def __len__(self) -> int:
        return len(self.completions)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> Rollout:
        """The completions of `rows`, a slice or indices, with only the prompts that they need."""
        used, index = np.unique(self.prompt_index[rows], return_inverse=True)
        prompts = [self.prompts[i] for i in used]
        numbers = range(len(self))[rows] if isinstance(rows, slice) else rows
        completions = [self.completions[i] for i in numbers]
        return Rollout(
            prompts, index.astype(np.int64), completions, self.temperature, self.full_distribution, self.from_trainer
        )

    @classmethod
    def joined(cls, parts: Sequence[Rollout]) -> Rollout:
        """The completions of several rollouts, one after the other."""
        starts = np.cumsum([0, *(len(part.prompts) for part in parts)])
        index = [part.prompt_index + start for part, start in zip(parts, starts, strict=False)]
        prompts = [prompt for part in parts for prompt in part.prompts]
        completions = [completion for part in parts for completion in part.completions]
        first = parts[0]
        return cls(
            prompts, np.concatenate(index), completions, first.temperature, first.full_distribution, first.from_trainer
        )

    @property
    def texts(self) -> list[str]:
        """[N], the completions' texts: the actions to step the environments with."""
        return [completion.text for completion in self.completions]


def unbatch(observations: Observations) -> list[Observation]:
    """Lists the observations of a batch, whichever of the two forms it has."""
    if not isinstance(observations, Mapping):
        return list(observations)
    if isinstance(observations["prompt"], str):
        raise TypeError("a single observation was given where a batch is wanted: pass [observation]")
    pairs = zip(observations["images"], observations["prompt"], strict=True)
    return [cast(Observation, {"images": tuple(images), "prompt": prompt}) for images, prompt in pairs]


def group_neighbours(observations: Sequence[Observation]) -> tuple[list[int], NDArray[np.int64]]:
    """Finds the runs of neighbouring observations that are copies of one another.

    Returns:
        The position of each run's first observation [P], and each observation's run [N].
    """
    firsts: list[int] = []
    index = np.empty(len(observations), dtype=np.int64)
    for i, observation in enumerate(observations):
        if not firsts or not _same(observations[firsts[-1]], observation):
            firsts.append(i)
        index[i] = len(firsts) - 1
    return firsts, index


def _same(a: Observation, b: Observation) -> bool:
    return (
        a["prompt"] == b["prompt"]
        and len(a["images"]) == len(b["images"])
        and all(x is y or np.array_equal(x, y) for x, y in zip(a["images"], b["images"], strict=True))
    )
