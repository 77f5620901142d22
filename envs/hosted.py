"""Any Gymnasium environment that takes text as a visual task, so that it can be trained like one."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import gymnasium
import numpy as np

from vlmenv.core.errors import ConfigError, DataError, RewardError
from vlmenv.core.rollout import Observation
from vlmenv.core.spaces import Image
from vlmenv.envs.base import VisualTaskEnv
from vlmenv.envs.data.scenes import Split
from vlmenv.envs.data.source import Sample, Source
from vlmenv.envs.episodes import Reply
from vlmenv.envs.rewards.terms import RewardTerm

_SEEDS = 2**30
"""Seeds of a split; environments pass theirs on to generators that take no more than 32 bits."""


class HostedTask(VisualTaskEnv):
    """A Gymnasium environment as a visual task, whose samples are its seeds.

    The environment takes text. Its observation is text, or a mapping with `prompt` (text) and
    `images` (uint8 arrays [H, W, 3], or one). A wrapper of Gymnasium's, such as `TransformObservation`, gives it that
    form. Groups need the same start G times: the same seed must give the same observation.

    An episode may have several steps, up to `max_turns`. For each answer the environment is reset with the seed and
    takes the episode's answers again, so the same answers must lead to the same observations and rewards.

    Its reward is the term `environment`, of every step; other terms may be added by `rewards`, and score the last
    answer. Training seeds are even, evaluation seeds odd.

    Args:
        env: Id of the environment, or a function that makes it.
        split: `"train"` or `"eval"`. Default: `"train"`.
        max_turns: Maximum number of answers per episode. Default: 1 if the environment ends after an empty answer;
            else its `max_episode_steps`, or 8.
        arguments: Arguments of `VisualTaskEnv`. Those of data sets do not apply.

    Raises:
        ConfigError: The environment does not have this form, or starts differently with one seed.
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

    def builtin_source(self, split: Split) -> Source:
        return _Seeds(self.hosted, split)

    def parse(self, text: str) -> Any:
        return text

    def respond(self, sample: Sample, texts: Sequence[str]) -> Reply | None:
        return None if self.max_turns == 1 else self.hosted.reply(sample.target, texts)

    def close(self) -> None:
        """Closes the window and the environment."""
        super().close()
        self.hosted.env.close()

    def write_answer(self, sample: Sample) -> str:
        raise ConfigError(f"{self.hosted.name} tells no right answers, which sft would imitate: take another algorithm")


class Hosted:
    """An environment that is started anew for each sample and each answer. Several threads may use it.

    Args:
        env: See `HostedTask`.
        max_turns: See `HostedTask`.

    Attributes:
        turns: Maximum number of answers per episode.
    """

    def __init__(self, env: Any, max_turns: int | None = None) -> None:
        self.env: gymnasium.Env[Any, Any] = env() if callable(env) else gymnasium.make(env, disable_env_checker=True)
        self.name = env if isinstance(env, str) else type(self.env.unwrapped).__name__
        self._lock = threading.Lock()
        first, again = self.observe(0), self.observe(0)
        if not _equal(first, again):
            raise ConfigError(
                f"{self.name} starts differently with one seed, so no group of answers could be compared: draw its "
                "samples from self.np_random alone, after super().reset(seed=seed)"
            )
        _, _, ended = self._played(0, ("",))
        limit = None if self.env.spec is None else self.env.spec.max_episode_steps
        self.turns = max_turns or (1 if ended else limit or HostedTask.max_turns)
        self._must_end = max_turns is None and ended

    def observe(self, seed: int) -> Observation:
        """The observation after a reset with a seed.

        Raises:
            ConfigError: The environment fails, or its observation has another form.
        """
        with self._lock:
            try:
                observation, _ = self.env.reset(seed=seed)
            except Exception as error:
                raise ConfigError(f"{self.name} cannot be reset with seed {seed}: {error}") from error
            return _observation(observation, self.name)

    def reward(self, text: str, seed: int, earlier: Sequence[str] = ()) -> float:
        """The reward of an answer in the episode of a seed.

        Args:
            text: The answer.
            seed: The seed.
            earlier: The episode's answers before. Default: none.

        Raises:
            ConfigError: The environment goes on after its only answer.
            RewardError: The environment fails, or its reward is no number.
        """
        _, reward, ended = self._played(seed, (*earlier, text))
        if self._must_end and not ended:
            raise ConfigError(f"{self.name} goes on after an answer, as it does not after an empty one: give max_turns")
        try:
            return float(reward)
        except (TypeError, ValueError, OverflowError):
            raise RewardError(f"{self.name} gave the reward {str(reward)[:80]}; it must be a number") from None

    def reply(self, seed: int, texts: Sequence[str]) -> Reply | None:
        """The environment's next turn after some answers; None if the episode has ended.

        Raises:
            ConfigError: The observation has another form.
            RewardError: The environment fails.
        """
        observation, _, ended = self._played(seed, texts)
        if ended:
            return None
        seen = _observation(observation, self.name)
        return Reply(seen["prompt"], seen["images"])

    def _played(self, seed: int, texts: Sequence[str]) -> tuple[Any, Any, bool]:
        """The last observation and reward after some answers from a seed's start, and whether the episode has ended.

        Raises:
            RewardError: The environment fails, or ends before the last answer.
        """
        with self._lock:
            text, ended = "", False
            try:
                self.env.reset(seed=seed)
                for text in texts:
                    if ended:
                        raise RewardError(
                            f"{self.name} ends an episode that it went on with before, after {text[:80]!r}"
                        )
                    observation, reward, terminated, truncated, _ = self.env.step(text)
                    ended = bool(terminated or truncated)
            except RewardError:
                raise
            except Exception as error:
                raise RewardError(f"{self.name} failed on the answer {text[:80]!r}: {error}") from error
        return observation, reward, ended


class _Seeds(Source):
    """The samples of an environment: one for each seed."""

    size = None

    def __init__(self, hosted: Hosted, split: Split) -> None:
        self._hosted = hosted
        self._odd = split == "eval"

    def get(self, index: int) -> Sample:
        seed = index % _SEEDS * 2 + self._odd
        try:
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
    if not isinstance(given, Mapping) or not isinstance(given.get("prompt"), str):
        kind = f"keys {', '.join(map(str, given))}" if isinstance(given, Mapping) else f"type {type(given).__name__}"
        raise ConfigError(
            f"{name} is no visual task: its observation, of {kind}, is neither text nor a mapping with `prompt` and "
            "`images`. Wrap it in gymnasium.wrappers.TransformObservation, which gives it this form, and register that"
        )
    if unused := sorted(map(str, set(given) - {"prompt", "images"})):
        warnings.warn(
            f"{name}: models see prompt and images alone, not {', '.join(unused)}", RuntimeWarning, stacklevel=2
        )
    return {"images": _images(given.get("images", ()), name), "prompt": given["prompt"]}


def _images(given: Any, name: str) -> tuple[Image, ...]:
    """Copies of an observation's images: an environment may write the next ones into the same arrays.

    Raises:
        ConfigError: They have another form.
    """
    if not isinstance(given, np.ndarray | list | tuple):
        raise ConfigError(f"{name}: images is one array or a tuple of arrays, not {type(given).__name__}")
    images = tuple(map(np.array, (given,) if isinstance(given, np.ndarray) and given.ndim == 3 else given))
    for image in images:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or not image.size:
            raise ConfigError(f"{name}: an image is uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
    return images


def _equal(one: Observation, other: Observation) -> bool:
    same = len(one["images"]) == len(other["images"]) and one["prompt"] == other["prompt"]
    return same and all(map(np.array_equal, one["images"], other["images"]))
