"""Any Gymnasium environment that takes text as a visual task, so that it can be trained like one."""

from __future__ import annotations

import hashlib
import itertools
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar, Final, NamedTuple

import gymnasium
import numpy as np
from PIL import Image as PILImage

from vlmenv.core.errors import ConfigError, DataError, RewardError, VLMEnvError, require, require_at_least
from vlmenv.core.rollout import Observation
from vlmenv.core.spaces import Image, image_fault
from vlmenv.envs.base import VisualTaskEnv
from vlmenv.envs.data.scenes import Split
from vlmenv.envs.data.source import Sample, Source
from vlmenv.envs.episodes import Reply
from vlmenv.envs.rewards.terms import RewardTerm

_SEEDS = 2**30
"""Seeds of a split; environments pass theirs on to generators that take no more than 32 bits."""
_RETURNED: Final = {
    "reset": ("observation", "info"),
    "step": ("observation", "reward", "terminated", "truncated", "info"),
}
"""What the methods of an environment return."""
_REMEMBERED: Final = 2**16
"""Turns whose digests are kept, to find an environment that does not repeat them."""


class HostedTask(VisualTaskEnv):
    """A Gymnasium environment as a visual task, whose samples are its seeds.

    The environment takes text. Its observation is text, or a mapping with `prompt` (text) and
    `images` (uint8 arrays [H, W, 3] or RGB images of Pillow, or one). Wrappers of Gymnasium's, such as
    `TransformObservation` and `TransformAction`, give it that form.

    An episode may have several steps, up to `max_turns`. For each answer the environment is reset with the seed and
    takes the episode's answers again, so the same answers must lead to the same observations.

    An environment that does not repeat itself is found by trying, or registered with `nondeterministic=True`. Then each
    episode has an environment of its own, which steps once per answer. Groups are refused, so that `group_size` is 1. A
    resumed run goes on with other starts.

    Its reward is the term `environment`, of every step; other terms may be added by `rewards`, and score the last
    answer. Training seeds are even, evaluation seeds odd.

    Args:
        env: Id of the environment, or a function that makes it.
        split: `"train"` or `"eval"`. Default: `"train"`.
        max_turns: Maximum number of answers per episode. Default: 1 if the environment repeats itself and ends after an
            empty answer; else its `max_episode_steps`, or 8.
        arguments: Arguments of `VisualTaskEnv`. Those of data sets do not apply.

    Raises:
        ConfigError: The environment does not have this form.
    """

    terms: ClassVar[Mapping[str, RewardTerm]] = {}
    default_rewards: ClassVar[Mapping[str, float]] = {"environment": 1.0}
    right: ClassVar[tuple[str, float]] = ("environment", 1.0)
    best: ClassVar[Mapping[str, float | None]] = {"environment": None}
    prompt_template = "{question}"
    needs_image = False
    knows_answers = False
    max_turns: int = 8
    turn_terms: ClassVar[Collection[str]] = ("environment",)

    def __init__(self, env: Any, split: str | None = None, max_turns: int | None = None, **arguments: Any) -> None:
        self.hosted = Hosted(env, max_turns)
        extra = {"environment": self.hosted.reward, **(arguments.pop("extra_terms", None) or {})}
        if arguments.get("dataset") is not None:
            raise ConfigError(f"{self.hosted.name} draws its own samples: give no dataset")
        super().__init__(split=split, extra_terms=extra, max_turns=self.hosted.turns, **arguments)
        self.unrepeatable = self.hosted.unrepeatable

    def builtin_source(self, split: Split) -> Source:
        return _Seeds(self.hosted, split)

    def parse(self, text: str) -> Any:
        return text

    def respond(self, sample: Sample, texts: Sequence[str]) -> Reply | None:
        return None if self.max_turns == 1 else self.hosted.reply(sample.target, texts)

    def close(self) -> None:
        """Closes the window and the environments."""
        super().close()
        self.hosted.close()

    def write_answer(self, sample: Sample) -> str:
        raise ConfigError(f"{self.hosted.name} tells no right answers, which sft would imitate: take another algorithm")


class _Played(NamedTuple):
    """What an environment gives for an answer."""

    observation: Any
    reward: Any
    ended: bool


class Hosted:
    """An environment that plays episodes, each by its number. Several threads may use it.

    If the environment repeats itself, an episode's number is its seed, and it is played anew for each answer. Otherwise
    `begin` starts an episode, which goes on while its sample exists.

    Args:
        env: See `HostedTask`.
        max_turns: See `HostedTask`.

    Attributes:
        turns: Maximum number of answers per episode.
        unrepeatable: Why an episode cannot be played again; empty if it can.
    """

    def __init__(self, env: Any, max_turns: int | None = None) -> None:
        require_at_least(1, max_turns=max_turns)
        self._made_from = env
        self._idle: list[gymnasium.Env[Any, Any]] = []
        self._lock = threading.Lock()
        self._digests: OrderedDict[bytes, bytes] = OrderedDict()
        self._numbers = itertools.count()
        self._going: weakref.WeakValueDictionary[int, _Episode] = weakref.WeakValueDictionary()
        with self._lent() as first:
            self.name = env if isinstance(env, str) else type(first.unwrapped).__name__
            spec = first.spec
            _check_takes_text(first, self.name)
        self.unrepeatable, answered = self._tried()
        if not self.unrepeatable and spec is not None and spec.nondeterministic:
            self.unrepeatable = f"{self.name} is registered with nondeterministic=True"
        limit = None if spec is None else spec.max_episode_steps
        is_short = answered.ended and not self.unrepeatable  # an end by chance tells nothing
        self.turns = max_turns or (1 if is_short else limit or HostedTask.max_turns)
        self._must_end = max_turns is None and is_short

    def _tried(self) -> tuple[str, _Played]:
        """Why the environment does not repeat itself, as far as two tries tell, and its reply to an empty answer."""
        if not _equal(self.observe(0), self.observe(0)):
            return f"{self.name} starts differently with one seed", self._replayed(0, ("",))
        first, again = self._replayed(0, ("",)), self._replayed(0, ("",))
        if self._digest(first) != self._digest(again):
            return f"{self.name} goes on differently after the same answer", first
        return "", first

    def close(self) -> None:
        """Ends all episodes that go on, and closes all environments."""
        for episode in list(self._going.values()):
            episode.give_back()
        while self._idle:
            self._idle.pop().close()

    def begin(self, seed: int) -> _Begun:
        """Starts an episode that is not played again.

        Raises:
            ConfigError: The environment fails, or its observation has another form.
        """
        env, number = self._taken(), next(self._numbers)
        episode = _Episode(env, self, self._idle)
        seen = self._reset(env, seed)
        self._going[number] = episode
        return _Begun(f"seed-{seed}", seen["images"], seen["prompt"], number, episode=episode)

    def observe(self, seed: int) -> Observation:
        """The observation after a reset with a seed.

        Raises:
            ConfigError: The environment fails, or its observation has another form.
        """
        with self._lent() as env:
            return self._reset(env, seed)

    def reward(self, text: str, number: int, earlier: Sequence[str] = ()) -> float:
        """The reward of an answer in an episode.

        Args:
            text: The answer.
            number: Number of the episode.
            earlier: The episode's answers before. Default: none.

        Raises:
            ConfigError: The environment goes on after its only answer.
            RewardError: The environment fails, or its reward is no number.
        """
        played = self._played(number, (*earlier, text))
        if self._must_end and not played.ended:
            raise ConfigError(f"{self.name} goes on after an answer, as it does not after an empty one: give max_turns")
        try:
            return float(played.reward)
        except (TypeError, ValueError, OverflowError):
            told = str(played.reward)[:80]
            raise RewardError(f"{self.name} gave the reward {told}; it must be a number") from None

    def reply(self, number: int, texts: Sequence[str]) -> Reply | None:
        """The environment's next turn after some answers in an episode; None if the episode has ended.

        Raises:
            ConfigError: The observation has another form.
            RewardError: The environment fails.
        """
        played = self._played(number, texts)
        if played.ended:
            return None
        seen = _observation(played.observation, self.name)
        return Reply(seen["prompt"], seen["images"])

    def step(self, env: gymnasium.Env[Any, Any], text: str) -> _Played:
        """Steps an environment.

        Raises:
            RewardError: The environment fails.
        """
        try:
            observation, reward, *ends, _ = _values("step", env.step(text))
            terminated, truncated = map(_truth, ends)
            return _Played(observation, reward, terminated or truncated)
        except Exception as error:
            raise RewardError(f"{self.name} failed on the answer {text[:80]!r}: {_told(error)}") from error

    def _reset(self, env: gymnasium.Env[Any, Any], seed: int) -> Observation:
        try:
            observation, _ = _values("reset", env.reset(seed=seed))
        except Exception as error:
            raise ConfigError(f"{self.name} cannot be reset with seed {seed}: {_told(error)}") from error
        return _observation(observation, self.name)

    def _played(self, number: int, texts: Sequence[str]) -> _Played:
        """The result of the last of some answers in an episode."""
        return self._going[number].played(texts) if self.unrepeatable else self._replayed(number, texts)

    def _replayed(self, seed: int, texts: Sequence[str]) -> _Played:
        """The result of the last of some answers from a seed's start.

        Raises:
            RewardError: The environment fails, or does not repeat what it did before.
        """
        with self._lent() as env:
            try:
                _values("reset", env.reset(seed=seed))
            except Exception as error:
                raise RewardError(f"{self.name} cannot be reset with seed {seed}: {_told(error)}") from error
            for turn, text in enumerate(texts):
                played = self.step(env, text)
                if turn < len(texts) - 1:
                    self._check_again(played, seed, texts[: turn + 1])
        self._remember(played, seed, texts)
        return played

    def _check_again(self, played: _Played, seed: int, texts: Sequence[str]) -> None:
        """Raises RewardError if an episode went on otherwise before, or ends where it went on."""
        known = self._digests.get(_key(seed, texts))
        if played.ended or (known is not None and known != self._digest(played)):
            raise RewardError(
                f"{self.name} does not repeat an episode of the same seed and answers, after {texts[-1][:80]!r}: "
                "register it with nondeterministic=True, and take ppo or reinforce++, with group_size 1"
            )

    def _remember(self, played: _Played, seed: int, texts: Sequence[str]) -> None:
        if not played.ended:
            self._digests[_key(seed, texts)] = self._digest(played)
            while len(self._digests) > _REMEMBERED:
                self._digests.popitem(last=False)

    def _digest(self, played: _Played) -> bytes:
        """What tells a turn of the environment from another; its reward may be random."""
        if played.ended:
            return b""
        seen = _observation(played.observation, self.name)
        digest = hashlib.blake2b(repr(seen["prompt"]).encode(), digest_size=16)
        for image in seen["images"]:
            digest.update(repr(image.shape).encode() + image.tobytes())
        return digest.digest()

    @contextmanager
    def _lent(self) -> Iterator[gymnasium.Env[Any, Any]]:
        """An environment for a while, alone, so that there is one for all replays."""
        with self._lock:
            env = self._taken()
            try:
                yield env
            finally:
                self._idle.append(env)

    def _taken(self) -> gymnasium.Env[Any, Any]:
        """An idle environment, or a new one."""
        try:
            return self._idle.pop()
        except IndexError:
            return _made(self._made_from)


def _made(source: Any) -> gymnasium.Env[Any, Any]:
    """A new environment, by its id or by the function that makes it.

    Raises:
        ConfigError: It cannot be made, or is no environment.
    """
    name = source if isinstance(source, str) else getattr(source, "__name__", repr(source))
    wanted = f"env is an id, or a function that makes an environment, not a {type(source).__name__}"
    require(isinstance(source, str) or callable(source), wanted)
    try:
        env = source() if callable(source) else gymnasium.make(source, disable_env_checker=True)
    except VLMEnvError:
        raise
    except Exception as error:
        raise ConfigError(f"{name} cannot be made: {_told(error)}") from error
    kind = type(env).__name__
    require(isinstance(env, gymnasium.Env), f"{name} makes a {kind}; give what makes one environment, a gymnasium.Env")
    return env


def _told(error: Exception) -> str:
    """An error with its kind, without which a KeyError says little."""
    return f"{type(error).__name__}: {error}"


def _check_takes_text(env: gymnasium.Env[Any, Any], name: str) -> None:
    """Raises ConfigError if the actions of an environment are no text, as far as its space tells."""
    space = getattr(env, "action_space", None)
    require(
        space is None or isinstance(deepcopy(space).sample(), str),  # a sample changes the space's generator
        f"{name} is no visual task: it takes actions of {space}, and answers are text. Wrap it in "
        "gymnasium.wrappers.TransformAction, which makes an action of a text, with a gymnasium.spaces.Text as its "
        "space, and register that",
    )


def _values(method: str, given: Any) -> tuple[Any, ...]:
    """What a method of an environment returns.

    Raises:
        TypeError: It is not what Gymnasium's environments return.
    """
    names = _RETURNED[method]
    if not isinstance(given, tuple) or len(given) != len(names):
        told = f"{len(given)} values" if isinstance(given, tuple) else f"a {type(given).__name__}"
        raise TypeError(f"{method} must return ({', '.join(names)}), not {told}")
    return given


def _truth(end: Any) -> bool:
    """Whether an episode has ended.

    Raises:
        TypeError: It is no truth value.
    """
    if np.size(end) != 1 or np.asarray(end).dtype.kind not in "biu":
        raise TypeError(f"terminated and truncated must be True or False, not {end!r}")
    return bool(end)


def _key(seed: int, texts: Sequence[str]) -> bytes:
    return hashlib.blake2b(repr((seed, *texts)).encode(), digest_size=16).digest()


class _Episode:
    """An episode that is not played again, in an environment of its own."""

    def __init__(self, env: gymnasium.Env[Any, Any], hosted: Hosted, idle: list[gymnasium.Env[Any, Any]]) -> None:
        self._env, self._hosted = env, hosted
        self.give_back = weakref.finalize(self, idle.append, env)
        """makes the environment idle, once; also when the episode is forgotten"""
        self._texts: list[str] = []
        self._results: list[_Played] = []
        self._lock = threading.Lock()

    def played(self, texts: Sequence[str]) -> _Played:
        """The result of the last of some answers; those that are new step the environment.

        Raises:
            RewardError: The environment fails, or the episode has had other answers.
        """
        with self._lock:
            known = min(len(texts), len(self._texts))
            if list(texts[:known]) != self._texts[:known] or (len(texts) > known and self._has_ended):
                raise RewardError(
                    f"{self._hosted.unrepeatable}, so this episode cannot be played again with other answers"
                )
            for text in texts[known:]:
                self._results.append(self._hosted.step(self._env, text))
                self._texts.append(text)
            if self._has_ended:
                self.give_back()
            return self._results[len(texts) - 1]

    @property
    def _has_ended(self) -> bool:
        return bool(self._results) and self._results[-1].ended


@dataclass(frozen=True, slots=True)
class _Begun(Sample):
    """A sample that goes on in an environment of its own while it exists."""

    episode: _Episode | None = None


class _Seeds(Source):
    """The samples of an environment: one for each seed. If it does not repeat itself, each is a new episode."""

    size = None

    def __init__(self, hosted: Hosted, split: Split) -> None:
        self._hosted = hosted
        self._odd = split == "eval"

    def get(self, index: int) -> Sample:
        seed = index % _SEEDS * 2 + self._odd
        try:
            if self._hosted.unrepeatable:
                return self._hosted.begin(seed)
            seen = self._hosted.observe(seed)
        except ConfigError as error:
            raise DataError(f"seed {seed}: {error}") from error
        return Sample(f"seed-{seed}", seen["images"], seen["prompt"], seed)


def _observation(given: Any, name: str) -> Observation:
    """An observation as tasks have it.

    Raises:
        ConfigError: It has another form.
    """
    if isinstance(given, str):
        return {"images": (), "prompt": given}
    if isinstance(given, Mapping) and "prompt" in given and not isinstance(given["prompt"], str):
        raise ConfigError(f"{name}: prompt is a text, not of type {type(given['prompt']).__name__}")
    if not isinstance(given, Mapping) or "prompt" not in given:
        kind = f"keys {', '.join(map(str, given))}" if isinstance(given, Mapping) else f"type {type(given).__name__}"
        raise ConfigError(
            f"{name} is no visual task: its observation, of {kind}, is neither text nor a mapping with `prompt` and "
            "`images`. Wrap it in gymnasium.wrappers.TransformObservation, which gives it this form, and register that"
        )
    if given.get("turns"):
        raise ConfigError(
            f"{name} shows earlier turns, as tasks of vlmenv do: what it shows is to be its next turn alone. For a "
            "task with other rewards register a subclass by register_task"
        )
    if unused := sorted(map(str, set(given) - {"prompt", "images", "turns"})):
        warnings.warn(
            f"{name}: models see prompt and images alone, not {', '.join(unused)}", RuntimeWarning, stacklevel=2
        )
    return {"images": _images(given.get("images", ()), name), "prompt": given["prompt"]}


def _images(given: Any, name: str) -> tuple[Image, ...]:
    """Copies of an observation's images: an environment may write the next ones into the same arrays.

    Raises:
        ConfigError: They have another form.
    """
    if not isinstance(given, np.ndarray | PILImage.Image | list | tuple):
        raise ConfigError(f"{name}: images is one array or a tuple of arrays, not {type(given).__name__}")
    if isinstance(given, PILImage.Image) or (
        isinstance(given, np.ndarray) and given.ndim != 4 and given.dtype != object
    ):
        given = (given,)
    images = tuple(map(np.array, given))
    for image in images:
        require(not (fault := image_fault(image)), f"{name}: {fault}")
    return images


def _equal(one: Observation, other: Observation) -> bool:
    same = len(one["images"]) == len(other["images"]) and one["prompt"] == other["prompt"]
    return same and all(map(np.array_equal, one["images"], other["images"]))
