"""Episodes: a task's answers to its samples, of one turn or of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from vlmenv.core.errors import ConfigError
from vlmenv.core.rollout import IMAGE_MARK, Observation, Turn
from vlmenv.core.spaces import Image
from vlmenv.envs.data.source import Sample
from vlmenv.envs.scoring import Score

if TYPE_CHECKING:
    from vlmenv.envs.base import VisualTaskEnv


@dataclass(frozen=True, slots=True)
class Reply:
    """The environment's next turn, after an answer that does not end the episode."""

    text: str
    """Each `<image>` mark is the place of an image. Without any mark the images precede the text"""
    images: tuple[Image, ...] = ()
    """uint8 arrays [H, W, 3]"""


@dataclass(slots=True)
class Episode:
    """An episode of a task: its conversation so far and, once it has ended, its score."""

    sample: Sample
    observation: Observation
    """the conversation so far, whose prompt is answered next; after the end, the one that was answered last"""
    texts: list[str] = field(default_factory=list)
    """the answers so far"""
    score: Score | None = None
    """of all answers so far; None before the first"""
    has_ended: bool = False
    truncated: bool = False
    """True if a budget ended it, and not its last answer"""

    @property
    def terms(self) -> dict[str, float]:
        """The reward terms of all answers so far, unweighted; empty before the first."""
        return {} if self.score is None else dict(self.score.terms)


def advance(
    task: VisualTaskEnv, episodes: Sequence[Episode], texts: Sequence[str], *, last: bool = False
) -> list[float]:
    """Gives each episode its next answer.

    Args:
        task: The task.
        episodes: N episodes that have not ended.
        texts: [N].
        last: If true, these answers end their episodes, whatever the task would reply. Default: False.

    Returns:
        The rewards of these answers, [N].

    Raises:
        TypeError: A text is no string.
        RewardError: A term failed, or its value is not finite.
    """
    replies = [None if last else _replied(task, *pair) for pair in zip(episodes, texts, strict=True)]
    rewards = [0.0] * len(episodes)
    for ends in (True, False):
        rows = [i for i, reply in enumerate(replies) if (reply is None) == ends]
        samples, earlier = [episodes[i].sample for i in rows], [tuple(episodes[i].texts) for i in rows]
        scores = task.score_batch([texts[i] for i in rows], samples, final=ends, earlier=earlier) if rows else []
        for i, score in zip(rows, scores, strict=True):
            rewards[i] = score.reward
            episodes[i].score = score if episodes[i].score is None else added(episodes[i].score, score)
    for episode, text, reply in zip(episodes, texts, replies, strict=True):
        _settle(episode, text, reply)
    return rewards


def follow(task: VisualTaskEnv, episode: Episode, text: str) -> bool:
    """Gives an episode its next answer without scoring it. False: this answer ends it.

    Raises:
        TypeError: The text is no string.
    """
    _settle(episode, text, _replied(task, episode, text))
    return not episode.has_ended


def _settle(episode: Episode, text: str, reply: Reply | None) -> None:
    """Adds an answer, and the environment's reply to it, to an episode."""
    episode.texts.append(text)
    episode.has_ended = reply is None
    if reply is not None:
        episode.observation = conversation(episode.observation, text, reply)


def _replied(task: VisualTaskEnv, episode: Episode, text: str) -> Reply | None:
    """The environment's turn after an answer; None if the episode ends, by the task or by a budget."""
    if not isinstance(text, str):
        raise TypeError(f"an action is a string, not {type(text).__name__}")
    reply = task.respond(episode.sample, (*episode.texts, text))
    if reply is None:
        return None
    images = len(episode.observation["images"]) + len(reply.images)
    episode.truncated = len(episode.texts) + 1 >= task.max_turns or images > task.max_images
    return None if episode.truncated else reply


def added(before: Score | None, after: Score) -> Score:
    """The score of an episode with one more answer: sums of rewards, terms and seconds; the last prediction."""
    if before is None:
        return after
    terms, seconds = dict(before.terms), dict(before.seconds)
    for total, more in ((terms, after.terms), (seconds, after.seconds)):
        for name, value in more.items():
            total[name] = total.get(name, 0.0) + value
    return Score(before.reward + after.reward, terms, after.prediction, seconds, before.weights | after.weights)


def conversation(before: Observation, text: str, reply: Reply) -> Observation:
    """The observation after an answer and the reply to it.

    Raises:
        ConfigError: The reply's marks and images differ in number.
    """
    told = reply.text if reply.images else _unmarked(reply.text)
    if reply.images and IMAGE_MARK not in told:
        told = IMAGE_MARK * len(reply.images) + told
    if told.count(IMAGE_MARK) != len(reply.images):
        raise ConfigError(
            f"the turn after an answer has {told.count(IMAGE_MARK)} {IMAGE_MARK} marks for {len(reply.images)} images"
        )
    asked: Turn = {"role": "user", "text": _marked(before)}
    answered: Turn = {"role": "assistant", "text": text}
    turns = before["turns"]
    if not before["images"]:
        turns = tuple(Turn(role=turn["role"], text=_unmarked(turn["text"])) for turn in turns)
    return {"images": (*before["images"], *reply.images), "prompt": told, "turns": (*turns, asked, answered)}


def copied(observation: Observation) -> Observation:
    """A copy, which may be written to."""
    turns = tuple(Turn(role=turn["role"], text=turn["text"]) for turn in observation["turns"])
    copy: Observation = {
        "images": tuple(map(np.copy, observation["images"])),
        "prompt": observation["prompt"],
        "turns": turns,
    }
    if "videos" in observation:
        copy["videos"] = tuple(video.copy() for video in observation["videos"])
    return copy


def _marked(observation: Observation) -> str:
    """An observation's prompt with a mark for each image that precedes it, and none for what is no image."""
    images, prompt = len(observation["images"]), observation["prompt"]
    if not images:
        return _unmarked(prompt)
    texts = [prompt, *(turn["text"] for turn in observation["turns"] if turn["role"] != "assistant")]
    return prompt if any(IMAGE_MARK in text for text in texts) else IMAGE_MARK * images + prompt


def _unmarked(text: str) -> str:
    """A text of a turn without images, in which a later image would make a mark of "<image>"."""
    return text.replace(IMAGE_MARK, "image")
