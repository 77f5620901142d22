"""The environment that every visual task is: one observation, one answer in free text, one reward."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any, ClassVar, SupportsIndex, TypeVar

import gymnasium
from gymnasium import spaces

from vlmenv.core.answers import NONE
from vlmenv.core.coordinates import Coordinates, CoordinateSpace, ResizeRule
from vlmenv.core.errors import ConfigError, DataError, unknown_name
from vlmenv.core.formats import AnswerFormat
from vlmenv.core.rollout import Observation
from vlmenv.core.spaces import FreeText, Image, RGBImage
from vlmenv.envs.data.dataset import Dataset, Reading, open_dataset
from vlmenv.envs.data.images import resized
from vlmenv.envs.data.rows import Row, places
from vlmenv.envs.data.scenes import Split
from vlmenv.envs.data.source import Sample, SampleOrder, Source
from vlmenv.envs.metrics.intervals import Interval
from vlmenv.envs.rendering import picture_of
from vlmenv.envs.rewards.terms import RewardTerm
from vlmenv.envs.rewards.text import count_words
from vlmenv.envs.scoring import Rewards, Score, Scorer

Intervals = dict[str, Interval]
"""Metrics by name, with 95 % intervals."""

Name = TypeVar("Name", bound=StrEnum)


class VisualTaskEnv(gymnasium.Env[Observation, str], ABC):
    """A visual task with rule-based rewards.

    The observation is `{"images": tuple of uint8 [H, W, 3] arrays, "prompt": str}`, the action any
    text; an episode is one step. `reset` gives the sample's `id` and `index` in `info`, and
    `reset(options={"index": i})` shows a given sample. `step` adds `rewards` (every term by name,
    unweighted), `prediction` (the parsed answer, None if unparsable) and `target`, both in the
    coordinates that the prompt asks for, and `traits` where the task tells any.

    A subclass is a task: it sets the class attributes and the methods below them.

    Args:
        dataset: What `open_dataset` takes: a file in VLM-R1's, PeBR-R1's or (for detection) COCO's layout, several
            files, a parquet file, a Hugging Face data set; the built-in samples where left out.
        image_root: Folder that image paths are relative to, or one for each file; the file's own where left out.
        split: Of the built-in samples, `"train"` (default) or `"eval"`; of a Hugging Face data set, its name.
        columns: For parts of a row, the columns that hold them, as in `{"question": "query", "answer": "label"}`.
        skip_broken: Leave broken rows out (`env.source.faults` tells of them) instead of refusing the data set.
        min_image_side: Leave rows out with an image of fewer pixels than this in width or height.
        without_text: Leave rows out whose answer, reasoning included, contains one of these texts.
        rewards: Terms and weights; the task's defaults where left out.
        extra_terms: Reward terms by name, beside the task's own or in the place of one of the same name.
        prompt_template: Text with `{question}` and, where they matter, `{answer}` for an example of the answer
            in its format, `{none}` for the answer "None", and `{coordinates}`.
        answer_format: How the answer is set apart: `"tags"` or `"sections"`; the task's own where left out.
        coordinates: How boxes are written in prompt, answer and `info`: `"original"`, `"resized"` or `"norm1000"`.
        resize: For `"resized"`, how the model sizes images: the observation then shows them at that size.
        count_tokens: Counts the tokens of a text, for the terms that ask for it; words and marks where left out.
        timing: Tell the seconds that each reward term took, as `info["seconds"]`.
        render_mode: `"rgb_array"` or None.

    Raises:
        ConfigError: An argument that does not fit the others, or an unknown name.
        DataError: The data set cannot be read.
        ModelError: A reward term's model cannot be loaded.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 1}  # noqa: RUF012 (Gymnasium's own type)
    terms: ClassVar[Mapping[str, RewardTerm]]
    """The task's reward terms by name."""
    default_rewards: ClassVar[Mapping[str, float]]
    """Weights of the terms that are used unless told otherwise."""
    row_terms: ClassVar[Mapping[str, str]] = {}
    """Names by which rows ask for a term (`accu_reward_method`) in place of the first one."""
    right: ClassVar[tuple[str, float]] = ("accuracy", 1.0)
    """Which of `measure`'s numbers tells whether an answer is right, and from what value on it is."""
    ratios: ClassVar[Mapping[str, tuple[str, str]]] = {}
    """Metrics that are the sum of one of `measure`'s numbers over the sum of another."""
    prompt_template: ClassVar[str]
    """The prompt, see the argument of the same name."""
    answer_example: ClassVar[str] = "answer"
    """What the prompt shows as the form of an answer."""
    default_format: ClassVar[AnswerFormat] = AnswerFormat.TAGS
    """The answer format unless told otherwise."""
    needs_image: ClassVar[bool] = True
    """Whether every sample must have an image."""
    needs_answer: ClassVar[bool] = True
    """Whether every row must have an answer."""
    takes_coco: ClassVar[bool] = False
    """Whether COCO's instances make rows of this task."""

    def __init__(
        self,
        dataset: Dataset | None = None,
        image_root: Any = None,
        split: str | None = None,
        columns: Mapping[str, str] | None = None,
        skip_broken: bool = False,
        min_image_side: int | None = None,
        without_text: Sequence[str] = (),
        rewards: Rewards | None = None,
        extra_terms: Mapping[str, RewardTerm] | None = None,
        prompt_template: str | None = None,
        answer_format: str | None = None,
        coordinates: str = CoordinateSpace.ORIGINAL,
        resize: ResizeRule | None = None,
        count_tokens: Callable[[str], int] = count_words,
        timing: bool = False,
        render_mode: str | None = None,
    ) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ConfigError(unknown_name("render_mode", str(render_mode), self.metadata["render_modes"]))
        self.observation_space = spaces.Dict({"images": spaces.Sequence(RGBImage()), "prompt": FreeText()})  # type: ignore[assignment]
        self.action_space = FreeText()
        self.render_mode = render_mode
        self.timing = timing
        self.coordinates = Coordinates(_one_of(CoordinateSpace, "coordinate space", coordinates), resize)
        self.answer_format = _one_of(AnswerFormat, "answer format", answer_format or self.default_format)
        self.template = _checked_template(self.prompt_template if prompt_template is None else prompt_template)
        self._scorer = Scorer(
            {**self.terms, **(extra_terms or {})},
            self.default_rewards if rewards is None else rewards,
            self.answer_format,
            count_tokens,
            exchangeable=self.row_terms.values(),
        )
        if unused := set(extra_terms or {}) - set(self._scorer.weights):
            raise ConfigError(f"nothing uses the reward term {', '.join(sorted(unused))}: give it a weight in rewards")
        reading = self.reading(columns, skip_broken, min_image_side, without_text)
        self.source = self._open(dataset, image_root, split, reading)
        self._order: SampleOrder | None = None
        self._position = 0
        self._sample: Sample | None = None
        self._index = 0
        self._prediction: Any = None
        self._answered = False

    @property
    def rewards(self) -> dict[str, float]:
        """The reward terms in use, with their weights."""
        return dict(self._scorer.weights)

    @abstractmethod
    def builtin_source(self, split: Split) -> Source:
        """The task's built-in samples."""

    def read_target(self, row: Row) -> Any:
        """The truth of a data set's row; the text of its answer unless a task says otherwise.

        Raises:
            ValueError: The row holds no truth; the message says why.
        """
        return row.answer

    def parse(self, text: str) -> Any:
        """The answer in a completion, or None; takes any text."""
        return self.answer_format.extract(text)

    def measure(self, text: str, target: Any, terms: Mapping[str, float]) -> dict[str, float]:
        """The task's evaluation metrics for one answer, of which means and `ratios` are reported.

        Args:
            text: A completion.
            target: The truth, as in `info["target"]`.
            terms: The reward terms of this answer, as in `info["rewards"]`.
        """
        return {**terms, "unparsable": float(self.parse(text) is None)}

    def traits(self, prediction: Any, target: Any) -> dict[str, float]:
        """Numbers about an answer that are no rewards, for training to log; none unless a task has some.

        Args:
            prediction: The parsed answer, None where unparsable.
            target: The truth, as in `info["target"]`.
        """
        return {}

    def summarise(self, predictions: Sequence[Any], targets: Sequence[Any], clusters: Sequence[int]) -> Intervals:
        """Metrics that belong to a data set as a whole, and are no means over answers; none unless a task has some.

        Args:
            predictions: Parsed answers, None where unparsable.
            targets: The truth for each.
            clusters: The sample that each is about.
        """
        return {}

    def write_answer(self, sample: Sample) -> str:
        """The completion that answers a sample rightly, in the format and coordinates asked for."""
        return self.answer_format.write(str(self.target(sample)), sample.rationale)

    def target(self, sample: Sample) -> Any:
        """A sample's truth in the coordinates that the prompt asks for."""
        return sample.target

    def draw(self, sample: Sample, prediction: Any) -> Image:
        """A picture of a sample and an answer to it; `prediction` is None before there is one."""
        return picture_of(sample.images)

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
        return self.observe(self._sample), self.identify(self._sample, self._index)

    def step(self, action: str) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        if self._sample is None or self._answered:
            raise gymnasium.error.ResetNeeded("an episode is one step: call reset() before each step()")
        score = self.score(action, self._sample)
        self._prediction, self._answered = score.prediction, True
        info = self.identify(self._sample, self._index) | self.explain(score, self._sample)
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
        prompt = self.template.replace("{answer}", self.answer_format.example(self.answer_example))
        prompt = prompt.replace("{none}", self.answer_format.answer_only(NONE))
        return prompt.replace("{coordinates}", self.coordinates.description).replace("{question}", question)

    def score(self, text: str, sample: Sample) -> Score:
        """Scores an answer to a sample. Any text will do; a text that is no answer scores 0.

        Raises:
            TypeError: `text` is no string.
            RewardError: A term failed, or is not finite.
        """
        return self.score_batch([text], [sample])[0]

    def score_batch(self, texts: Sequence[str], samples: Sequence[Sample]) -> list[Score]:
        """Scores N answers, each to its sample; as `score`, but terms that can do so work on all at once."""
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"an action is a string, not {type(text).__name__}")
        targets = [self.target(sample) for sample in samples]
        return self._scorer(texts, targets, samples, [self.parse(text) for text in texts])

    def explain(self, score: Score, sample: Sample) -> dict[str, Any]:
        """What `info` tells of a scored answer."""
        info = {"rewards": dict(score.terms), "prediction": score.prediction, "target": self.target(sample)}
        if traits := self.traits(score.prediction, info["target"]):
            info["traits"] = traits
        return info | ({"seconds": dict(score.seconds)} if self.timing else {})

    def identify(self, sample: Sample, index: int) -> dict[str, Any]:
        """What `info` tells of a sample."""
        return {"id": sample.id, "index": index} | ({"subject": sample.subject} if sample.subject else {})

    def reading(
        self,
        columns: Mapping[str, str] | None = None,
        skip_broken: bool = False,
        min_image_side: int | None = None,
        without_text: Sequence[str] = (),
    ) -> Reading:
        """How this task reads the rows of a data set."""
        return Reading(
            self._understand,
            self.needs_image,
            self.takes_coco,
            columns or {},
            skip_broken,
            min_image_side,
            without_text or (),
        )

    def row_term(self, row: Row) -> str | None:
        """The reward term that a row asks for in place of the one in use; None for none.

        Raises:
            ValueError: The task has no such term.
        """
        if row.method in ("", "default"):
            return None
        if row.method not in self.row_terms:
            raise ValueError(f"accu_reward_method: {unknown_name('reward', row.method, self.row_terms)}")
        return self.row_terms[row.method]

    def _understand(self, row: Row) -> Sample:
        if self.needs_answer and not row.answer and row.detections is None:
            raise ValueError(f"the row has no answer: nothing in 'conversations', {places('answer')}")
        target, term = self.read_target(row), self.row_term(row)
        return Sample(row.id, (), row.question, target, subject=row.subject, term=term, response=row.response)

    def _shown(self, image: Image) -> Image:
        height, width = image.shape[:2]
        return resized(image, *self.coordinates.shown_size(width, height))

    def _open(
        self,
        dataset: Dataset | None,
        image_root: Any,
        split: str | None,
        reading: Reading,
    ) -> Source:
        if dataset is None:
            if image_root is not None or reading != self.reading():
                raise ConfigError(
                    "image_root, columns, skip_broken, min_image_side and without_text are for a data set: "
                    "give dataset too"
                )
            if split not in (None, "train", "eval"):
                raise ConfigError(unknown_name("split", split, ("train", "eval")))
            return self.builtin_source("eval" if split == "eval" else "train")
        source = open_dataset(dataset, reading, image_root, split)
        if not source.size and source.unwanted:
            told = ", ".join(f"in {count} {reason}" for reason, count in source.unwanted.items())
            raise DataError(f"no row is left: {len(source.faults)} are broken; {told}")
        if not source.size:
            raise DataError(f"every one of {len(source.faults)} rows is broken; the first: {source.faults[0]}")
        return source


def check_index(index: SupportsIndex, size: int | None) -> int:
    """A sample's index, as a whole number within the source.

    Raises:
        ConfigError: It is negative or too large.
    """
    try:
        number = operator.index(index)
    except TypeError:
        raise ConfigError(f"a sample's index is a whole number, not {index!r}") from None
    if number < 0 or (size is not None and number >= size):
        raise ConfigError(f"there is no sample {number}: the source has {size or 'endlessly many'}, counted from 0")
    return number


def _one_of(options: type[Name], kind: str, name: str) -> Name:
    if name not in list(options):
        raise ConfigError(unknown_name(kind, str(name), list(options)))
    return options(name)


def _checked_template(template: str) -> str:
    if "{question}" not in template:
        raise ConfigError("prompt_template must contain {question}, where the sample's question goes")
    return template
