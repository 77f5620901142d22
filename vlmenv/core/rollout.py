"""Types that agents take and return: observations, prompts, completions, rollouts.

Shapes: P distinct prompts, N completions, T tokens of a prompt, L tokens of a completion.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NotRequired, TypedDict, get_args

import numpy as np
from numpy.typing import NDArray

from vlmenv.core.spaces import Image
from vlmenv.core.video import Video

IMAGE_MARK: Final = "<image>"
"""Mark for the place of an image in a prompt; `VIDEO_MARK` is that of a video."""

Role = Literal["system", "user", "assistant"]
ROLES: Final[tuple[Role, ...]] = get_args(Role)


class Turn(TypedDict):
    """One turn of a conversation that precedes the prompt.

    Each `IMAGE_MARK` in a system or user turn is the place of an image. In an assistant turn it is plain text, so that
    no completion moves an image.
    """

    role: Role
    text: str


class Observation(TypedDict):
    """The observation of one environment: a prompt, its images, and the turns before it.

    Each `IMAGE_MARK` in the prompt, or in a system or user turn, is the place of an image, in reading order.
    Without any mark the images precede the text of the prompt. There are as many marks as images, or none; an
    observation without images has no marks, and `<image>` in it is plain text.
    """

    images: tuple[Image, ...]
    """uint8 arrays [H, W, 3], of all turns in reading order; empty for text alone"""
    prompt: str
    """the last user turn, which the agent answers"""
    turns: NotRequired[tuple[Turn, ...]]
    """the turns before the prompt, the system turn first; Default: none"""
    videos: NotRequired[tuple[Video, ...]]
    """videos of all turns in reading order, with `VIDEO_MARK` for their places as `IMAGE_MARK` for those of images.
    Without any mark they follow the images before the prompt. Default: none"""


def count_marks(prompt: str, turns: Sequence[Turn] = (), mark: str = IMAGE_MARK) -> int:
    """Number of places of images, or of what else has such marks, in a prompt and the turns before it."""
    texts = [prompt, *(turn["text"] for turn in turns if turn["role"] != "assistant")]
    return sum(text.count(mark) for text in texts)


def split_marks(text: str, mark: str = IMAGE_MARK) -> tuple[int, str]:
    """Number of marks at the beginning of a text, and the stripped rest of it."""
    marks, rest = 0, text.strip()
    while rest.startswith(mark):
        marks, rest = marks + 1, rest.removeprefix(mark).strip()
    return marks, rest


def named_images(text: str, numbers: Iterator[int] | None = None) -> str:
    """A text with `image 2` in the place of a second image; images at its beginning are counted and left out.

    Args:
        text: Any text. Without marks it is returned unchanged.
        numbers: The numbers of the images, taken in turn. Default: from 1.
    """
    if IMAGE_MARK not in text:
        return text
    numbers = itertools.count(1) if numbers is None else numbers
    leading, rest = split_marks(text)
    for _ in range(leading):
        next(numbers)
    first, *others = rest.split(IMAGE_MARK)
    return first + "".join(f"image {next(numbers)}{other}" for other in others)


def told_turns(observation: Observation) -> dict[str, Any]:
    """The turns before the prompt, for a record of it; empty if there are none."""
    turns = observation.get("turns", ())
    return {"turns": list(turns)} if turns else {}


Observations = Sequence[Observation] | Mapping[str, Any]
"""A sequence of observations, or the batched one of a vector environment."""

FinishReason = Literal["stop", "length"]

Turns = Sequence[Observation | None]
"""By row, the conversation so far, whose prompt is the environment's next turn; None: the episode has ended."""

Rows = slice | NDArray[np.int64]
"""Rows of a batch."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class Prompt:
    """An encoded observation. Prompts compare by identity, so that caches can hold weak references to them."""

    input_ids: NDArray[np.int64]
    """[T], with one pad token per image feature"""
    position_ids: NDArray[np.int64]
    """[axes, T]; three axes (time, height, width) under M-RoPE, else one"""
    images: Mapping[str, Any]
    """inputs of the vision tower for images and videos, by the model's own argument names; prompts are joined along the
    first axis"""
    marked_ids: NDArray[np.int64] | None = None
    """the same tokens with one mark in the place of each image and video, as engines take them; None: as they are"""


@dataclass(slots=True, eq=False, weakref_slot=True)
class Completion:
    """The tokens of an episode after its prompt.

    In an episode of one step a policy generated all of them. In an episode of several turns, tokens of the environment
    stand between those of the policy. Only the policy's are learnt from. Like prompts, completions compare by identity.
    """

    text: str
    """decoded tokens of the last turn, without control tokens: the action to step the environment with"""
    token_ids: NDArray[np.int64]
    """[L], as they were sampled, including the end token if one was sampled"""
    logprobs: NDArray[np.float32]
    """[L], of the distribution that was sampled from; 0 at the environment's tokens"""
    finish_reason: FinishReason
    """`length` if the limit cut the last turn off before an end token, or left no room for it"""
    written: NDArray[np.bool_] | None = None
    """[L], True at the policy's tokens; None: all are"""
    position_ids: NDArray[np.int64] | None = None
    """[axes, L]; None: they count on from the prompt"""
    images: Mapping[str, Any] = field(default_factory=dict)
    """inputs of the vision tower for the environment's images, as those of `Prompt`"""
    marked_ids: NDArray[np.int64] | None = None
    """as that of `Prompt`"""

    @property
    def written_ids(self) -> NDArray[np.int64]:
        """The policy's tokens."""
        return self.token_ids if self.written is None else self.token_ids[self.written]


Pictured = Prompt | Completion
"""What holds tokens and the images among them."""


def marked_ids(parts: Sequence[Pictured]) -> NDArray[np.int64] | None:
    """The `marked_ids` of several parts in a row."""
    if all(one.marked_ids is None for one in parts):
        return None
    own = [one.input_ids if isinstance(one, Prompt) else one.token_ids for one in parts]
    marked = [one.marked_ids for one in parts]
    return np.concatenate([ids if marks is None else marks for ids, marks in zip(own, marked, strict=True)])


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
    """sampling temperature; 0 means greedy"""
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
        """[N], the completions' last texts: the actions to step the environments with."""
        return [completion.text for completion in self.completions]


def unbatch(observations: Observations) -> list[Observation]:
    """Lists the observations of a batch, in either of its two forms."""
    if not isinstance(observations, Mapping):
        return list(observations)
    if isinstance(observations["prompt"], str):
        raise TypeError("a single observation was given where a batch is wanted: pass [observation]")
    prompts = observations["prompt"]
    counts = {name: len(observations[name]) for name in Observation.__annotations__ if name in observations}
    if len(set(counts.values())) > 1:
        raise ValueError(f"the parts of a batch of observations differ in length: {counts}")
    rows = zip(observations["images"], prompts, observations.get("turns", [()] * len(prompts)), strict=True)
    listed: list[Observation] = [
        {"images": tuple(images), "prompt": prompt, "turns": tuple(turns)} for images, prompt, turns in rows
    ]
    if "videos" in observations:
        for one, videos in zip(listed, observations["videos"], strict=True):
            one["videos"] = tuple(videos)
    return listed


def next_turns(observations: Observations, ended: NDArray[np.bool_]) -> list[Observation | None]:
    """The observations of the episodes that have not ended; None for the others."""
    return [None if over else one for one, over in zip(unbatch(observations), ended, strict=True)]


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
        and a.get("turns", ()) == b.get("turns", ())
        and len(a["images"]) == len(b["images"])
        and all(x is y or np.array_equal(x, y) for x, y in zip(a["images"], b["images"], strict=True))
        and a.get("videos", ()) == b.get("videos", ())
    )
