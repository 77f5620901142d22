"""The environment that every visual task is: one observation, one answer in free text, one reward."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, SupportsInt

import gymnasium
import numpy as np
from gymnasium import spaces

from vlmenv.core.coordinates import Coordinates, CoordinateSpace, ResizeRule
from vlmenv.core.errors import ConfigError, RewardError, unknown_name
from vlmenv.core.rollout import Observation
from vlmenv.core.spaces import FreeText, Image, RGBImage
from vlmenv.envs.data.conversations import Conversations
from vlmenv.envs.data.images import resized
from vlmenv.envs.data.scenes import Split
from vlmenv.envs.data.source import Sample, SampleOrder, Source

RewardTerm = Callable[[str, Any], float]
"""(completion text, target) -> value; the target is what `info["target"]` shows."""

Rewards = Mapping[str | RewardTerm, float]
"""Reward terms with their weights: names of the task's own terms, or callables."""


@dataclass(frozen=True, slots=True)
class Score:
    """What an answer is worth."""

    reward: float
    """weighted sum of the terms"""
    terms: dict[str, float]
    """each term, unweighted"""
    prediction: Any
    """the answer as parsed; None where it could not be"""


class VisualTaskEnv(gymnasium.Env[Observation, str], ABC):
    """A visual task with rule-based rewards.

    The observation is `{"images": tuple of uint8 [H, W, 3] arrays, "prompt": str}`, the action any
    text; an episode is one step. `reset` gives the sample's `id` and `index` in `info`, and
    `reset(options={"index": i})` shows a given sample. `step` adds `rewards` (every term by name,
    unweighted), `prediction` (the parsed answer, None if unparsable) and `target`, both in the
    coordinates that the prompt asks for.

    A subclass is a task: it sets the class attributes and the methods below them.

    Args:
        dataset: A VLM-R1 JSONL file; the built-in samples where left out.
        image_root: Folder that the file's image paths are relative to; its own where left out.
        split: Of the built-in samples, `"train"` (default) or `"eval"`; a file has none.
        rewards: Terms and weights; the task's defaults where left out.
        prompt_template: Text with `{question}`, and `{coordinates}` where it matters.
        coordinates: How boxes are written in prompt, answer and `info`: `"original"`, `"resized"` or `"norm1000"`.
        resize: For `"resized"`, how the model sizes images: the observation then shows them at that size.
        render_mode: `"rgb_array"` or None.

    Raises:
        ConfigError: An argument that does not fit the others, or an unknown name.
        DataError: The data set cannot be read.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 1}  # noqa: RUF012 (Gymnasium's own type)
    terms: ClassVar[Mapping[str, RewardTerm]]
    """The task's reward terms by name."""
    default_rewards: ClassVar[Mapping[str, float]]
    """Weights of the terms that are used unless told otherwise."""
    prompt_template: ClassVar[str]
    """The prompt, with `{question}` and, if the task has coordinates, `{coordinates}`."""
    needs_image: ClassVar[bool] = True
    """Whether every sample must have an image."""

    def __init__(
        self,
        dataset: str | Path | None = None,
        image_root: str | Path | None = None,
        split: Split | None = None,
        rewards: Rewards | None = None,
        prompt_template: str | None = None,
        coordinates: str = CoordinateSpace.ORIGINAL,
        resize: ResizeRule | None = None,
        render_mode: str | None = None,
    ) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ConfigError(unknown_name("render_mode", str(render_mode), self.metadata["render_modes"]))
        self.observation_space = spaces.Dict({"images": spaces.Sequence(RGBImage()), "prompt": FreeText()})  # type: ignore[assignment]
        self.action_space = FreeText()
        self.render_mode = render_mode
        self.coordinates = Coordinates(_coordinate_space(coordinates), resize)
        self.template = _checked_template(self.prompt_template if prompt_template is None else prompt_template)
        self.weighted_terms = self._weighted_terms(self.default_rewards if rewards is None else rewards)
        self.source = self._open(dataset, image_root, split)
        self._order: SampleOrder | None = None
        self._position = 0
        self._sample: Sample | None = None
        self._index = 0
        self._prediction: Any = None
        self._answered = False

    @abstractmethod
    def builtin_source(self, split: Split) -> Source:
        """The task's built-in samples."""

    @abstractmethod
    def read_target(self, answer: str) -> Any:
        """The truth from a data set's answer text.

        Raises:
            ValueError: The text holds no truth; the message says why.
        """

    @abstractmethod
    def parse(self, text: str) -> Any:
        """The answer in a completion, or None; takes any text."""

    @abstractmethod
    def measure(self, text: str, target: Any) -> dict[str, float]:
        """The task's evaluation metrics for one answer; over a data set their means are reported."""

    @abstractmethod
    def write_answer(self, sample: Sample) -> str:
        """The completion that answers a sample rightly, in the format and coordinates asked for."""

    def target(self, sample: Sample) -> Any:
        """A sample's truth in the coordinates that the prompt asks for."""
        return sample.target

    def draw(self, sample: Sample, prediction: Any) -> Image:
        """A picture of a sample and an answer to it; `prediction` is None before there is one."""
        return sample.images[0].copy() if sample.images else np.full((320, 320, 3), 255, dtype=np.uint8)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Shows the next sample of the order that `seed` fixes, or the one of `options={"index": i}`.

        Raises:
            ConfigError: An option that is not known, or a sample that does not exist.
            DataError: The sample, or one of its images, cannot be read.
        """
        super().reset(seed=seed)
        if seed is not None or self._order is None:
            self._order = SampleOrder(self.source.size, key=int(self.np_random.integers(2**62)))
            self._position = 0
        if unknown := set(options or {}) - {"index"}:
            raise ConfigError(f"reset knows no option {', '.join(sorted(unknown))}; it knows 'index'")
        if options:
            self._index = check_index(options["index"], self.source.size)
        else:
            self._index = self._order[self._position]
            self._position += 1
        self._sample = self.source.get(self._index)
        self._prediction, self._answered = None, False
        return self.observe(self._sample), self._identify()

    def step(self, action: str) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        if self._sample is None or self._answered:
            raise gymnasium.error.ResetNeeded("an episode is one step: call reset() before each step()")
        score = self.score(action, self._sample)
        self._prediction, self._answered = score.prediction, True
        info = self._identify() | self.explain(score, self._sample)
        return self.observe(self._sample), score.reward, True, False, info

    def render(self) -> Image | None:
        """In `rgb_array` mode a picture, uint8 [H, W, 3]: true boxes in green, answered ones in red."""
        if self.render_mode is None or self._sample is None:
            return None
        return self.draw(self._sample, self._prediction)

    def observe(self, sample: Sample) -> Observation:
        """What an agent sees of a sample; the images are copies, at the size that `coordinates` shows them."""
        return {"images": tuple(map(self._shown, sample.images)), "prompt": self.prompt(sample.question)}

    def prompt(self, question: str) -> str:
        """The prompt that asks a question."""
        prompt = self.template.replace("{coordinates}", self.coordinates.description)
        return prompt.replace("{question}", question)

    def score(self, text: str, sample: Sample) -> Score:
        """Scores an answer to a sample. Any text will do; a text that is no answer scores 0.

        Raises:
            TypeError: `text` is no string.
            RewardError: A term is not finite.
        """
        if not isinstance(text, str):
            raise TypeError(f"an action is a string, not {type(text).__name__}")
        target = self.target(sample)
        terms = {name: float(term(text, target)) for name, term, _ in self.weighted_terms}
        for name, value in terms.items():
            if not math.isfinite(value):
                raise RewardError(f"reward term '{name}' gave {value} for sample {sample.id}; it must be finite")
        reward = sum(weight * terms[name] for name, _, weight in self.weighted_terms)
        return Score(float(reward), terms, self.parse(text))

    def explain(self, score: Score, sample: Sample) -> dict[str, Any]:
        """What `info` tells of a scored answer."""
        return {"rewards": dict(score.terms), "prediction": score.prediction, "target": self.target(sample)}

    def _shown(self, image: Image) -> Image:
        height, width = image.shape[:2]
        return resized(image, *self.coordinates.shown_size(width, height))

    def _identify(self) -> dict[str, Any]:
        assert self._sample is not None
        return {"id": self._sample.id, "index": self._index}

    def _open(self, dataset: str | Path | None, image_root: str | Path | None, split: Split | None) -> Source:
        if dataset is None:
            if image_root is not None:
                raise ConfigError("image_root is for a data set: give dataset too")
            if split not in (None, "train", "eval"):
                raise ConfigError(unknown_name("split", split, ("train", "eval")))
            return self.builtin_source(split or "train")
        if split is not None:
            raise ConfigError(f"split '{split}' is for the built-in samples: a data set file has no splits")
        root = None if image_root is None else Path(image_root)
        return Conversations(Path(dataset), root, needs_image=self.needs_image, read_target=self.read_target)

    def _weighted_terms(self, rewards: Rewards | Mapping[str, float]) -> list[tuple[str, RewardTerm, float]]:
        if not rewards:
            raise ConfigError(f"rewards is empty: name at least one of {', '.join(sorted(self.terms))}")
        found = []
        for key, weight in rewards.items():
            if isinstance(key, str) and key not in self.terms:
                raise ConfigError(unknown_name("reward term", key, self.terms))
            term = self.terms[key] if isinstance(key, str) else key
            found.append((key if isinstance(key, str) else _name_of(key), term, float(weight)))
        names = [name for name, _, _ in found]
        for name, _, weight in found:
            if not math.isfinite(weight):
                raise ConfigError(f"the weight of reward term '{name}' is {weight}; it must be finite")
        if taken := [name for name in names if name in _TAKEN]:
            raise ConfigError(f"reward term {taken[0]}: the name is that of a metric; call it something else")
        if hidden := [name for name in names if name.startswith("_")]:
            raise ConfigError(f"reward term {hidden[0]}: a leading underscore is taken for a mask in vector infos")
        if len(set(names)) < len(names):
            raise ConfigError(f"two reward terms have the same name: {', '.join(names)}")
        return found


_TAKEN = ("mean", "zero_std_groups")  # "reward/…" metrics of the trainer


def check_index(index: SupportsInt, size: int | None) -> int:
    """A sample's index, as a whole number within the source.

    Raises:
        ConfigError: It is negative or too large.
    """
    number = int(index)
    if number < 0 or (size is not None and number >= size):
        raise ConfigError(f"there is no sample {number}: the source has {size or 'endlessly many'}, counted from 0")
    return number


def _coordinate_space(name: str) -> CoordinateSpace:
    if name not in list(CoordinateSpace):
        raise ConfigError(unknown_name("coordinate space", name, list(CoordinateSpace)))
    return CoordinateSpace(name)


def _checked_template(template: str) -> str:
    if "{question}" not in template:
        raise ConfigError("prompt_template must contain {question}, where the sample's question goes")
    return template


def _name_of(term: RewardTerm) -> str:
    if isinstance(term, functools.partial):
        return _name_of(term.func)
    return getattr(term, "__name__", type(term).__name__)


def mean_metrics(measures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over answers of what `VisualTaskEnv.measure` gave for each."""
    return {name: float(np.mean([measure[name] for measure in measures])) for name in measures[0]}
