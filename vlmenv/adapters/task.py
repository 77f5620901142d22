"""A task as other trainers take it: samples by portable numbers, messages, keys, scores."""

from __future__ import annotations

import base64
import importlib
import io
import itertools
import json
import operator
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from numbers import Integral
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
from PIL import Image as PILImage

from vlmenv.core.coordinates import ResizeRule
from vlmenv.core.errors import ConfigError, DataError, SampleError, require
from vlmenv.core.files import located_name
from vlmenv.core.rollout import IMAGE_MARK, Observation, Turn, count_marks
from vlmenv.core.spaces import Image
from vlmenv.envs.base import check_index
from vlmenv.envs.data.source import order_of
from vlmenv.envs.episodes import Episode, advance
from vlmenv.envs.making import make_envs
from vlmenv.envs.scoring import Score

PORTABLE: Final = 2**53
"""Sample numbers that leave the process are below this: readers of JSON that use float64 keep them."""

_RULES: Final = ("resize", "image_bound")

_OF_GROUPS: Final = frozenset({"group_size", "shard", "num_shards", "answers", "revisit"})
"""Arguments of vector environments, which have no effect on samples and scores."""

_OPENING: Final = threading.Lock()
"""Held while a task is made, so that threads that score do not make it several times."""

Part = dict[str, Any]
"""A block of a message's content, as `{"type": "text", "text": …}`."""


class PortableTask:
    """A task whose samples other processes and frameworks name by number. Several threads may use it.

    Args:
        env: Id of a visual task, as in `gymnasium.make`; `module:Id` imports the module that registers it.
        arguments: The task's own arguments.

    Raises:
        ConfigError: There is no such environment, or it is no visual task.
        DataError: The data set cannot be read.
    """

    def __init__(self, env: str, **arguments: Any) -> None:
        self.env = env
        groups = ", ".join(sorted(_OF_GROUPS & arguments.keys()))
        require(not groups, f"{groups}: another trainer makes groups and their order itself; leave it out here")
        paths = {name: _absolute(arguments[name]) for name in ("dataset", "image_root") if name in arguments}
        self.arguments = arguments | paths  # which hold in processes with another working directory
        self.task = make_envs(env, 1, **self.arguments).task
        require(not self.task.takes_videos, f"{env} takes videos, and other trainers are given images alone")
        require(
            not self.task.unrepeatable, f"{self.task.unrepeatable}, so no number names a sample for other processes"
        )
        self._lock = threading.Lock()

    def require_one_turn(self, why: str) -> None:
        """Raises ConfigError if the task's episodes have several turns, for which there is no place `why`."""
        require(self.task.max_turns == 1, f"{self.env} has episodes of several turns, and {why}: give max_turns=1")

    def indices(self, rows: int | None, seed: int) -> list[int]:
        """The numbers of the first samples in the order of a seed.

        Args:
            rows: How many. None: all of a data set.
            seed: Seed of the order.

        Raises:
            ConfigError: There are not as many, or an endless source is to be taken whole.
        """
        size = self.task.source.size
        if rows is None and size is None:
            raise ConfigError(f"{self.env} draws endlessly many samples: say how many rows you want")
        require(isinstance(rows, Integral | None), f"rows is a whole number, not {rows!r}")
        require(rows is None or rows >= 1, f"rows must be at least 1, not {rows}")
        require(not size or (rows or 0) <= size, f"rows is {rows}, but the data set has {size} samples")
        return list(itertools.islice(self.numbers(seed), rows or size))

    def numbers(self, seed: int) -> Iterator[int]:
        """The numbers of the samples in the order of a seed, without end. A data set begins again, shuffled anew.

        Raises:
            ConfigError: The seed is no whole number of at least 0.
        """
        require(isinstance(seed, int) and seed >= 0, f"seed is a whole number of at least 0, not {seed!r}")
        order = order_of(np.random.default_rng(seed), self.task.source.size)
        return (order[place] % PORTABLE for place in itertools.count())

    def readable(self, numbers: Iterable[int]) -> Iterator[tuple[int, Observation]]:
        """The samples of some numbers with their observations; with `skip_broken`, those that can be read.

        The end of the numbers warns about samples that have been left out.

        Raises:
            SampleError: A sample cannot be read.
            DataError: With `skip_broken`, none of the samples can be read.
        """
        broken: list[SampleError] = []
        count = 0
        for count, index in enumerate(numbers, 1):  # noqa: B007
            try:
                yield index, self.observation(index)
            except SampleError as error:
                if not self.task.skip_broken:
                    raise
                broken.append(error)
        if not broken:
            return
        told = f"{len(broken)} of {count} samples cannot be read; the first: {broken[0]}"
        if len(broken) == count:
            raise DataError(told)
        warnings.warn(f"left out: {told}", RuntimeWarning, stacklevel=2)

    def next_readable(self, numbers: Iterator[int]) -> tuple[int, Observation]:
        """The first sample of `readable`, from numbers without end.

        Raises:
            SampleError: The sample cannot be read.
            DataError: With `skip_broken`, no sample of the data set can be read.
        """
        size = self.task.source.size
        tried = itertools.islice(numbers, size and 2 * size)  # an order may end and begin with one sample
        return next(self.readable(tried))

    def observation(self, index: int) -> Observation:
        """A sample's observation.

        Raises:
            ConfigError: There is no such sample.
            SampleError: The sample cannot be read.
        """
        return self.task.show(self._number(index))[1]

    def score(self, texts: Sequence[str], indices: Sequence[int]) -> list[Score]:
        """Scores N completions, each to the sample of its number.

        Raises:
            ConfigError: There is no such sample, or its episode has several turns.
            SampleError: A sample cannot be read.
            TypeError: A completion is no string.
            RewardError: A term failed, or its value is not finite.
        """
        self.require_one_turn("a completion alone is none")
        require(len(texts) == len(indices), f"{len(texts)} completions came with {len(indices)} samples")
        with self._lock:
            numbers = list(map(self._number, indices))
            samples = {number: self.task.show(number)[0] for number in dict.fromkeys(numbers)}
            return self.task.score_batch(list(texts), [samples[number] for number in numbers])

    def begin(self, index: int) -> Episode:
        """An episode on the sample of a number.

        Raises:
            ConfigError: There is no such sample.
            SampleError: The sample cannot be read.
        """
        return Episode(*self.task.show(self._number(index)))

    def answer(self, episode: Episode | None, text: str, *, last: bool = False) -> float:
        """Gives an episode its next answer, and returns the reward of that answer.

        Args:
            episode: The episode.
            text: The answer.
            last: See `advance`.

        Raises:
            ConfigError: The episode has ended, or None has begun.
            TypeError: The answer is no string.
            RewardError: A term failed, or its value is not finite.
        """
        if episode is None or episode.has_ended:
            raise ConfigError("the episode has ended, or none has begun: reset the environment before each episode")
        with self._lock:
            return advance(self.task, [episode], [text], last=last)[0]

    def _number(self, index: Any) -> int:
        return check_index(_whole(index), self.task.source.size)

    def key(self, index: int) -> str:
        """A sample as text that `judged` reads in any process.

        Raises:
            ConfigError: An argument of the task cannot be written as JSON.
        """
        return json.dumps({"env": self.env, "index": index, "arguments": _portable(self.arguments)})


def judged(texts: Sequence[str], keys: Sequence[str]) -> list[Score]:
    """Scores N completions, each to the sample that a `PortableTask.key` names. Tasks are made once per process.

    Several threads may call it.

    Raises:
        ConfigError: A key names no sample.
        SampleError: A sample cannot be read.
        RewardError: A term failed, or its value is not finite.
    """
    require(len(texts) == len(keys), f"{len(texts)} completions came with {len(keys)} keys of samples")
    scores: list[Score | None] = [None] * len(keys)
    for task, rows in _by_task(keys).items():
        found = _opened_once(task).score([texts[row] for row, _ in rows], [index for _, index in rows])
        for (row, _), score in zip(rows, found, strict=True):
            scores[row] = score
    return [score for score in scores if score is not None]


def observed(key: str) -> Observation:
    """The observation of the sample that a `PortableTask.key` names. Tasks are made once per process.

    Raises:
        ConfigError: The key names no sample.
        SampleError: The sample cannot be read.
    """
    ((task, ((_, index),)),) = _by_task([key]).items()
    return _opened_once(task).observation(index)


def flat(score: Score, total: str) -> dict[str, float]:
    """A score as numbers by name: its reward under the name `total`, and its terms."""
    terms = {(f"term_{name}" if name == total else name): value for name, value in score.terms.items()}
    return {total: score.reward, **terms}


def messages(observation: Observation, part: Callable[[Image], Part]) -> list[dict[str, Any]]:
    """An observation as messages whose contents are lists of blocks, with the images in their places.

    Args:
        observation: The observation.
        part: Gives the block of an image.

    Raises:
        ConfigError: Marks and images differ in number.
    """
    images = iter(observation["images"])
    return [{"role": role, "content": _content(pieces, images, part)} for role, pieces in _pieces(observation)]


def reply(observation: Observation, part: Callable[[Image], Part]) -> dict[str, Any]:
    """The last of the `messages` of an episode: what the environment has written to the last answer.

    Args:
        observation: The conversation so far.
        part: Gives the block of an image.
    """
    role, pieces = _pieces(observation)[-1]
    return {"role": role, "content": _content(pieces, iter(reply_images(observation)), part)}


def reply_images(observation: Observation) -> tuple[Image, ...]:
    """The images of the last turn of an episode."""
    images = observation["images"]
    return images[len(images) - count_marks(observation["prompt"]) :] if images else ()


def marked_messages(observation: Observation) -> list[dict[str, str]]:
    """An observation as messages of text, with `<image>` in the place of each image.

    Raises:
        ConfigError: `<image>` stands in a text where no image is, or marks and images differ in number.
    """
    turns = _pieces(observation)
    if any(IMAGE_MARK in one for _, pieces in turns for one in pieces if one is not None):
        raise ConfigError(f"a text says {IMAGE_MARK} where no image is; this trainer would look for one there")
    return [
        {"role": role, "content": "".join(IMAGE_MARK if one is None else one for one in pieces)}
        for role, pieces in turns
    ]


def completion_text(completion: Any) -> str:
    """The text of a completion: a string, a message, or several whose last one counts; empty for None.

    Raises:
        TypeError: It is something else.
    """
    last = completion[-1:] if isinstance(completion, list | tuple) else [completion]
    content = last[0] if last else None
    if isinstance(content, Mapping):
        content = content.get("content")
    if isinstance(content, list | tuple):
        return "".join(one if isinstance(one, str) else str(one.get("text") or "") for one in content)
    if not isinstance(content, str | None):
        raise TypeError(f"a completion is a text or messages, not {str(completion)[:80]}")
    return content or ""


def picture(image: Image) -> PILImage.Image:
    """An image for Pillow."""
    return PILImage.fromarray(image)


def png(image: Image) -> bytes:
    """An image as the bytes of a PNG file, which keeps every pixel."""
    buffer = io.BytesIO()
    picture(image).save(buffer, "PNG")
    return buffer.getvalue()


def image_url(image: Image) -> Part:
    """An image as a block of OpenAI's messages."""
    return {"type": "image_url", "image_url": {"url": data_url(image)}}


def data_url(image: Image) -> str:
    """An image as a `data:` URL."""
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def imported(module: str, package: str, extra: str) -> ModuleType:
    """A framework's module.

    Raises:
        ConfigError: It is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f'{package} cannot be imported ({error}). Install it with pip install "vlmenv[{extra}]"'
        ) from error


def _pieces(observation: Observation) -> list[tuple[str, list[str | None]]]:
    """The turns by their roles, each as texts with None in the place of an image."""
    asked: Turn = {"role": "user", "text": observation["prompt"]}
    turns = [*observation.get("turns", ()), asked]
    images = len(observation["images"])
    marks = count_marks(observation["prompt"], observation.get("turns", ())) if images else 0
    require(marks in (0, images), f"the prompt has {marks} {IMAGE_MARK} marks for {images} images")
    if marks:
        return [(one["role"], [one["text"]] if one["role"] == "assistant" else _split(one["text"])) for one in turns]
    found: list[tuple[str, list[str | None]]] = [(one["role"], [one["text"]]) for one in turns]
    found[-1][1][:0] = [None] * images  # images without marks precede the prompt
    return found


def _content(pieces: Sequence[str | None], images: Iterator[Image], part: Callable[[Image], Part]) -> list[Part]:
    """Blocks of a turn's texts, and of the next images in their places."""
    return [part(next(images)) if one is None else _text(one) for one in pieces]


def _split(text: str) -> list[str | None]:
    """A text with None in the place of each mark."""
    split: list[str | None] = []
    for part in text.split(IMAGE_MARK):
        split += [None, part]
    return [one for one in split[1:] if one != ""]


def _text(text: str) -> Part:
    return {"type": "text", "text": text}


def _by_task(keys: Sequence[str]) -> dict[str, list[tuple[int, int]]]:
    """Rows with their samples' numbers, by task."""
    rows: dict[str, list[tuple[int, int]]] = {}
    for row, key in enumerate(keys):
        try:
            read = json.loads(key)
            task = json.dumps([read["env"], read["arguments"]], sort_keys=True)
            rows.setdefault(task, []).append((row, operator.index(_whole(read["index"]))))
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f"'{str(key)[:80]}' names no sample: the truth of a row is what `vlmenv data export` has written in it"
            ) from None
    return rows


def _whole(index: Any) -> Any:
    """A sample's number, which readers of JSON and of tables may have made a float.

    Raises:
        ConfigError: It is a truth value, which would pass as 0 or 1.
    """
    require(not isinstance(index, bool), f"a sample's index is a whole number, not {index}")
    return int(index) if isinstance(index, float) and index.is_integer() else index


def _opened_once(task: str) -> PortableTask:
    with _OPENING:
        return _opened(task)


@lru_cache(maxsize=16)
def _opened(task: str) -> PortableTask:
    env, arguments = json.loads(task)
    rules = {name: ResizeRule(**arguments[name]) for name in _RULES if arguments.get(name) is not None}
    return PortableTask(env, **arguments | rules)


def _portable(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as JSON can hold them."""
    found = {name: asdict(one) if isinstance(one, ResizeRule) else one for name, one in arguments.items()}
    for name, value in found.items():
        try:
            json.dumps(value)
        except TypeError:
            raise ConfigError(
                f"{name} is a {type(value).__name__}, which the processes that score could not make again: give names "
                "and paths, as on the command line"
            ) from None
    return found


def _absolute(given: Any) -> Any:
    """A path, or several, that do not depend on the working directory. Names of data sets stay."""
    if isinstance(given, list | tuple):
        return [_absolute(one) for one in given]
    return located_name(str(given)) if isinstance(given, str | Path) else given
