"""Checks the rows of a data set as training reads them, and finds the convention of its boxes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from vlmenv.core.coordinates import Box, is_box
from vlmenv.core.errors import DataError
from vlmenv.envs.data.boxes import (
    SIDEWAYS,
    BoxForm,
    BoxOrientation,
    BoxReading,
    boxes_of,
    corners,
    lengths,
    numbers_in,
    scaled,
)
from vlmenv.envs.data.dataset import TableSource
from vlmenv.envs.data.images import exif_orientation, shown_size
from vlmenv.envs.data.rows import Row
from vlmenv.envs.data.source import Sample
from vlmenv.envs.rewards.spans import Span

_SLACK: Final = (2, 0.01)
"""Pixels, or share of a side, by which a box may exceed its image; many data sets round or count so."""
_LATE: Final = 1.0
"""Seconds by which a span may exceed its video, as some do of videos that were cut."""
_MOST: Final = 0.9
"""Least share of the rows that a convention must fit."""
_GAIN: Final = 0.1
"""Least difference in the share of rows from the given one, so that a few odd rows decide nothing."""
_CHANCE: Final = 1e-4
"""Below this chance, boxes that all stay within a limit are no coincidence."""


class BoxedRow(NamedTuple):
    """The boxes of a row, with the size of its image."""

    place: str
    numbers: tuple[Box, ...]
    """as they are stored"""
    shown: tuple[int, int]
    """width and height of the image, turned as EXIF says"""
    turn: int
    """the EXIF orientation of the image"""
    told: BoxOrientation | None
    """orientation of the boxes, if the data set states it"""
    form: BoxForm
    """of the numbers, unless told otherwise"""


class Convention(NamedTuple):
    """How boxes are read."""

    form: BoxForm | None
    """None for the one of each row's layout"""
    orientation: BoxOrientation

    def size(self, row: BoxedRow) -> tuple[int, int]:
        """Width and height of the image that a row's boxes refer to."""
        stored = (row.told or self.orientation) is BoxOrientation.STORED and row.turn in SIDEWAYS
        return row.shown[::-1] if stored else row.shown

    def edges(self, row: BoxedRow) -> list[Box]:
        """The row's boxes in pixels of that image."""
        form, size = self.form or row.form, self.size(row)
        return [corners(box) if form is BoxForm.XYWH else scaled(box, form, size) for box in row.numbers]

    def misfit(self, row: BoxedRow) -> str | None:
        """What is wrong with the first of the row's boxes that does not lie within the image; None if all do."""
        width, height = self.size(row)
        for stored, edges in zip(row.numbers, self.edges(row), strict=True):
            if not is_box(edges):
                return f"the box {_written(stored)} covers nothing, or is not finite"
            if not _is_within(edges, width, height):
                return f"the box {_written(stored)} goes beyond the image of {width} x {height}"
        return None


def _written(box: Box) -> str:
    return "[" + ", ".join(f"{value:.10g}" for value in box) + "]"


def _is_within(edges: Box, width: int, height: int) -> bool:
    across, down = (max(_SLACK[0], _SLACK[1] * side) for side in (width, height))
    x1, y1, x2, y2 = edges
    return x1 >= -across and y1 >= -down and x2 <= width + across and y2 <= height + down


@dataclass
class LookedAt:
    """What was found in one row."""

    number: int
    """of the row in its table"""
    row: Row | None = None
    """None if unreadable"""
    sample: Sample | None = None
    """the sample with its images; None if the row is broken, or images were not requested"""
    boxed: BoxedRow | None = None
    """its boxes, if they and the image's size can be read"""
    beyond: str | None = None
    """a point, a corner or a span of its truth that lies beyond the image or the video"""
    faults: list[str] = field(default_factory=list)
    """faults beyond those that opening the data set reported"""


def look_at(source: TableSource, number: int, index: int | None, *, decode: bool) -> LookedAt:
    """Checks a row, its images and its boxes.

    Args:
        source: The source of the row.
        number: The number of the row in the table.
        index: The index of its sample in the source; None for a row that is broken or left out.
        decode: Whether to read images.
    """
    found = LookedAt(number)
    try:
        found.row, refs = source.stored(number)
    except (ValueError, LookupError):  # of which opening the data set has told
        return found
    if not decode:
        return found
    if index is not None:
        try:
            found.sample = source.get(index)
        except DataError as error:
            found.faults.append(str(error))
            return found
    place = source.table.place(number) if index is None else source.place(index, found.row.id)
    if found.sample is not None and (beyond := _beyond(found.sample, source.boxes)):
        found.beyond = f"{place}: {beyond}"
    if refs and source.boxes is not None:
        found.boxed = _boxed(found, refs[0], source.boxes, place)
    return found


def _beyond(sample: Sample, reading: BoxReading | None) -> str | None:
    """What is wrong with the first point, corner or span beyond the image or video; None if all lie within."""
    if isinstance(sample.target, Span) and sample.videos:
        duration = sample.videos[-1].duration
        if sample.target.end > duration + _LATE:
            start, end = sample.target
            return f"the span from {start:g} to {end:g} seconds goes beyond the video of {duration:g}"
    if reading is None or not sample.images:
        return None
    width, height = sample.asked_sizes[0]
    for box in boxes_of(sample.target, reading.map_boxes):
        if box[:2] == box[2:] and not _is_within(box, width, height):
            return f"the point or corner [{box[0]:.10g}, {box[1]:.10g}] goes beyond the image of {width} x {height}"
    return None


def _boxed(found: LookedAt, ref: str, reading: BoxReading, place: str) -> BoxedRow | None:
    assert found.row is not None
    try:
        turn = exif_orientation(ref)
        shown = shown_size(ref)
    except ValueError:
        return None
    row = found.row
    if row.detections is not None:
        numbers, form = [lengths(one.box) for one in row.detections], BoxForm.XYWH
    else:
        numbers, form = numbers_in(row.answer), BoxForm(row.form or BoxForm.XYXY)
        if not numbers and found.sample is not None and reading.form in (None, BoxForm.XYXY):  # written otherwise
            read = boxes_of(found.sample.target, reading.map_boxes)
            numbers = [box for box in read if box[:2] != box[2:]]  # a point is no box
    return BoxedRow(place, tuple(numbers), shown, turn, reading.told(row, shown), form)


def likely_convention(rows: Sequence[BoxedRow], given: Convention) -> Convention | None:
    """The convention that boxes are in, if it is most likely another than the given one.

    All rows decide together, so a few odd ones decide nothing. Thousandths in images of about 1000 pixels cannot be
    told from pixels, nor can the orientation of fractions.
    """
    rows = [row for row in rows if row.numbers]
    if not rows:
        return None
    form = _likely_form(rows, given)
    found = Convention(form, _likely_orientation(rows, Convention(form, given.orientation)))
    return None if found == given else found


def share(rows: Sequence[BoxedRow], holds: Callable[[BoxedRow], bool]) -> float:
    """The share of rows with a property; 0 if there are no rows."""
    return sum(map(holds, rows)) / max(1, len(rows))


def _likely_form(rows: Sequence[BoxedRow], given: Convention) -> BoxForm | None:
    if given.form is not BoxForm.FRACTIONS and share(rows, _is_in_fractions) >= _MOST:
        return BoxForm.FRACTIONS
    straight = [row for row in rows if row.turn not in SIDEWAYS] or rows
    fits = {form: share(straight, _fits(form)) for form in (given.form, *BoxForm)}
    for form in sorted(BoxForm, key=lambda form: -fits[form]):
        gains = fits[form] >= _MOST and fits[form] - fits[given.form] >= _GAIN
        if gains and (form is not BoxForm.NORM1000 or _is_scattered(straight, given.form)):
            return form
    pixels = given.form in (None, BoxForm.XYXY)
    if pixels and fits[BoxForm.NORM1000] >= _MOST and _stay_within_1000(straight):
        return BoxForm.NORM1000
    if given.form is BoxForm.NORM1000 and fits[BoxForm.XYXY] >= _MOST and _stay_within_images(straight):
        return BoxForm.XYXY
    return given.form


def _fits(form: BoxForm | None) -> Callable[[BoxedRow], bool]:
    """Whether a row's boxes lie within the image, be it turned or not."""
    return lambda row: any(Convention(form, orientation).misfit(row) is None for orientation in BoxOrientation)


def _is_in_fractions(row: BoxedRow) -> bool:
    """In pixels, such boxes would cover less than one."""
    return all(0 <= value <= 1.001 for box in row.numbers for value in box)


def _is_scattered(rows: Sequence[BoxedRow], form: BoxForm | None) -> bool:
    """Whether about as many rows go beyond their images as edges would that lie anywhere up to 1000."""
    expected = sum(1 - math.exp(_log_chance(row.shown, (1000, 1000))) for row in rows)
    return share(rows, lambda row: not _fits(form)(row)) * len(rows) >= expected / 2


def _stay_within_1000(rows: Sequence[BoxedRow]) -> bool:
    """Whether right and bottom edges reach up to 1000 and never beyond, though images are larger."""
    stored = Convention(None, BoxOrientation.SHOWN)
    edges = [box for row in rows for box in stored.edges(row)]
    reach = all(900 < max(box[i] for box in edges) <= 1010 for i in (2, 3))
    return reach and sum(_log_chance((1000, 1000), row.shown) for row in rows) < math.log(_CHANCE)


def _stay_within_images(rows: Sequence[BoxedRow]) -> bool:
    """Whether edges reach up to the images' own and never beyond, though these have less than 1000 pixels."""
    reach = all(max(box[2 + i] / row.shown[i] for row in rows for box in row.numbers) > 0.9 for i in (0, 1))
    return reach and sum(_log_chance(row.shown, (1000, 1000)) for row in rows) < math.log(_CHANCE)


def _log_chance(limits: tuple[int, int], sides: tuple[int, int]) -> float:
    """Of the chance that right and bottom edge, lying anywhere within sides, are within limits."""
    return sum(math.log(min(1.0, limit / side)) for limit, side in zip(limits, sides, strict=True))


def _likely_orientation(rows: Sequence[BoxedRow], given: Convention) -> BoxOrientation:
    if given.form in (BoxForm.FRACTIONS, BoxForm.NORM1000):
        return given.orientation
    turned = [row for row in rows if row.turn in SIDEWAYS and row.told is None]
    other = next(one for one in BoxOrientation if one is not given.orientation)
    now = share(turned, lambda row: given.misfit(row) is None)
    then = share(turned, lambda row: given._replace(orientation=other).misfit(row) is None)
    return other if then >= _MOST and then - now >= _GAIN else given.orientation
