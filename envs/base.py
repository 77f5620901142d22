"""The base environment of visual tasks: an observation, an answer in free text, a reward; in several turns if asked."""

from __future__ import annotations

import operator
from abc import ABC
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Any, ClassVar, Final, SupportsIndex, TypeVar

import gymnasium
from gymnasium import spaces

from vlmenv.core import notebook
from vlmenv.core.answers import NONE
from vlmenv.core.coordinates import Box, Coordinates, CoordinateSpace, ResizeRule
from vlmenv.core.errors import ConfigError, DataError, SampleError, require_at_least, unknown_name
from vlmenv.core.formats import AnswerFormat
from vlmenv.core.rollout import IMAGE_MARK, ROLES, Observation, Turn, split_marks
from vlmenv.core.spaces import FreeText, Image, OneOfTexts, RGBImage
from vlmenv.core.text import visible_lines
from vlmenv.core.video import FrameRule, VideoSpace
from vlmenv.envs.data.boxes import BoxForm, BoxOrientation, BoxReading
from vlmenv.envs.data.dataset import Concatenated, Dataset, Reading, TableSource, open_dataset
from vlmenv.envs.data.images import bounded_size, resized
from vlmenv.envs.data.layouts import RowLayout
from vlmenv.envs.data.rows import Row, missing
from vlmenv.envs.data.rows import places as columns_of
from vlmenv.envs.data.scenes import Split
from vlmenv.envs.data.source import Sample, SampleOrder, Source, order_of
from vlmenv.envs.episodes import Episode, Reply, advance, copied
from vlmenv.envs.geometry import Geometry, changed_place, convert, labelled_places
from vlmenv.envs.metrics.intervals import Interval
from vlmenv.envs.rendering import ANSWERED, TRUE, Window, draw_places, picture_of, strip_of
from vlmenv.envs.rewards.registry import registered_rewards
from vlmenv.envs.rewards.terms import RewardTerm
from vlmenv.envs.rewards.text import count_words
from vlmenv.envs.scoring import Rewards, Score, Scorer

Intervals = dict[str, Interval]
"""Metrics by name, with 95 % intervals."""
OF_WORDS: Final = ("keywords", "choices", "tolerance", "pages")
"""Parts of a row that truths of places, counts, and transcripts have no use for."""

Name = TypeVar("Name", bound=StrEnum)


class VisualTaskEnv(gymnasium.Env[Observation, str], ABC):
    """A visual task with rule-based rewards.

    The observation is `{"images": tuple of uint8 [H, W, 3] arrays, "prompt": str, "turns": tuple of earlier turns}`,
    see `Observation`. The action is any text, and an episode is one step. `reset` gives the sample's `id` and `index`
    in `info`; `reset(options={"index": i})` shows a given sample. `step` adds to `info`: `rewards` (every term by name,
    unweighted), `prediction` (the parsed answer, None if unreadable), `target`, and `traits` if the task has any.
    Prediction and target are in the coordinates that the prompt asks for.

    The observation of a task that takes videos has `videos` too, see `Video`.

    In a task of several turns, `respond` may reply to an answer. Then the next observation is the conversation so far,
    whose `prompt` and last images are the reply. An episode ends with an answer without a reply, or is truncated by
    `max_turns` or `max_images`. `rewards` in `info` are sums over the turns so far.

    A subclass is a task. It sets `terms`, `default_rewards` and `prompt_template`. It may override the other class
    attributes and hooks. docs/own_task.md shows each with an example.

    Args:
        dataset: A file in VLM-R1's, PeBR-R1's or (for detection) COCO's layout, several files, a parquet file, a
            Hugging Face data set, or a `Source`; see `open_dataset`. Default: the built-in samples.
        image_root: Folder that image paths are relative to, or one per file. Default: the folder of the file.
        split: `"train"` or `"eval"` of the built-in samples, or the name of a split of a Hugging Face data set.
            Default: `"train"`.
        columns: Columns of the parts of a row, as in `{"question": "query", "answer": "label"}`.
        skip_broken: If true, broken rows are left out and listed in `env.source.faults`. The next row replaces a row
            whose fault shows only later, such as half an image. If false, the data set is refused. Default: False.
        min_image_side: Width and height in pixels below which an image's row is left out. Default: no limit.
        without_text: Texts that leave a row out if its answer, reasoning included, contains one. Default: none.
        boxes_in: Form of the data set's boxes: `"xyxy"` (edges in pixels), `"xywh"` (left, top, width, height in
            pixels), `"fractions"` (edges as parts of the image) or `"norm1000"` (edges in thousandths). The prompt asks
            for `coordinates`, a separate setting. Default: xyxy; COCO's files are xywh by definition.
        box_orientation: Orientation of the image that the data set's boxes refer to, if EXIF turns it: as it is
            `"shown"`, or as it is `"stored"`. The width and height in a COCO file decide if they fit only one. Default:
            `"shown"`.
        confine_images: If true, a row whose image lies outside `image_root` is broken: by an absolute path, `..` or a
            link that leads out of it. Default: False.
        rewards: Terms with weights. A term is the name of a task's own or of a registered term, a `"module:function"`,
            or a function. Default: the task's `default_rewards`.
        extra_terms: Reward terms by name, added to the task's own. They replace terms of the same name. Default: none.
        prompt_template: Text with `{question}`, and optionally `{answer}` for an example of the answer in its format,
            `{none}` for the answer "None", and `{coordinates}`. Default: the task's own.
        system_prompt: Text of the system turn before each prompt. A row's own system turn replaces it. It takes the
            placeholders of `prompt_template` except `{question}`. Default: no system turn.
        answer_format: Form that separates the answer from the reasoning: `"tags"` or `"sections"`. Default: the task's
            own.
        coordinates: Convention of boxes in prompt, answer and `info`: `"original"`, `"resized"` or `"norm1000"`.
        resize: The model's rule for image sizes, needed for `"resized"`. The observation then has images of that size.
        image_bound: Rule for images with more than its `max_pixels` pixels: they are decoded at its size, so that
            memory does not follow the camera. Places stay those of the full image. Default: no bound.
        count_tokens: Function that counts the tokens of a text, for length terms. Default: words and marks are counted.
        timing: If true, `info["seconds"]` has the seconds of each reward term. Default: False.
        render_mode: `"rgb_array"` (a picture), `"ansi"` (prompt, answer and rewards as text), `"human"` (a window that
            follows each reset and step) or None.
        max_turns: Maximum number of answers per episode. 1 makes a task of several turns one of a single step. Default:
            the task's own.
        max_images: Maximum number of images per episode, in a task of several turns. Default: the task's own.
        video_fps: Frames per second that are taken of a video, see `FrameRule`. Default: 2.
        video_frames: Maximum number of frames of a video. Default: 64.
        video_pixels: Maximum number of pixels of a frame. Default: 100,352.

    Raises:
        ConfigError: An argument does not fit the others, or a name is unknown.
        DataError: The data set cannot be read.
        ModelError: A reward term's model cannot be loaded.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array", "ansi", "human"], "render_fps": 1}  # noqa: RUF012 (Gymnasium's own type)
    terms: ClassVar[Mapping[str, RewardTerm]]
    """The task's reward terms by name."""
    default_rewards: ClassVar[Mapping[str, float]]
    """Weights of the default terms."""
    row_terms: ClassVar[Mapping[str, str]] = {}
    """Names in rows (`accu_reward_method`) that choose a term in place of the first one."""
    right: ClassVar[tuple[str, float]] = ("accuracy", 1.0)
    """The measure that decides whether an answer is right, and its least value."""
    ratios: ClassVar[Mapping[str, tuple[str, str]]] = {}
    """Metrics that divide the sum of one measure by the sum of another."""
    prompt_template: ClassVar[str]
    """The prompt, see the argument of the same name."""
    geometry: ClassVar[Geometry | None] = None
    """The kind of place that answers name: `POINT`, `POINTS`, `BOX`, `BOXES`, `DETECTIONS`, or your own. The truth
    is in pixels of the stored image, the first if there are several. The base class converts it."""
    answer_example: ClassVar[str | None] = None
    """The form of an answer that the prompt shows. Default: that of `geometry`, or "answer"."""
    best: ClassVar[Mapping[str, float | None]] = {}
    """Values of terms for a right answer, if not 1. None: the value cannot be known beforehand."""
    default_format: ClassVar[AnswerFormat] = AnswerFormat.TAGS
    """The default answer format."""
    needs_image: ClassVar[bool] = True
    """Whether every sample must have an image."""
    takes_videos: ClassVar[bool] = False
    """Whether samples may have videos."""
    needs_video: ClassVar[bool] = False
    """Whether every sample must have a video."""
    needs_answer: ClassVar[bool] = True
    """Whether every row must have an answer."""
    knows_answers: ClassVar[bool] = True
    """Whether `write_answer` knows right answers."""
    unrepeatable: str = ""
    """Why a sample cannot be shown and answered again; empty if it can."""
    takes_coco: ClassVar[bool] = False
    """Whether the task reads COCO's instances."""
    max_turns: int = 1
    """Maximum number of answers per episode. A task of several turns sets it, and overrides `respond`."""
    max_images: int = 8
    """Maximum number of images per episode, in a task of several turns."""
    turn_terms: ClassVar[Collection[str]] = ()
    """Terms, by name, that score the answer of every turn. The others score the last answer alone."""
    unread: ClassVar[Collection[str]] = ("pages",)
    """Parts of a row, by their names in `COLUMNS`, that the task does not use. Their presence is reported."""
    layouts: ClassVar[tuple[RowLayout, ...]] = ()
    """Layouts of public data sets for this task, for rows whose question stands in no common column."""

    def __init__(
        self,
        dataset: Dataset | None = None,
        image_root: Any = None,
        split: str | None = None,
        columns: Mapping[str, str] | None = None,
        skip_broken: bool = False,
        min_image_side: int | None = None,
        without_text: Sequence[str] = (),
        boxes_in: str | None = None,
        box_orientation: str = BoxOrientation.SHOWN,
        confine_images: bool = False,
        rewards: Rewards | None = None,
        extra_terms: Mapping[str, RewardTerm] | None = None,
        prompt_template: str | None = None,
        system_prompt: str | None = None,
        answer_format: str | None = None,
        coordinates: str = CoordinateSpace.ORIGINAL,
        resize: ResizeRule | None = None,
        image_bound: ResizeRule | None = None,
        count_tokens: Callable[[str], int] = count_words,
        timing: bool = False,
        render_mode: str | None = None,
        max_turns: int | None = None,
        max_images: int | None = None,
        video_fps: float | None = None,
        video_frames: int | None = None,
        video_pixels: int | None = None,
    ) -> None:
        self._set_budgets(max_turns, max_images)
        self._set_interface(render_mode)
        self.frame_rule = self._frame_rule(video_fps, video_frames, video_pixels)
        self.timing = timing
        self.skip_broken = skip_broken
        self.coordinates = Coordinates(_one_of(CoordinateSpace, "coordinate space", coordinates), resize)
        self.answer_format = _one_of(AnswerFormat, "answer format", answer_format or self.default_format)
        self._check_class()
        self.template = self._checked_template(self.prompt_template if prompt_template is None else prompt_template)
        self.system_prompt = self._checked_system_prompt(system_prompt)
        self.count_tokens = count_tokens
        self._set_rewards(self.default_rewards if rewards is None else rewards, extra_terms or {})
        self.image_bound = image_bound
        reading = self.reading(
            columns, skip_broken, min_image_side, without_text, boxes_in, box_orientation, confine_images
        )
        self.source = self._open(dataset, image_root, split, reading)
        self._order: SampleOrder | None = None
        self._position = 0
        self._episode: Episode | None = None
        self._index = 0
        self._window: Window | None = None

    def __repr__(self) -> str:
        shown = [f"rewards={self.rewards}"]
        shown += [f"samples={self.source.size}"] if self.source.size is not None else []
        shown += [f"coordinates={self.coordinates.space.value!r}"] if self.geometry is not None else []
        return f"{type(self).__name__}({', '.join(shown)})"

    def _repr_html_(self) -> str:
        """The task in a notebook: its rewards, and the present sample with the answer to it."""
        rows = [("rewards", ", ".join(f"{name} {weight:g}" for name, weight in self.rewards.items()))]
        rows += [("samples", "without end" if self.source.size is None else str(self.source.size))]
        rows += [("coordinates", self.coordinates.space.value)] if self.geometry is not None else []
        shown = notebook.table(type(self).__name__, (), rows)
        if self._episode is None:
            return shown
        image = notebook.picture(self._drawn(self._episode), f"sample {self._episode.sample.id}")
        return shown + image + notebook.text_block(self._told(self._episode))

    @property
    def rewards(self) -> dict[str, float]:
        """The reward terms in use, with their weights."""
        return dict(self._scorer.weights)

    @property
    def progress(self) -> float:
        """Part of the training that is done, in [0, 1], for reward terms with an argument `progress`. Default: 1."""
        return self._scorer.progress

    @progress.setter
    def progress(self, done: float) -> None:
        self._scorer.progress = done
        if self._turn_scorer is not None:
            self._turn_scorer.progress = done

    def builtin_source(self, split: Split) -> Source:
        """The task's built-in samples. Default: none; the task needs a data set.

        Example::

            def builtin_source(self, split):
                return CountScenes(split)

        Raises:
            ConfigError: The task has none.
        """
        raise ConfigError(
            f"{type(self).__name__} has no built-in samples: give a dataset, as in --dataset rows.jsonl or, from "
            'Python, dataset="rows.jsonl"'
        )

    def read_target(self, row: Row) -> Any:
        """The truth of a data set's row. Default: the places that `geometry` reads in its answer, or the answer's text.

        Example::

            def read_target(self, row):
                return int(row.answer)

        Raises:
            ValueError: The row has no truth; the message says why.
        """
        return row.answer if self.geometry is None else self.geometry.truth(row.answer)

    def parse(self, text: str) -> Any:
        """The answer in a completion, or None if unreadable. It takes any text, and never raises.

        Default: the places that `geometry` reads in the answer, or the answer's text.

        Example::

            def parse(self, text):
                answer = super().parse(text) or ""
                return int(answer) if answer.isdecimal() and len(answer) < 10 else None
        """
        content = self.answer_format.extract(text)
        return content if content is None or self.geometry is None else self.geometry.read(content)

    def measure(self, text: str, target: Any, terms: Mapping[str, float]) -> dict[str, float]:
        """The task's evaluation metrics for one answer. Their means and the `ratios` are reported.

        Example::

            def measure(self, text, target, terms):
                return super().measure(text, target, terms) | {"exact": float(self.parse(text) == target)}

        Args:
            text: A completion.
            target: The truth, as in `info["target"]`.
            terms: The reward terms of this answer, as in `info["rewards"]`.
        """
        return {**terms, "unparsable": float(self.parse(text) is None)}

    def traits(self, prediction: Any, target: Any) -> dict[str, float]:
        """Numbers about an answer for the training log, apart from rewards. Default: none.

        Example::

            def traits(self, prediction, target):
                return {"too_many": float(prediction is not None and prediction > target)}

        Args:
            prediction: The parsed answer, None where unparsable.
            target: The truth, as in `info["target"]`.
        """
        return {}

    def summarise(self, predictions: Sequence[Any], targets: Sequence[Any], clusters: Sequence[int]) -> Intervals:
        """Metrics of the whole data set that are not means over answers. Default: none.

        Example::

            def summarise(self, predictions, targets, clusters):
                errors = [9 if p is None else abs(p - t) for p, t in zip(predictions, targets)]
                return {"mean error": ratio_interval(errors, clusters=clusters)}

        Args:
            predictions: Parsed answers, None where unparsable.
            targets: The truth for each.
            clusters: The number of the sample that each answer belongs to.
        """
        return {}

    def compare(
        self, before: Sequence[Any], after: Sequence[Any], targets: Sequence[Any], clusters: Sequence[int]
    ) -> Intervals:
        """Paired differences of metrics of `summarise` between two evaluations, later minus earlier. Default: none.

        A metric without one is compared by its values alone, without an interval.

        Args:
            before: Parsed answers of the earlier evaluation, None where unparsable.
            after: Those of the later one to the same samples.
            targets: The truth for each.
            clusters: The number of the sample that each answer belongs to.
        """
        return {}

    def write_answer(self, sample: Sample) -> str:
        """A right completion for a sample, in the requested format and coordinates.

        `sft` imitates it, and the self-check scores it. Default: the text that `geometry` writes, or the truth as text.

        Example::

            def write_answer(self, sample):
                return self.answer_format.write(f"{self.target(sample)} shapes", sample.rationale)
        """
        write = str if self.geometry is None else self.geometry.write
        return self.answer_format.write(write(self.target(sample)), sample.rationale)

    def stored_answer(self, sample: Sample) -> str | None:
        """The answer of a data set's row from which the task reads the sample's truth. Default: the right answer."""
        return self.answer_format.extract(self.write_answer(sample))

    def respond(self, sample: Sample, texts: Sequence[str]) -> Reply | None:
        """The environment's reply to an answer. None: the answer ends the episode. It takes any text, and never raises.

        Default: None. It depends on its arguments alone, and is called again for the same answers.

        Example::

            def respond(self, sample, texts):
                return Reply("Are you sure?") if len(texts) == 1 else None

        Args:
            sample: The sample.
            texts: The answers of the episode so far, at least one.
        """
        return None

    def write_turn(self, sample: Sample, texts: Sequence[str]) -> str:
        """A right next answer after some answers, which `sft` imitates.

        Default: the row's own completion, or `write_answer`.

        Args:
            sample: The sample.
            texts: The answers of the episode so far; empty for the first.
        """
        return sample.response or self.write_answer(sample)

    def target(self, sample: Sample) -> Any:
        """A sample's truth in the coordinates that the prompt asks for, as in `info` and for reward terms."""
        if self.geometry is None:
            return sample.target
        width, height = _image_size(sample)
        return convert(sample.target, lambda place: self.coordinates.from_pixels(place, width, height))

    def draw(self, sample: Sample, prediction: Any) -> Image:
        """A picture of a sample and an answer to it: the places of `geometry`, or images and frames as they are.

        Args:
            sample: The sample.
            prediction: The parsed answer. None: not answered yet, or unreadable.
        """
        if self.geometry is None:
            return picture_of((*sample.images, *map(strip_of, sample.videos)))
        width, height = _image_size(sample)
        true = [(label, place, TRUE) for label, place in labelled_places(sample.target)]
        answered = [
            (label, self.coordinates.to_pixels(place, width, height), ANSWERED)
            for label, place in labelled_places(prediction)
        ]
        return draw_places(sample.asked_images[0], true + answered, (width, height))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Shows the next sample of the order of `seed`, or the one of `options={"index": i}`.

        Raises:
            ConfigError: An option is unknown, or the sample does not exist.
            SampleError: The sample or one of its images cannot be read. With `skip_broken` the next one is shown
                instead, unless `index` chose this one.
            DataError: With `skip_broken`, no sample of the data set can be read.
        """
        super().reset(seed=seed)
        if seed is not None or self._order is None:
            self._order = order_of(self.np_random, self.source.size)
            self._position = 0
        if unknown := set(options or {}) - {"index"}:
            raise ConfigError(f"reset knows no option {', '.join(sorted(unknown))}; it knows 'index'")
        if options:
            self._index = check_index(options["index"], self.source.size)
            sample, observation = self.show(self._index)
        else:
            sample, observation = self._show_next(self._order)
        self._episode = Episode(sample, observation)
        self._follow(self._episode)
        return observation, self.identify(sample, self._index)

    def _show_next(self, order: SampleOrder) -> tuple[Sample, Observation]:
        """The next sample of the order; with `skip_broken`, the next readable one."""
        broken: list[SampleError] = []
        while not broken or len(broken) < 2 * (self.source.size or 0):  # an order may end and begin with one sample
            self._index = order[self._position]
            self._position += 1
            try:
                return self.show(self._index)
            except SampleError as error:
                if not self.skip_broken:
                    raise
                broken.append(error)
        raise DataError(f"none of the data set's {self.source.size} samples can be shown; the first: {broken[0]}")

    def step(self, action: str) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        episode = self._episode
        if episode is None or episode.has_ended:
            raise gymnasium.error.ResetNeeded("the episode has ended, or none has begun: call reset() first")
        (reward,) = advance(self, [episode], [action])
        self._follow(episode)
        info = self.identify(episode.sample, self._index) | self.report(episode)
        over, truncated = episode.has_ended, episode.truncated
        return copied(episode.observation), reward, over and not truncated, truncated, info

    def render(self) -> Any:
        """A picture, uint8 [H, W, 3], of true places in blue and answered ones in orange; or text, by `render_mode`.

        In `human` mode it returns None: the window follows by itself.
        """
        if self._episode is None or self.render_mode in (None, "human"):
            return None
        return self._told(self._episode) if self.render_mode == "ansi" else self._drawn(self._episode)

    def close(self) -> None:
        """Closes the window."""
        if self._window is not None:
            self._window.close()

    def _follow(self, episode: Episode) -> None:
        """Shows the episode in the window, if there is one."""
        if self.render_mode == "human":
            self._window = self._window or Window()
            self._window.show(self._drawn(episode), self._told(episode))

    def _drawn(self, episode: Episode) -> Image:
        return self.draw(episode.sample, None if episode.score is None else episode.score.prediction)

    def _told(self, episode: Episode) -> str:
        """The conversation, and the reward of its answers with its terms."""
        observation, score = episode.observation, episode.score
        turns = [f"{turn['role']}: {turn['text']}" for turn in observation["turns"]]
        told = [*turns, f"prompt: {observation['prompt']}"]
        if episode.has_ended and score is not None:
            terms = ", ".join(f"{name} {value:.3g}" for name, value in score.terms.items())
            told += [f"answer: {episode.texts[-1]}", f"reward: {score.reward:.3g} ({terms})"]
            told += [f"truth: {self.target(episode.sample)}"]
        return visible_lines("\n".join(told))

    def show(self, index: int) -> tuple[Sample, Observation]:
        """Loads a sample, and returns it with its observation.

        Raises:
            SampleError: The sample cannot be read.
        """
        try:
            sample = self.source.get(index)
        except DataError as error:
            raise SampleError(index, str(error)) from error
        return sample, self.observe(sample)

    def observe(self, sample: Sample) -> Observation:
        """The observation of a sample. Images are copies, at the size that `coordinates` and `image_bound` need."""
        observation: Observation = {
            "images": tuple(map(self._shown, sample.images, sample.full_sizes)),
            "prompt": self._placed_prompt(sample),
            "turns": self.turns(sample),
        }
        if self.takes_videos:
            observation["videos"] = sample.videos
        return observation

    def prompt(self, question: str) -> str:
        """The prompt for a question."""
        return self._filled(self.template).replace("{question}", question)

    def turns(self, sample: Sample) -> tuple[Turn, ...]:
        """The turns before a sample's prompt: the system turn, the row's own or the task's, and the row's others."""
        if self.system_prompt is None or (sample.turns and sample.turns[0]["role"] == "system"):
            return sample.turns
        return ({"role": "system", "text": self._filled(self.system_prompt)}, *sample.turns)

    def _filled(self, template: str) -> str:
        """A template with all its placeholders filled but `{question}`."""
        text = template.replace("{answer}", self.answer_format.example(self._example))
        text = text.replace("{none}", self.answer_format.answer_only(NONE))
        return text.replace("{coordinates}", self.coordinates.description)

    def _placed_prompt(self, sample: Sample) -> str:
        """The prompt. Marks that only begin the question precede its template too, as images without marks do."""
        marks, rest = split_marks(sample.question) if sample.images else (0, "")
        if not marks or IMAGE_MARK in rest:
            return self.prompt(sample.question)
        return IMAGE_MARK * marks + self.prompt(rest)

    def score(self, text: str, sample: Sample) -> Score:
        """Scores an answer to a sample. Any text is valid; a text without a readable answer scores 0.

        Raises:
            TypeError: `text` is no string.
            RewardError: A term failed, or its value is not finite.
        """
        return self.score_batch([text], [sample])[0]

    def score_batch(
        self,
        texts: Sequence[str],
        samples: Sequence[Sample],
        *,
        final: bool = True,
        earlier: Sequence[Sequence[str]] | None = None,
    ) -> list[Score]:
        """Scores N answers, each to its sample, as `score` does. Batch terms run once over all of them.

        Args:
            texts: [N].
            samples: [N].
            final: If false, the episodes go on after these answers, and only `turn_terms` score them.
            earlier: [N], the episodes' answers before. Default: none.
        """
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"an action is a string, not {type(text).__name__}")
        predictions = [self.parse(text) for text in texts]
        scorer = self._scorer if final else self._turn_scorer
        if scorer is None:
            return [Score(0.0, {}, prediction, {}) for prediction in predictions]
        return scorer(texts, [self.target(sample) for sample in samples], samples, predictions, earlier)

    def scorer(self, rewards: Rewards) -> Scorer:
        """A scorer of this task's answers with the given terms.

        Args:
            rewards: Terms with weights, as in the argument of the same name.

        Raises:
            ConfigError: A term is unknown, or its name or weight is invalid.
            ModelError: A term's model cannot be loaded.
        """
        return Scorer(
            self._terms,
            rewards,
            self.answer_format,
            self.count_tokens,
            exchangeable=self.row_terms.values(),
            registered=registered_rewards(type(self)),
        )

    def explain(self, score: Score, sample: Sample) -> dict[str, Any]:
        """The entries of `info` for a scored answer."""
        info = {"rewards": dict(score.terms), "weights": dict(score.weights)}
        info |= {"prediction": score.prediction, "target": self.target(sample)}
        if traits := self.traits(score.prediction, info["target"]):
            info["traits"] = traits
        return info | ({"seconds": dict(score.seconds)} if self.timing else {})

    def report(self, episode: Episode) -> dict[str, Any]:
        """The entries of `info` for the answers of an episode so far."""
        assert episode.score is not None
        info = self.explain(episode.score, episode.sample)
        if self.max_turns > 1:
            info["traits"] = {**info.get("traits", {}), "turns": float(len(episode.texts))}
        return info

    def identify(self, sample: Sample, index: int) -> dict[str, Any]:
        """The entries of `info` for a sample."""
        return {"id": sample.id, "index": index} | ({"subject": sample.subject} if sample.subject else {})

    def reading(
        self,
        columns: Mapping[str, str] | None = None,
        skip_broken: bool = False,
        min_image_side: int | None = None,
        without_text: Sequence[str] = (),
        boxes_in: str | None = None,
        box_orientation: str = BoxOrientation.SHOWN,
        confine_images: bool = False,
    ) -> Reading:
        """This task's reader for rows of a data set."""
        has_boxes = self.geometry is not None or type(self).map_boxes is not VisualTaskEnv.map_boxes
        if not has_boxes and (boxes_in is not None or box_orientation != BoxOrientation.SHOWN):
            raise ConfigError("boxes_in and box_orientation are for tasks whose truths are boxes")
        form = None if boxes_in is None else _one_of(BoxForm, "form of boxes", boxes_in)
        boxes = BoxReading(self.map_boxes, form, _one_of(BoxOrientation, "orientation", box_orientation))
        return Reading(
            self._understand,
            self.needs_image,
            self.takes_coco,
            columns or {},
            skip_broken,
            min_image_side,
            unread=self.unread,
            ignored=self.ignored_parts,
            without_text=without_text or (),
            boxes=boxes if has_boxes else None,
            bound=self.image_bound,
            confine_images=confine_images,
            layouts=self.layouts,
            frames=self.frame_rule if self.takes_videos else None,
            needs_video=self.needs_video,
        )

    def map_boxes(self, target: Any, change: Callable[[Box], Box]) -> Any:
        """A truth, as in `Sample.target`, with each of its boxes changed. Default: those of the task's `geometry`.

        It converts boxes that are not in pixels of the image as it is shown. Other places are converted corner by
        corner.
        """
        return target if self.geometry is None else convert(target, lambda place: changed_place(place, change))

    def ignored_parts(self, row: Row, target: Any) -> Collection[str]:
        """The parts of a row, by their names in `COLUMNS`, that its truth has no use for. Their presence is reported.

        Default: none. Parts that no row has a use for stand in `unread`.
        """
        return ()

    def row_term(self, row: Row) -> str | None:
        """The reward term that a row chooses in place of the one in use. None: the row chooses none.

        Raises:
            ValueError: The task has no such term.
        """
        if row.method in ("", "default"):
            return None
        if row.method not in self.row_terms:
            raise ValueError(f"accu_reward_method: {unknown_name('reward', row.method, self.row_terms)}")
        return self.row_terms[row.method]

    @property
    def _example(self) -> str:
        if self.answer_example is not None:
            return self.answer_example
        return "answer" if self.geometry is None else self.geometry.example

    def _set_budgets(self, max_turns: int | None, max_images: int | None) -> None:
        """Sets the budgets of an episode, which only a task of several turns has.

        Raises:
            ConfigError: A budget is below 1, or the task's episodes are one step.
        """
        given = {"max_turns": max_turns, "max_images": max_images}
        require_at_least(1, **given)
        named = [name for name, value in given.items() if value is not None]
        if named and type(self).max_turns == 1:
            raise ConfigError(f"episodes of {type(self).__name__} are one step: leave {' and '.join(named)} out")
        for name in named:
            setattr(self, name, given[name])

    def _set_interface(self, render_mode: str | None) -> None:
        """Sets the spaces and the way of rendering.

        Raises:
            ConfigError: There is no such way.
        """
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ConfigError(unknown_name("render_mode", str(render_mode), self.metadata["render_modes"]))
        turn = spaces.Dict({"role": OneOfTexts(ROLES), "text": FreeText()})
        videos = {"videos": spaces.Sequence(VideoSpace())} if self.takes_videos else {}
        self.observation_space = spaces.Dict(  # type: ignore[assignment]
            {"images": spaces.Sequence(RGBImage()), "prompt": FreeText(), "turns": spaces.Sequence(turn), **videos}
        )
        self.action_space = FreeText()
        self.render_mode = render_mode

    def _set_rewards(self, rewards: Rewards, extra_terms: Mapping[str, RewardTerm]) -> None:
        """Sets the scorers of episodes and of their turns.

        Raises:
            ConfigError: A term is unknown, or nothing uses an extra one.
        """
        self._terms = {**self.terms, **extra_terms}
        self._scorer = self.scorer(rewards)
        every = {name: weight for name, weight in self.rewards.items() if name in self.turn_terms}
        self._turn_scorer = self.scorer(every) if every and self.max_turns > 1 else None
        if unused := set(extra_terms) - set(self._scorer.weights):
            raise ConfigError(f"nothing uses the reward term {', '.join(sorted(unused))}: give it a weight in rewards")

    def _frame_rule(self, fps: float | None, most: int | None, pixels: int | None) -> FrameRule:
        """The rule for the frames of videos, which only a task that takes videos has.

        Raises:
            ConfigError: A number is out of its range, or the task takes no videos.
        """
        given = {"video_fps": fps, "video_frames": most, "video_pixels": pixels}
        named = [name for name, value in given.items() if value is not None]
        if named and not self.takes_videos:
            raise ConfigError(f"{type(self).__name__} takes no videos: leave {' and '.join(named)} out")
        chosen = {"fps": fps, "most": most, "pixels": pixels}
        return FrameRule(**{name: value for name, value in chosen.items() if value is not None})  # type: ignore[arg-type]

    def _check_class(self) -> None:
        """Raises ConfigError if the task lacks a required class attribute."""
        name = type(self).__name__
        for attribute in ("terms", "default_rewards", "prompt_template"):
            if not hasattr(self, attribute):
                raise ConfigError(f"{name} sets no {attribute}: see docs/own_task.md for what a task must say")
        if self.takes_videos and self.max_turns > 1:
            raise ConfigError(f"{name} takes videos, which only tasks of one step can: leave max_turns at 1")
        if self.needs_video and not self.takes_videos:
            raise ConfigError(f"{name} needs a video, and takes none: set takes_videos to True")
        if self.geometry is not None and not self.needs_image:
            raise ConfigError(f"{name} has a geometry, whose places are in an image: leave needs_image True")

    def _checked_template(self, template: str) -> str:
        if "{question}" not in template:
            raise ConfigError("prompt_template must contain {question}, where the sample's question goes")
        self._check_coordinates(template)
        return template

    def _checked_system_prompt(self, text: str | None) -> str | None:
        if text is not None and IMAGE_MARK in text:
            raise ConfigError(f"system_prompt must not contain {IMAGE_MARK}: no image belongs to it")
        if text is not None and "{question}" in text:
            raise ConfigError(
                "system_prompt must not contain {question}: the question has its place in prompt_template"
            )
        self._check_coordinates(text or "")
        return text

    def _check_coordinates(self, template: str) -> None:
        if "{coordinates}" in template and self.geometry is None:
            raise ConfigError(
                f"the prompt says {{coordinates}}, but {type(self).__name__} declares no geometry, so nothing would "
                "convert its answers: set geometry = POINT (or POINTS, BOX, BOXES, DETECTIONS) in the class, or leave "
                "{coordinates} out"
            )

    def _understand(self, row: Row) -> Sample:
        if row.none and row.detections is None and self.geometry is not None:
            row = replace(row, answer="[]")
        if self.needs_answer and not row.answer and row.detections is None:
            hint = missing("answer", row.unused)
            told = f"no turn of the assistant, nothing in {columns_of('answer')}"
            raise ValueError(f"the row has no answer: {told}; {hint}")
        target, term = self.read_target(row), self.row_term(row)
        return Sample(
            row.id,
            (),
            row.question,
            target,
            subject=row.subject,
            term=term,
            response=row.response,
            turns=row.turns,
        )

    def _shown(self, image: Image, size: tuple[int, int]) -> Image:
        return resized(image, *self._shown_size(size))

    def _shown_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height at which an image of some full width and height is shown."""
        rule = self.coordinates.resize
        return bounded_size(*size, self.image_bound) if rule is None else rule.size(*size)

    def _open(
        self,
        dataset: Dataset | None,
        image_root: Any,
        split: str | None,
        reading: Reading,
    ) -> Source:
        if dataset is None or isinstance(dataset, Source):
            if image_root is not None or reading != self.reading():
                raise ConfigError(
                    "image_root, columns, skip_broken, min_image_side, without_text, boxes_in, box_orientation and "
                    "confine_images are for a data set of rows: give dataset too"
                )
            if isinstance(dataset, Source):
                if self.frame_rule != FrameRule():
                    raise ConfigError("video_fps, video_frames and video_pixels are for rows and built-in samples")
                return dataset
            if split not in (None, "train", "eval"):
                raise ConfigError(unknown_name("split", split, ("train", "eval")))
            return self.builtin_source("eval" if split == "eval" else "train")
        source = open_dataset(dataset, reading, image_root, split)
        if not source.size and source.unwanted:
            told = ", ".join(f"in {count} {reason}" for reason, count in source.unwanted.items())
            raise NoRowsError(f"no row is left: {len(source.faults)} are broken; {told}", source)
        if not source.size:
            first = source.faults[0]
            raise NoRowsError(f"every one of {len(source.faults)} rows is broken; the first: {first}", source)
        return source


class NoRowsError(DataError):
    """A data set without remaining rows.

    Attributes:
        source: The data set with its faults.
    """

    def __init__(self, message: str, source: TableSource | Concatenated) -> None:
        super().__init__(message)
        self.source = source


def check_index(index: SupportsIndex, size: int | None) -> int:
    """A sample's index, as a whole number within the source.

    Raises:
        ConfigError: The index is no whole number, negative or too large.
    """
    try:
        if isinstance(index, bool):
            raise TypeError
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


def _image_size(sample: Sample) -> tuple[int, int]:
    """Full width and height of the image that a sample's places refer to."""
    if not sample.asked_images:
        raise DataError(f"sample {sample.id} has no image for its answer to name places in")
    return sample.asked_sizes[0]
