"""Built-in clips: coloured shapes that come, move and go, with exact times and questions of exact truth.

The training and the evaluation stream are endless and disjoint, by a hash of what a clip shows and asks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
from PIL import Image as PILImage

from vlmenv.core.answers import Answer
from vlmenv.core.spaces import Image
from vlmenv.core.video import FrameRule, Video
from vlmenv.envs.data.questions import offer
from vlmenv.envs.data.scenes import (
    COLOURS,
    SHAPES,
    SIDE,
    Drawn,
    Split,
    falls_to_eval,
    mask_of,
    sample_background,
    sample_tint,
)
from vlmenv.envs.data.source import Sample
from vlmenv.envs.rewards.spans import Span

LENGTHS: Final = (6.0, 8.0, 12.0)
"""Lengths of clips in seconds."""
WAYS: Final = {"to the left": (-1, 0), "to the right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Directions in x and y, and how answers say them."""
EVENTS: Final = ("When is {} visible?", "During which time does the video show {}?")

_CELL = SIDE // 2
_STEP = 0.5  # seconds; shapes come and go at multiples of it
_LEAST = 1.5  # seconds that a shape is visible
_TRAVEL = 24  # pixels


class Actor(NamedTuple):
    """A shape that moves through a quarter of the picture while it is visible."""

    colour: str
    kind: str
    side: int
    """width and height in pixels"""
    cell: int
    """its quarter: 0 and 1 above, 2 and 3 below"""
    way: str
    """one of `WAYS`"""
    span: Span
    """when it is visible; the end is excluded"""

    def __str__(self) -> str:
        return f"the {self.colour} {self.kind}"

    def place(self, second: float) -> tuple[int, int]:
        """Its upper left corner at some time within its span."""
        done = (second - self.span.start) / (self.span.end - self.span.start) - 0.5
        x, y = (round((_CELL - self.side) / 2 + done * _TRAVEL * part) for part in WAYS[self.way])
        return x + self.cell % 2 * _CELL, y + self.cell // 2 * _CELL


class Clip(NamedTuple):
    """What a clip shows."""

    duration: float
    actors: tuple[Actor, ...]


class Clips(Drawn):
    """Clips of a stream, whose frames are drawn as the rule chooses them; endless."""

    def __init__(self, split: Split, rule: FrameRule) -> None:
        super().__init__(split)
        self.rule = rule

    def _drawn(self, clip: Clip, rng: np.random.Generator) -> Video:
        """The clip has as many frames per second as the rule asks for."""
        total = max(1, round(clip.duration * self.rule.fps))
        seconds = self.rule.choose(total, clip.duration) * clip.duration / total
        colours = sample_background(rng), [sample_tint(actor.colour, rng) for actor in clip.actors]
        size = self.rule.size(SIDE, SIDE)
        frames = np.stack([_frame(clip, second, *colours, size) for second in seconds.tolist()])
        return Video(frames, seconds, clip.duration)


class TemporalClips(Clips):
    """Clips, each with the question when a shape is visible."""

    stream = 6

    def get(self, index: int) -> Sample:
        rng = self.rng(index)
        while True:
            clip = _sample_clip(rng, (2, 4))
            target = clip.actors[rng.integers(len(clip.actors))]
            question = EVENTS[rng.integers(len(EVENTS))].format(target)
            short = target.span.end - target.span.start <= clip.duration / 2
            if short and falls_to_eval((clip, question)) == (self.split == "eval"):
                break
        video, said = self._drawn(clip, rng), f"It comes at {target.span.start:g} s and goes at {target.span.end:g} s."
        return Sample(f"moment-{self.split}-{index}", (), question, target.span, said, videos=(video,))


class ClipQuestions(Clips):
    """Clips, each with one question: a direction, an order, a number, or whether one comes before another."""

    stream = 7

    def get(self, index: int) -> Sample:
        rng = self.rng(index)
        subject = list(_ASK)[rng.integers(len(_ASK))]
        while True:
            clip = _sample_clip(rng, (2, 4))
            if len({actor.span.start for actor in clip.actors}) < len(clip.actors):
                continue  # each comes at a time of its own
            text, answer, said = _ASK[subject](clip, rng)
            if falls_to_eval((clip, text)) == (self.split == "eval"):
                break
        name = f"clip-{self.split}-{index}"
        return Sample(name, (), text, answer, said, subject, videos=(self._drawn(clip, rng),))


def _sample_clip(rng: np.random.Generator, counts: tuple[int, int]) -> Clip:
    """Some actors of different looks, each in a quarter of its own."""
    duration = LENGTHS[rng.integers(len(LENGTHS))]
    count = int(rng.integers(counts[0], counts[1] + 1))
    looks = rng.permutation(len(COLOURS) * len(SHAPES))[:count].tolist()
    cells = rng.permutation(4)[:count].tolist()
    actors = tuple(_sample_actor(rng, look, cell, duration) for look, cell in zip(looks, cells, strict=True))
    return Clip(duration, actors)


def _sample_actor(rng: np.random.Generator, look: int, cell: int, duration: float) -> Actor:
    colour, kind = list(COLOURS)[look // len(SHAPES)], SHAPES[look % len(SHAPES)]
    steps, least = round(duration / _STEP), round(_LEAST / _STEP)
    start = int(rng.integers(0, steps - least + 1))
    end = int(rng.integers(start + least, steps + 1))
    way = list(WAYS)[rng.integers(len(WAYS))]
    return Actor(colour, kind, int(rng.integers(16, 23)), cell, way, Span(start * _STEP, end * _STEP))


def _frame(
    clip: Clip, second: float, background: tuple[int, ...], tints: list[tuple[int, ...]], size: tuple[int, int]
) -> Image:
    picture = PILImage.new("RGB", (SIDE, SIDE), background)
    for actor, tint in zip(clip.actors, tints, strict=True):
        if actor.span.start <= second < actor.span.end:
            placed = ("small", actor.colour, actor.kind, *actor.place(second), actor.side, actor.side)
            picture.paste(tint, mask=mask_of(placed))
    return np.asarray(picture if picture.size == size else picture.resize(size, PILImage.Resampling.BICUBIC))


_Asked = tuple[str, Answer, str]
"""A question, its answer, and the reasoning."""


def _ask_direction(clip: Clip, rng: np.random.Generator) -> _Asked:
    actor = clip.actors[rng.integers(len(clip.actors))]
    wrong = [way for way in WAYS if way != actor.way]
    text, answer = offer(f"In which direction does {actor} move?", actor.way, wrong, rng)
    return text, answer, f"It moves {actor.way}."


def _ask_first(clip: Clip, rng: np.random.Generator) -> _Asked:
    """The wrong choices are the other shapes, and shapes that the clip does not show."""
    first, *others = sorted(clip.actors, key=lambda actor: actor.span.start)
    shown = {(actor.colour, actor.kind) for actor in clip.actors}
    absent = [f"the {colour} {kind}" for colour in COLOURS for kind in SHAPES if (colour, kind) not in shown]
    wrong = [*map(str, others), *(absent[i] for i in rng.permutation(len(absent)))][:3]
    text, answer = offer("Which of these is the first to be visible?", str(first), wrong, rng)
    return text, answer, f"The first is {first}, at {first.span.start:g} s."


def _ask_number(clip: Clip, rng: np.random.Generator) -> _Asked:
    number = len(clip.actors)
    shown = ", ".join(map(str, clip.actors))
    return "How many shapes does the video show in all?", Answer(str(number), "numeric"), f"There is {shown}."


def _ask_before(clip: Clip, rng: np.random.Generator) -> _Asked:
    one, other = (clip.actors[i] for i in rng.permutation(len(clip.actors))[:2])
    answer = Answer("yes" if one.span.start < other.span.start else "no", "yes_no")
    said = f"They come at {one.span.start:g} s and {other.span.start:g} s."
    return f"Is {one} visible before {other} is?", answer, said


_ASK: Final[dict[str, Callable[[Clip, np.random.Generator], _Asked]]] = {
    "direction": _ask_direction,
    "first": _ask_first,
    "number": _ask_number,
    "before": _ask_before,
}
