"""Numbers of tokens of a data set's prompts: counted before anything is generated, from texts and image headers."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

import vlmenv
from vlmenv.agents.families import Family
from vlmenv.core.console import open_console, say
from vlmenv.core.errors import DataError
from vlmenv.core.files import atomic_file, file_digest
from vlmenv.core.rollout import Observation
from vlmenv.envs.base import VisualTaskEnv
from vlmenv.envs.data.dataset import Concatenated, TableSource
from vlmenv.evaluation import progress
from vlmenv.runs.data import row_digests

_AT_ONCE: Final = 512
"""Prompts that are made and counted together."""
_THREADS: Final = 8
_KEPT: Final = 1024
"""Least number of prompts whose counts are kept in the cache."""
_TRIED: Final = 64
"""Prompts that are counted again when the others are found in the cache."""


@dataclass(frozen=True)
class Lengths:
    """The lengths of the prompts of a source's samples."""

    tokens: NDArray[np.int32]
    """[samples], 0 for those in `faults`"""
    faults: Mapping[int, str] = field(default_factory=dict)
    """by sample, its place and why the model cannot take its prompt"""

    def above(self, most: int) -> list[int]:
        """The samples with more tokens than a limit."""
        return [int(index) for index in np.flatnonzero(self.tokens > most)]

    def without(self, indices: Sequence[int]) -> Lengths:
        """The lengths of the other samples."""
        left = np.delete(np.arange(len(self.tokens)), list(indices))
        moved = {int(old): new for new, old in enumerate(left)} if self.faults else {}
        return Lengths(self.tokens[left], {moved[i]: fault for i, fault in self.faults.items() if i in moved})

    def __str__(self) -> str:
        known = np.delete(self.tokens, list(self.faults))
        if not len(known):
            return "no prompts"
        median, most, nearly = np.percentile(known, (50, 90, 99)).astype(int)
        least, longest = int(known.min()), int(known.max())
        return (
            f"{len(known):,} prompts of {least:,} to {longest:,} tokens: the median has {median:,}, 90 % have up to "
            f"{most:,}, 99 % up to {nearly:,}"
        )

    def figures(self) -> dict[str, int]:
        """Their number, percentiles and maximum, for a record."""
        known = np.delete(self.tokens, list(self.faults))
        if not len(known):
            return {"prompts": 0}
        names, shares = ("median", "p90", "p99", "longest"), (50, 90, 99, 100)
        return {"prompts": len(known)} | dict(zip(names, map(int, np.percentile(known, shares)), strict=True))


def can_be_counted(task: VisualTaskEnv) -> bool:
    """Whether a task's samples are rows of a data set, whose lengths can be counted beforehand."""
    return isinstance(task.source, TableSource | Concatenated)


def count_tokens(task: VisualTaskEnv, family: Family, console: Console, *, first: int | None = None) -> Lengths:
    """Counts the tokens of prompts. Of large data sets the counts are kept in the cache, and a few are tried again.

    Args:
        task: With the options of the run: prompts, coordinates, bound of images.
        family: The model's; `weightless_family` suffices.
        console: Shows the progress.
        first: Number of samples to count, from the first one. Default: all.
    """
    count = min(task.source.size or 0, first if first is not None else sys.maxsize)
    if count < _KEPT:
        return _counted(task, family, range(count), console)
    file = cache_folder() / f"{_key(task, family, count)}.npy"
    if (kept := _read(file, count)) is not None:
        tried = np.linspace(0, count - 1, _TRIED).astype(int)
        again = _counted(task, family, tried.tolist(), open_console(quiet=True))
        if not again.faults and np.array_equal(again.tokens, kept[tried]):
            return Lengths(kept)
    lengths = _counted(task, family, range(count), console)
    if not lengths.faults:
        _keep(file, lengths.tokens, console)
    return lengths


def _counted(task: VisualTaskEnv, family: Family, indices: Sequence[int], console: Console) -> Lengths:
    tokens, faults = np.zeros(len(indices), np.int32), dict[int, str]()
    with progress("counting the tokens of prompts", len(indices), console) as advance:
        done = 0
        for some in _outlined(task, indices):
            known = [one for _, one, _ in some if not isinstance(one, str)]
            counts = iter(family.lengths(known))
            for place, (index, one, name) in enumerate(some, done):
                length = one if isinstance(one, str) else next(counts)
                if isinstance(length, int):
                    tokens[place] = length
                else:
                    faults[index] = length if isinstance(length, str) else f"{name}: {length}"
            done += len(some)
            advance(len(some))
    return Lengths(tokens, faults)


_Outlined = tuple[int, Observation | str, str]
"""The index of a sample, its observation with blank images or why there is none, and its place."""


def _outlined(task: VisualTaskEnv, indices: Sequence[int]) -> Iterator[Sequence[_Outlined]]:
    """Samples in their order, the next ones read while some are counted."""

    def read(some: Sequence[int]) -> list[_Outlined]:
        return [_outline(task, index) for index in some]

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="vlmenv-lengths") as pool:
        waiting = []
        for some in _cut(indices, _AT_ONCE):
            share = -(-len(some) // _THREADS)
            waiting.append([pool.submit(read, one) for one in _cut(some, share)])
            if len(waiting) > 2:
                yield [one for part in waiting.pop(0) for one in part.result()]
        for parts in waiting:
            yield [one for part in parts for one in part.result()]


def _cut(indices: Sequence[int], size: int) -> list[Sequence[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _outline(task: VisualTaskEnv, index: int) -> _Outlined:
    try:
        sample = task.source.outline(index)
    except DataError as error:
        return index, str(error), ""
    return index, task.observe(sample), task.source.place(index, sample.id)


def cache_folder() -> Path:
    """Folder of the counts: `lengths` in `VLMENV_CACHE`, by default `~/.cache/vlmenv`."""
    root = os.environ.get("XDG_CACHE_HOME")
    default = (Path(root) if root else Path.home() / ".cache") / "vlmenv"
    return Path(os.environ.get("VLMENV_CACHE") or default) / "lengths"


def _read(file: Path, count: int) -> NDArray[np.int32] | None:
    try:
        found: NDArray[np.int32] = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == (count,) and found.dtype == np.int32 else None


def _keep(file: Path, tokens: NDArray[np.int32], console: Console) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as partial, partial.open("wb") as stream:
            np.save(stream, tokens)
    except OSError as error:
        say(f"the counts cannot be kept for the next start: {file.parent}: {error.strerror}", console)


def _key(task: VisualTaskEnv, family: Family, count: int) -> str:
    """A checksum of what decides the lengths: rows, images, processor, and how the task makes prompts."""
    digest = hashlib.sha256()
    for row in row_digests(task.source):
        digest.update(row)
    told = [vlmenv.__version__, count, *_of_images(task), *_of_task(task), *_of_model(family)]
    digest.update(json.dumps(told, default=str).encode())
    return digest.hexdigest()[:32]


def _of_images(task: VisualTaskEnv) -> Iterator[Any]:
    source = task.source
    for part in source.sources if isinstance(source, Concatenated) else [source]:
        assert isinstance(part, TableSource)
        yield from (part.root, part.images.stamp, part.columns)


def _of_task(task: VisualTaskEnv) -> Iterator[Any]:
    yield from (
        task.template,
        task.system_prompt,
        task.answer_format,
        task.coordinates,
        task.image_bound,
        task.frame_rule,
    )
    for kind in type(task).__mro__:
        file = getattr(sys.modules.get(kind.__module__), "__file__", None)
        yield kind.__qualname__
        if file is not None and Path(file).is_file():
            yield file_digest(Path(file))


def _of_model(family: Family) -> Iterator[Any]:
    processor = family.processor
    yield from (family.model_type, processor.chat_template, dict(processor.chat_template_kwargs))
    yield processor.image_processor.to_dict()
    yield family.model.config.to_dict()
    backend = getattr(processor.tokenizer, "backend_tokenizer", None)
    yield hashlib.sha256(
        repr(processor.tokenizer.get_vocab() if backend is None else backend.to_str()).encode()
    ).hexdigest()
