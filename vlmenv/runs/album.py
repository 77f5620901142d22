"""The album of a run: small pictures and true places of the samples that its report shows."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal

from PIL import Image as PILImage

from vlmenv.core.errors import ConfigError, DataError
from vlmenv.core.files import readable_objects, write_atomic
from vlmenv.core.spaces import Image
from vlmenv.envs.geometry import labelled_places
from vlmenv.envs.rendering import strip_of

if TYPE_CHECKING:
    from vlmenv.envs.base import VisualTaskEnv
    from vlmenv.envs.data.source import Sample

Part = Literal["train", "eval"]

INDEX: Final = "index.jsonl"
LONGEST_SIDE: Final = 320
"""Pixels of a kept picture's longer side."""
MOST_IMAGES: Final = 4
"""Kept pictures of a sample."""
SHOWN: Final = 8000
"""Completions of training that a report shows."""
TASK: Final = "task.json"
"""File of an album with `describe_task`."""
_LOSSLESS: Final = 128 * 128
"""Pixels up to which pictures are kept bit for bit: they are drawings, and small anyway."""
_QUALITY: Final = 70
_THREADS: Final = 8


class Album:
    """Pictures of samples in a folder, a few kilobytes each, and a line per sample in index.jsonl.

    A line has these entries:

    - `key`: "train/INDEX" or "eval/INDEX", and "train/TASK/INDEX" in a mix; `id`; `question`.
    - `images`: `file`, and `width` and `height` of the full image; `left_out`: the number of further ones.
    - `asked`: the number of the image that places refer to.
    - `true`: labelled places in pixels of the full image.
    - `scale`: pixels per unit of an answer's coordinates, by axis. None: the task has no places.

    Args:
        folder: The folder, which is made with the first sample.
        task: The task whose samples are kept.
        part: The use of the task's samples.
        name: The task's name in a mix, which stands in keys before the index. Default: the run has one task.
    """

    def __init__(self, folder: Path, task: VisualTaskEnv, part: Part, name: str = "") -> None:
        self._folder, self._task, self._name = folder, task, name
        self._part = f"{part}/{name}" if name else part
        self._known = {key: (row.get("id"), row.get("question")) for key, row in read_album(folder).items()}
        self._begun = False

    def lacks(self, index: int, name: str) -> bool:
        """Whether a sample is not kept yet.

        Args:
            index: Its index.
            name: Its id.
        """
        return self._known.get(self._key(index), (None, None))[0] != name

    def _key(self, index: int) -> str:
        return f"{self._part}/{index}"

    def keep(self, indices: Iterable[int], loaded: Mapping[int, Sample] = MappingProxyType({})) -> dict[int, Sample]:
        """Keeps samples, and returns those that can be read.

        Args:
            indices: Their indices.
            loaded: Samples that need not be read again, by index.

        Raises:
            OSError: The folder cannot be written.
        """
        self._begin()
        wanted = list(dict.fromkeys(indices))
        with ThreadPoolExecutor(_THREADS) as pool:
            kept = list(pool.map(lambda index: self._kept(index, loaded.get(index)), wanted))
        new = [(sample, line) for sample, line in kept if line is not None]
        if new:
            with (self._folder / INDEX).open("a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(line) + "\n" for _, line in new)
        return {index: sample for (sample, _), index in zip(kept, wanted, strict=True) if sample}

    def _kept(self, index: int, loaded: Sample | None) -> tuple[Sample | None, dict[str, Any] | None]:
        """The sample and, if it is new, its line."""
        if loaded is None and self._task.unrepeatable:
            return None, None
        try:
            sample = loaded or self._task.source.get(index)
        except DataError:
            return None, None
        key, what = self._key(index), (sample.id, sample.question)
        if self._known.get(key) == what:
            return sample, None
        self._known[key] = what
        return sample, {"key": key, "id": sample.id, "question": sample.question, **self._pictures(sample, index)}

    def _begin(self) -> None:
        """Makes the folder, with the facts of the task; what is written behind a cut-off line gets its own line."""
        if self._begun:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        if not self._name:  # answers of a mix are judged one by one
            write_atomic(self._folder / TASK, json.dumps(describe_task(self._task), indent=2) + "\n")
        with (self._folder / INDEX).open("a+b") as stream:
            if stream.tell() and (stream.seek(-1, os.SEEK_END), stream.read(1))[1] != b"\n":
                stream.write(b"\n")
        self._begun = True

    def _pictures(self, sample: Sample, index: int) -> dict[str, Any]:
        shown = list(zip(sample.images, sample.full_sizes, strict=True))
        asked = len(shown) - len(sample.asked_images)
        strips = [strip_of(video) for video in sample.videos]
        shown += [(strip, (strip.shape[1], strip.shape[0])) for strip in strips]
        images = []
        for number, (image, (width, height)) in enumerate(shown[:MOST_IMAGES]):
            file = f"{self._part.replace('/', '-')}-{index}-{number}.webp"
            _save(image, self._folder / file)
            images.append({"file": file, "width": width, "height": height})
        places = self._task.geometry is not None and bool(sample.asked_images)
        return {
            "images": images,
            "left_out": len(shown) - len(images),
            "asked": asked,
            "true": marks(sample.target) if places else [],
            "scale": self._scale(sample) if places else None,
        }

    def _scale(self, sample: Sample) -> list[float]:
        """Pixels of the full image per unit of an answer's coordinates."""
        return list(self._task.coordinates.to_pixels((1.0, 1.0), *sample.asked_sizes[0]))


def marks(value: Any, scale: Sequence[float] = (1.0, 1.0)) -> list[list[Any]]:
    """Labelled places of a truth or an answer, in pixels, as JSON can hold them: a label and a flat list of x and y."""
    try:
        found = list(labelled_places(value))
        return [[label, [round(number * scale[i % 2], 2) for i, number in enumerate(place)]] for label, place in found]
    except (ConfigError, OverflowError, RecursionError):  # an odd number of coordinates, or no coordinate; depth
        return []


def is_right(task: VisualTaskEnv, sample: Sample, completion: str, terms: Mapping[str, float]) -> bool | None:
    """Whether the task counts a completion as right; None if the task's measure does not tell."""
    name, least = task.right
    value = terms.get(name)  # first, as some measures compare answers again
    if value is None:
        value = task.measure(completion, task.target(sample), terms).get(name)
    return None if value is None else bool(value >= least)


def read_album(folder: Path) -> dict[str, dict[str, Any]]:
    """The samples of an album by key. Lines that cannot be read are passed over; empty if there is no album."""
    return {row["key"]: row for row in readable_objects(folder / INDEX) if isinstance(row.get("key"), str)}


def _save(image: Image, file: Path) -> None:
    """Writes a small picture as WebP."""
    picture = PILImage.fromarray(image)
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), PILImage.Resampling.LANCZOS)
    small = picture.width * picture.height <= _LOSSLESS
    picture.save(file, "WEBP", lossless=small, quality=100 if small else _QUALITY, method=2)


def describe_task(task: VisualTaskEnv) -> dict[str, Any]:
    """The facts of a task that a report needs: its reward weights, and the measure of a right answer with its least
    value.
    """
    return {"rewards": task.rewards, "right": list(task.right)}


def groups_shown(step: int, steps: int, group_size: int, most: int = SHOWN) -> int:
    """Number of a step's groups that a report shows, so that a run has at most about `most` completions to show."""
    per_step = most / (steps * group_size)
    if per_step >= 1:
        return int(per_step)
    return int(step % math.ceil(1 / per_step) == 1)
