"""Any Gymnasium environment of one step as a visual task, so that it can be trained like one."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import gymnasium
import numpy as np

from vlmenv.core.errors import ConfigError, DataError, RewardError
from vlmenv.core.rollout import Observation
from vlmenv.core.spaces import Image
from vlmenv.envs.base import VisualTaskEnv
from vlmenv.envs.data.scenes import Split
from vlmenv.envs.data.source import Sample, Source
from vlmenv.envs.rewards.terms import RewardTerm

_SEEDS = 2**30
"""Seeds of a split; environments pass theirs on to generators that take no more than 32 bits."""


class HostedTask(VisualTaskEnv):
    """A Gymnasium environment as a visual task, whose samples are its seeds.

    The environment takes text and ends after one step. Its observation is text, or a mapping with `prompt` (text) and
    `images` (uint8 arrays [H, W, 3], or one). A wrapper of Gymnasium's, such as `TransformObservation`, gives it that
    form. Groups need the same start G times: the same seed must give the same observation.

    Its reward is the term `environment`; other terms may be added by `rewards`. Training seeds are even, evaluation
    seeds odd.

    Args:
        env: Id of the environment, or a function that makes it.
        split: `"train"` or `"eval"`. Default: `"train"`.
        arguments: Arguments of `VisualTaskEnv`. Those of data sets do not apply.

    Raises:
        ConfigError: The environment does not have this form, goes on after a step, or starts differently with one seed.
    """

    terms: ClassVar[Mapping[str, RewardTerm]] = {}
    default_rewards: ClassVar[Mapping[str, float]] = {"environment": 1.0}
    right: ClassVar[tuple[str, float]] = ("environment", 1.0)
    best: ClassVar[Mapping[str, float | None]] = {"environment": None}
    prompt_template = "{question}"
    needs_image = False
    knows_answers = False

    def __init__(self, env: Any, split: str | None = None, **arguments: Any) -> None:
        self.hosted = Hosted(env)
        extra = {"environment": self.hosted.reward, **(arguments.pop("extra_terms", None) or {})}
        if arguments.get("dataset") is not None:
            raise ConfigError(f"{self.hosted.name} draws its own samples: give no dataset")
        super().__init__(split=split, extra_terms=extra, **arguments)

    def builtin_source(self, split: Split) -> Source:
        return _Seeds(self.hosted, split)

    def parse(self, text: str) -> Any:
        return text

    def close(self) -> None:
        """Closes the window and the environment."""
        super().close()
        self.hosted.env.close()

    def write_answer(self, sample: Sample) -> str:
        raise ConfigError(f"{self.hosted.name} tells no right answers, which sft would imitate: take another algorithm")


class Hosted:
    """An environment that is started anew for each sample and each answer. Several threads may use it."""

    def __init__(self, env: Any) -> None:
        self.env: gymnasium.Env[Any, Any] = env() if callable(env) else gymnasium.make(env, disable_env_checker=True)
        self.name = env if isinstance(env, str) else type(self.env.unwrapped).__name__
        self._lock = threading.Lock()
        first, again = self.observe(0), self.observe(0)
        if not _equal(first, again):
            raise ConfigError(
                f"{self.name} starts differently with one seed, so no group of answers could be compared: draw its "
                "samples from self.np_random alone, after super().reset(seed=seed)"
            )
        self.reward("", 0)

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

    def reward(self, text: str, seed: int) -> float:
        """The reward of an answer to the observation of a seed.

        Raises:
            ConfigError: The environment goes on after it.
            RewardError: The environment fails, or its reward is no number.
        """
        with self._lock:
            try:
                self.env.reset(seed=seed)
                _, reward, terminated, truncated, _ = self.env.step(text)
            except Exception as error:
                raise RewardError(f"{self.name} failed on the answer {text[:80]!r}: {error}") from error
        if not (terminated or truncated):
            raise ConfigError(f"{self.name} goes on after an answer; episodes of one step can be trained")
        try:
            return float(reward)
        except (TypeError, ValueError, OverflowError):
            raise RewardError(f"{self.name} gave the reward {str(reward)[:80]}; it must be a number") from None


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
