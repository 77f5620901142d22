"""Opens data sets of every layout as sources of samples."""

from __future__ import annotations

import gzip
import operator
import os
import shutil
import stat
import tempfile
import weakref
import zlib
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np

from vlmenv.core.coordinates import ResizeRule
from vlmenv.core.errors import ConfigError, DataError
from vlmenv.core.names import hub_name
from vlmenv.core.spaces import Image
from vlmenv.core.video import FrameRule, Video
from vlmenv.envs.data.boxes import BoxForm, BoxReading, size_fault
from vlmenv.envs.data.coco import CocoInstances
from vlmenv.envs.data.convert import find_layout
from vlmenv.envs.data.delimited import Delimited
from vlmenv.envs.data.images import Size, image_size, load_image, outline_image
from vlmenv.envs.data.layouts import RowLayout
from vlmenv.envs.data.media import ImageRef, VideoRef
from vlmenv.envs.data.rows import Row, check_columns, missing, read_row
from vlmenv.envs.data.source import Sample, Source
from vlmenv.envs.data.tables import (
    HuggingFace,
    JSONById,
    JSONLines,
    JSONList,
    Rewritten,
    Rows,
    Table,
    json_layout,
    require_datasets,
)
from vlmenv.envs.data.usage import Usage
from vlmenv.envs.data.videos import check_video, files_of, load_video, outline_video

Dataset = Any
"""A path or hub id, several paths, a data set of the library `datasets`, or a list of rows."""


@dataclass(frozen=True)
class Published:
    """A file in its own layout, with a converter to rows. It can stand wherever a path may."""

    file: Path
    rewrite: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    """converts a stored row to the usual columns; raises ValueError or KeyError if it cannot"""


@dataclass(frozen=True)
class Reading:
    """A task's reading of rows.

    Raises:
        ConfigError: `columns` has the name of no part of a row.
    """

    understand: Callable[[Row], Sample]
    """makes a sample without images from a row; raises ValueError if it cannot"""
    needs_image: bool = True
    """whether a row without an image is broken"""
    takes_coco: bool = False
    """whether COCO's instances make rows of this task"""
    columns: Mapping[str, str] = field(default_factory=dict)
    """the columns of parts of a row"""
    skip_broken: bool = False
    """leave broken rows out, instead of refusing the data set"""
    min_image_side: int | None = None
    """leave rows out with an image that has fewer pixels than this in width or height"""
    unread: Collection[str] = ()
    """parts of a row that the task does not use"""
    ignored: Callable[[Row, Any], Collection[str]] = lambda row, target: ()
    """parts of one row that its truth has no use for, such as the tolerance of words"""
    without_text: Sequence[str] = ()
    """leave rows out whose answer, reasoning included, contains one of these, in small letters or capitals"""
    boxes: BoxReading | None = None
    """form of true boxes; None if the task has none"""
    bound: ResizeRule | None = None
    """rule for images that are too large to be shown as they are; see `load_image`"""
    confine_images: bool = False
    """whether a row with an image outside the folder of images is broken"""
    layouts: tuple[RowLayout, ...] = ()
    """layouts of the task's own public data sets"""
    frames: FrameRule | None = None
    """rule for the frames of videos; None if the task takes no videos"""
    needs_video: bool = False
    """whether a row without a video is broken"""

    def __post_init__(self) -> None:
        check_columns(self.columns)
        if unused := [part for part in self.columns if part in self.unread]:
            raise ConfigError(f"columns: the task does not read {' or '.join(unused)}")
        if self.min_image_side is not None and self.min_image_side < 1:
            raise ConfigError(f"min_image_side must be at least 1, not {self.min_image_side}")
        if isinstance(self.without_text, str) or not all(self.without_text):
            raise ConfigError("without_text is a list of texts, none of them empty")

    def sample(self, raw: Any, number: int) -> tuple[Sample, tuple[ImageRef, ...]]:
        """A row's sample without images, and the places of its images.

        Raises:
            ValueError: The row is broken.
            UnwantedError: The row is to be left out.
        """
        row = self.row(raw, number)
        return self.sample_of(row), row.images

    def row(self, raw: Any, number: int) -> Row:
        """Reads a stored row.

        Raises:
            ValueError: It is broken.
        """
        if isinstance(raw, ValueError):
            raise raw
        return raw if isinstance(raw, Row) else read_row(raw, number, self.columns, self.unread, self.layouts)

    def sample_of(self, row: Row) -> Sample:
        """The task's sample of a row; raises as `sample` does."""
        said = (row.response or row.answer).casefold() if self.without_text else ""
        for text in self.without_text:
            if text.casefold() in said:
                raise UnwantedError(f"the answer says {text!r}")
        if self.needs_image and not row.images:
            raise ValueError(f"the task needs an image, but the row has none; {missing('images', row.unused)}")
        if row.videos and self.frames is None:
            column = next(column for part, column in row.used if part == "videos")
            raise ValueError(
                f"the row has a video in '{column}', and the task shows images only: take VLM-VideoQA-v0 or "
                "VLM-Temporal-v0, store frames as 'images', or leave the video out by --columns videos ''"
            )
        if self.needs_video and not row.videos:
            raise ValueError(f"the task needs a video, but the row has none; {missing('videos', row.unused)}")
        return self.understand(row if self.boxes is None else self.boxes.as_corners(row))


class UnwantedError(Exception):
    """A row that is to be left out; the message has the rule."""


_MadeOf = tuple[int, tuple[tuple[str, str], ...], tuple[str, ...], tuple[str, ...]]
"""The usage of a row: its number of images, its used and unused columns, and decisions."""
_Read = tuple[int, "_MadeOf | ValueError | UnwantedError", Row | None, tuple[int, int] | None]
"""The number of a row, its usage or fault, the row unless it is at fault, and the size to compare."""
_ROWS = 1024  # looked at together
_SIZED = (
    1000  # rows whose images are opened at once, to compare their sizes; the others are compared when they are shown
)
_THREADS = 16  # that ask the disk for images
_AHEAD = 8  # blocks of rows that are read while the disk is asked


@dataclass
class ImageCheck:
    """What looking for the images of a data set's rows has found."""

    faults: dict[int, ValueError | UnwantedError] = field(default_factory=dict)
    """by row, why it cannot be used"""
    stamp: int = 0
    """sum over the images of checksums of their files' names, sizes and times of change"""

    def add(self, other: ImageCheck) -> None:
        """Adds what was found in other rows."""
        self.faults |= other.faults
        self.stamp += other.stamp


ImageChecks = dict[tuple[str, str, int | None], ImageCheck]
"""By data set, folder of images and least side of an image."""
_REMEMBERED: ContextVar[tuple[ImageChecks, bool] | None] = ContextVar("image checks", default=None)


@contextmanager
def checked_once(*, look: bool = True) -> Iterator[ImageChecks]:
    """Within the block, the images of each stored data set are looked for once, however often it is opened.

    Args:
        look: If false, they are not looked for: another process does, and `adopt_images` takes over what it finds.

    Yields:
        What is found.
    """
    checks: ImageChecks = {}
    token = _REMEMBERED.set((checks, look))
    try:
        yield checks
    finally:
        _REMEMBERED.reset(token)


def adopt_images(source: Source, checks: ImageChecks) -> None:
    """Leaves out rows whose images another process has not found, in a source for which they were not looked for."""
    for part in source.sources if isinstance(source, Concatenated) else [source]:
        if isinstance(part, TableSource) and part.key in checks:
            part.adopt(checks[part.key])
    if isinstance(source, Concatenated):
        source.sum_up()


def _usage(made_of: Mapping[_MadeOf, int]) -> Usage:
    """The sum over the rows."""
    usage = Usage()
    for (images, used, unused, notes), rows in made_of.items():
        usage.add(images, used, unused, notes, rows)
    return usage


class TableSource(Source):
    """The samples of a table. Every row is checked when it is opened.

    Args:
        table: The rows.
        image_root: Folder that image paths are relative to.
        reading: The task's reading of rows.
        name: Name of the stored data set, by which `checked_once` knows it. Default: none.

    Attributes:
        images: What looking for the images has found.
        faults: Place and fault of each broken row that is left out.
        unwanted: Number of rows left out on request, by the reason.
        usage: The columns that samples are made of.

    Raises:
        DataError: A row is broken, unless such rows are to be left out; the message names its place.
    """

    reads_files = True

    def __init__(self, table: Table, image_root: str, reading: Reading, name: str = "") -> None:
        self.table, self.root, self._reading = table, image_root, reading
        self.key = (name, image_root, reading.min_image_side)
        known, look = (name and _REMEMBERED.get()) or ({}, True)
        self._looks, self.images = look and self.key not in known, known.get(self.key, ImageCheck())
        self.faults: list[str] = []
        self.unwanted: Counter[str] = Counter()
        made_of: Counter[_MadeOf] = Counter()
        kept = np.fromiter(self._check(made_of), dtype=np.int64)
        self._kept = kept if self.faults or self.unwanted else None
        self.size = len(kept)
        self.usage: Usage = _usage(made_of)
        self.usage.notes.update(dict.fromkeys(table.notes, 0))
        known[self.key] = self.images

    def row(self, index: int) -> Any:
        """The stored row of a sample."""
        return self.table.read(self.number(index))

    def number(self, index: int) -> int:
        """The number of a sample's row in the table."""
        return index if self._kept is None else int(self._kept[index])

    @property
    def total(self) -> int:
        """Number of rows in the table, with broken and unwanted ones."""
        return (self.size or 0) + len(self.faults) + self.unwanted.total()

    @property
    def columns(self) -> Mapping[str, str]:
        """The columns of parts of a row, where they are named."""
        return self._reading.columns

    @property
    def boxes(self) -> BoxReading | None:
        """How true boxes are read."""
        return self._reading.boxes

    def stored(self, number: int) -> tuple[Row, list[Any]]:
        """A row of the table, before the task reads it, and the places of its images.

        Raises:
            ValueError: It cannot be read.
        """
        row = self._reading.row(self.table.read(number), number)
        return row, [self._located(ref) for ref in row.images if ref is not None]

    def get(self, index: int) -> Sample:
        return self._sample(index, load_image, load_video)

    def outline(self, index: int) -> Sample:
        return self._sample(index, outline_image, outline_video)

    def _sample(
        self,
        index: int,
        load: Callable[[Any, str, ResizeRule | None], tuple[Image, Size]],
        load_frames: Callable[[VideoRef, float | None, str, FrameRule], Video],
    ) -> Sample:
        """A sample with its images and videos as `load` and `load_frames` give them."""
        number, bound, boxes = self.number(index), self._reading.bound, self._reading.boxes
        try:
            row = self._reading.row(self.table.read(number), number)
            sample = self._reading.sample_of(row)
        except ValueError as error:
            place = self.table.place(number)
            raise DataError(f"{place}: {error}; the file has changed since it was opened") from None
        place = self.place(index, sample.id)
        try:
            self._checked_files(row)
        except ValueError as error:
            raise DataError(f"{place}: {error}") from None
        refs = [self._located(ref) for ref in row.images if ref is not None]
        loaded = [load(ref, place, bound) for ref in refs]
        sample = replace(sample, images=tuple(image for image, _ in loaded), sizes=tuple(size for _, size in loaded))
        if row.videos:
            assert self._reading.frames is not None  # else the row is broken
            given = [(self._located_video(ref), row.fps, place, self._reading.frames) for ref in row.videos]
            sample = replace(sample, videos=tuple(load_frames(*one) for one in given))
        if boxes is None or not loaded:
            return sample
        if (fault := size_fault(row.size, refs[0])) is not None:
            raise DataError(f"{place}: {fault}")
        return replace(sample, target=boxes.in_pixels(sample.target, row, refs[0], sample.sizes[0]))

    def adopt(self, check: ImageCheck) -> None:
        """Leaves out the rows whose images another process has not found, or found too small."""
        self.images = check
        if not check.faults:
            return
        own = {self.number(index): index for index in range(self.size or 0)}
        gone = {number: fault for number, fault in check.faults.items() if number in own}
        for number, fault in gone.items():
            if isinstance(fault, UnwantedError):
                self.unwanted[str(fault)] += 1
            else:
                self.faults.append(f"{self.table.place(number)}: {fault}")
        self._remove([own[number] for number in gone])

    def leave_out(self, indices: Sequence[int], reason: str) -> None:
        if len(indices):
            self.unwanted[reason] += len(indices)
            self._remove(indices)

    def _remove(self, indices: Sequence[int]) -> None:
        if indices:
            kept = np.arange(self.size or 0) if self._kept is None else self._kept
            self._kept = np.delete(kept, indices)
            self.size = len(self._kept)

    def place(self, index: int, id: str) -> str:
        return f"{self.table.place(self.number(index))} (id {id})"

    def _check(self, made_of: Counter[_MadeOf]) -> Iterator[int]:
        """Numbers of the good rows; counts their usage."""
        for number, row in self._looked_at():
            try:
                if isinstance(row, Exception):
                    raise row
            except UnwantedError as reason:
                self.unwanted[str(reason)] += 1
            except ValueError as error:
                self._note_fault(f"{self.table.place(number)}: {error}")
            else:
                made_of[row] += 1
                yield number

    def _note_fault(self, fault: str) -> None:
        if not self._reading.skip_broken:
            raise DataError(fault)
        self.faults.append(fault)

    def _looked_at(self) -> Iterator[tuple[int, _MadeOf | ValueError | UnwantedError]]:
        """The usage of each row, or its fault. Images of some rows are asked for while later rows are read."""
        rows = enumerate(self.table.scan())
        waiting: deque[tuple[list[_Read], list[Future[ImageCheck]]]] = deque()
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="vlmenv-data") as pool:
            while some := list(islice(rows, _ROWS)):
                read = [(number, *self._read(raw, number)) for number, raw in some]
                shares = [read[i::_THREADS] for i in range(_THREADS)] if self._looks else []
                waiting.append((read, [pool.submit(self._missing, share) for share in shares]))
                if len(waiting) > _AHEAD:
                    yield from self._with_images(*waiting.popleft())
            for block in waiting:
                yield from self._with_images(*block)

    def _with_images(
        self, read: Sequence[_Read], checks: Sequence[Future[ImageCheck]]
    ) -> Iterator[tuple[int, _MadeOf | ValueError | UnwantedError]]:
        """Rows of which some have images that are missing or too small, as far as that is known yet."""
        for check in checks:
            self.images.add(check.result())
        for number, made, *_ in read:
            yield number, self.images.faults.get(number, made)

    def _read(
        self, raw: Any, number: int
    ) -> tuple[_MadeOf | ValueError | UnwantedError, Row | None, tuple[int, int] | None]:
        try:
            row = self._reading.row(raw, number)
            sample = self._reading.sample_of(row)
        except (ValueError, UnwantedError) as error:
            return error, None, None
        ignored = self._reading.ignored(row, sample.target)
        used = tuple(one for one in row.used if one[0] not in ignored)
        left = tuple(column for part, column in row.used if part in ignored)
        size = row.size if self._reading.boxes is not None and number < _SIZED else None
        return (len(row.images), used, row.unused + left, row.notes), row, size

    def _missing(self, rows: Sequence[_Read]) -> ImageCheck:
        """Looks for the images and videos of some rows, and compares sizes of images; the disk may be slow."""
        found = ImageCheck()
        for number, _, row, size in rows:
            if row is None:
                continue
            try:
                for video in map(self._located_video, row.videos):
                    check_video(video, row.fps)
                for ref in self._checked_files(row):
                    if isinstance(ref, str):
                        found.stamp += self._stamp(ref)
                if size is not None and (fault := size_fault(size, self._located(row.images[0]))) is not None:
                    raise ValueError(fault)
                if self._reading.min_image_side is not None:
                    self._check_sizes(number, row.images, self._reading.min_image_side)
            except (ValueError, UnwantedError) as error:
                found.faults[number] = error
        return found

    def _stamp(self, path: str) -> int:
        """A number that is another if the image's file is another. Raises ValueError if there is none."""
        try:
            file = os.stat(path)  # noqa: PTH116 (a million rows ask, and Path is slow)
        except (OSError, ValueError):
            file = None
        if file is None or not stat.S_ISREG(file.st_mode):
            raise ValueError(f"there is no image {path[:200]}")
        return zlib.crc32(f"{path} {file.st_size} {file.st_mtime_ns}".encode("utf-8", "surrogateescape"))

    def _checked_files(self, row: Row) -> list[ImageRef]:
        """The images of a row, and the files of its videos, with paths from the working directory. Links are followed.

        Raises:
            ValueError: A file lies outside the folder of images, and these are refused.
        """
        videos = [file for ref in row.videos for file in files_of(self._located_video(ref))]
        refs = [*map(self._located, row.images), *videos]
        for ref in refs if self._reading.confine_images else ():
            if isinstance(ref, str):
                root, real = (os.path.realpath(path) for path in (self.root, ref))
                if os.path.commonpath((root, real)) != root:
                    raise ValueError(f"the image {ref[:200]} lies outside {self.root}, and confine_images refuses such")
        return refs

    def _check_sizes(self, number: int, refs: Sequence[ImageRef], least: int) -> None:
        """Raises UnwantedError if an image is too small."""
        if None in refs:  # stored within the row, and not read yet
            _, refs = self._reading.sample(self.table.read(number), number)
        if any(min(image_size(self._located(ref))) < least for ref in refs if ref is not None):
            raise UnwantedError(f"an image is under {least} pixels wide or high")

    def _located_video(self, ref: VideoRef) -> VideoRef:
        if isinstance(ref, tuple):
            return tuple(map(self._located, ref))
        found: VideoRef = self._located(ref)
        return found

    def _located(self, ref: Any) -> Any:
        return os.path.join(self.root, ref) if isinstance(ref, str) else ref  # noqa: PTH118


class Concatenated(Source):
    """Several sources, one after the other."""

    reads_files = True

    def __init__(self, sources: Sequence[TableSource]) -> None:
        self.sources = sources
        self.usage: Usage = reduce(operator.add, (source.usage for source in sources))
        self.sum_up()

    def sum_up(self) -> None:
        """Takes over what its sources have left out."""
        self.faults = [fault for source in self.sources for fault in source.faults]
        self._ends = list(accumulate(source.size or 0 for source in self.sources))
        self.size = self._ends[-1]
        self.unwanted = sum((Counter(source.unwanted) for source in self.sources), Counter[str]())

    def get(self, index: int) -> Sample:
        source, own = self._part(index)
        return source.get(own)

    def outline(self, index: int) -> Sample:
        source, own = self._part(index)
        return source.outline(own)

    def leave_out(self, indices: Sequence[int], reason: str) -> None:
        starts = [0, *self._ends[:-1]]
        for source, start, end in zip(self.sources, starts, self._ends, strict=True):
            source.leave_out([index - start for index in indices if start <= index < end], reason)
        self.sum_up()

    def place(self, index: int, id: str) -> str:
        source, own = self._part(index)
        return source.place(own, id)

    def _part(self, index: int) -> tuple[TableSource, int]:
        """The source that a sample is of, and its index there."""
        which = bisect_right(self._ends, index)
        return self.sources[which], index - (self._ends[which - 1] if which else 0)


def open_dataset(
    dataset: Dataset, reading: Reading, image_root: Any = None, split: str | None = None
) -> TableSource | Concatenated:
    """Opens a data set and checks every row.

    Args:
        dataset: A file (`.jsonl`, `.json`, `.csv`, `.tsv`, `.gz` of these, or `.parquet`), a folder that `datasets` has
            saved, or an id on the Hugging Face hub. It may also be a list of these, a data set of the library
            `datasets`, or a list of rows.
        reading: The task's reading of rows.
        image_root: Folder that image paths are relative to, or one per file. Default: the folder of the file, or the
            working directory if there is no file.
        split: Split of a data set that has several. Default: "train".

    Raises:
        ConfigError: Arguments do not fit together, or an extra is missing.
        DataError: There is no such data set, it has no rows, or a row is broken.
    """
    parts = _parts(dataset)
    roots = list(image_root) if isinstance(image_root, (list, tuple)) else [image_root] * len(parts)
    if len(roots) != len(parts):
        raise ConfigError(f"image_root has {len(roots)} folders for {len(parts)} data sets: give one, or one for each")
    sources = [_open(part, root, split, reading) for part, root in zip(parts, roots, strict=True)]
    return sources[0] if len(sources) == 1 else Concatenated(sources)


def hub_commits(source: Source) -> dict[str, str]:
    """The commits of the data sets of a source that came from the Hugging Face hub, by name."""
    parts: Sequence[Source] = source.sources if isinstance(source, Concatenated) else [source]
    tables = [part.table for part in parts if isinstance(part, TableSource)]
    commits = {table.name: table.commit for table in tables if isinstance(table, HuggingFace)}
    return {name: commit for name, commit in commits.items() if commit is not None}


def _parts(dataset: Dataset) -> list[Any]:
    paths = (str, os.PathLike, Published)
    several = isinstance(dataset, (list, tuple)) and len(dataset) > 0 and isinstance(dataset[0], paths)
    return list(dataset) if several else [dataset]


def _open(dataset: Any, image_root: Any, split: str | None, reading: Reading) -> TableSource:
    if isinstance(dataset, Published):
        name, default_root = str(dataset.file), dataset.file.parent
        table: Table = Rewritten(_open_file(dataset.file, split, reading), dataset.rewrite)
    elif isinstance(dataset, (str, os.PathLike)):
        file, name = Path(dataset), str(dataset)
        table = _open_file(file, split, reading) if file.is_file() else _load(name, split)
        default_root = file.parent if file.is_file() else file if file.is_dir() else Path()
    else:
        name, default_root = type(dataset).__name__, Path()
        table = _wrap(dataset, split)
    root = default_root if image_root is None else Path(image_root)
    if not root.is_dir():
        raise DataError(f"image_root {root}: no such folder")
    stored = isinstance(dataset, (str, os.PathLike, Published))
    source = TableSource(table, str(root), reading, f"{name} {split or ''}" if stored else "")
    if not source.size and not source.faults and not source.unwanted:
        raise DataError(f"{name}: the data set has no rows")
    return source


def _open_file(file: Path, split: str | None, reading: Reading) -> Table:
    if split is not None:
        raise ConfigError(f"split '{split}' is for the built-in samples and for named data sets: a file has no splits")
    plain = file.with_suffix("") if file.suffix == ".gz" else file
    if plain.suffix not in _SUFFIXES or (plain != file and plain.suffix == ".parquet"):
        raise DataError(
            f"{file}: a data set file is {', '.join(_SUFFIXES)}, all but parquet also with .gz, not '{plain.suffix}'; "
            "annotations of VOC, YOLO and LabelMe become one by `vlmenv data convert SOURCE TARGET.jsonl`"
        )
    if plain.suffix == ".parquet":
        library = _library()
        try:
            return HuggingFace(library.Dataset.from_parquet(str(file)), str(file))
        except (OSError, ValueError, LookupError, RuntimeError, library.exceptions.DatasetsError) as error:
            raise DataError(f"{file}: the parquet file cannot be read: {error}") from error
    unpacked = file if plain == file else _unpacked(file)
    table = _open_text(unpacked, file, plain.suffix, reading)
    if unpacked != file:
        weakref.finalize(table, unpacked.unlink, missing_ok=True)
    return table


_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def _unpacked(file: Path) -> Path:
    """An unpacked copy of a file, in which rows can be read by their positions."""
    try:
        with gzip.open(file) as packed, tempfile.NamedTemporaryFile(prefix="vlmenv-", delete=False) as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be unpacked: {error}") from error
    return Path(plain.name)


def _open_text(file: Path, name: Path, suffix: str, reading: Reading) -> Table:
    if suffix in (".csv", ".tsv"):
        return Delimited(file, name, "\t" if suffix == ".tsv" else None)
    layout, key = json_layout(file, name)
    match layout:
        case "list":
            return JSONList(file, name, key)
        case "lines":
            return JSONLines(file, name)
        case "by id":
            return JSONById(file, name)
    if not reading.takes_coco:
        raise DataError(f"{name}: looks like COCO's instances, which are for detection, VLM-OVD-v0")
    if reading.columns:
        raise ConfigError(f"{name}: COCO's instances have no columns to map")
    if reading.boxes is not None and reading.boxes.form not in (None, BoxForm.XYWH):
        raise ConfigError(
            f"{name}: boxes_in {reading.boxes.form} is for rows; COCO's boxes are x, y, width and height by "
            "definition: leave it out, or give xywh; for a data set to measure on it is eval_boxes_in"
        )
    return CocoInstances(file, name)


def _load(name: str, split: str | None) -> Table:
    """A folder that `datasets` has saved, or a data set on the hub."""
    folder = Path(name)
    named = hub_name(name)
    if not folder.is_dir() and (named is None or name.startswith(".") or folder.suffix in _SUFFIXES):
        raise DataError(f"{name}: no such file")
    library = _library()
    saved = any((folder / file).is_file() for file in ("state.json", "dataset_dict.json"))
    layout = find_layout(folder) if folder.is_dir() and not saved else None
    if layout not in (None, "folder"):
        raise DataError(f"{name}: a folder of {layout}: `vlmenv data convert {name} TARGET.jsonl` makes rows of it")
    try:
        if saved:
            return _wrap(library.load_from_disk(name), split, name)
        repository, revision = named or (name, None)
        return HuggingFace(library.load_dataset(repository, split=split or "train", revision=revision), name)
    except (OSError, ValueError, LookupError, RuntimeError, library.exceptions.DatasetsError) as error:
        raise DataError(f"{name}: the data set cannot be loaded: {error}") from error


def _wrap(dataset: Any, split: str | None, name: str | None = None) -> Table:
    if isinstance(dataset, dict) and hasattr(dataset, "column_names"):  # a DatasetDict
        if (split or "train") not in dataset:
            raise ConfigError(f"the data set has no split '{split or 'train'}', but {', '.join(dataset)}")
        return HuggingFace(dataset[split or "train"], f"{name or 'data set'}, split {split or 'train'}")
    if split is not None:
        raise ConfigError(f"split '{split}': the data set has no splits")
    if hasattr(dataset, "with_format") and hasattr(dataset, "__len__"):
        return HuggingFace(dataset, name or "data set")
    if isinstance(dataset, Sequence):
        return Rows(dataset)
    raise ConfigError(
        f"dataset is a {type(dataset).__name__}: give a path or several, a list of rows, "
        "or a data set of the library `datasets` that is not streamed"
    )


def _library() -> Any:
    require_datasets()
    import datasets

    return datasets
