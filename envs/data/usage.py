"""The columns of a data set that its samples are made of, and those that are not read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

_Key = TypeVar("_Key")


@dataclass
class Usage:
    """The columns of a data set's good rows, counted in rows when it is opened.

    `str(usage)` is the text for the console: a line for each attribute with content.

    Attributes:
        rows: Number of good rows.
        images: Rows by their number of images: `{1: 90, 2: 10}`.
        used: By part of a row (`"question"`, `"images"` …), rows by the column that it was taken from.
        unused: Rows by the column that has content but is not read by the task.
        notes: Rows by decision, such as which of two columns with images was shown; 0 for a decision about the whole
            data set.
    """

    rows: int = 0
    images: Counter[int] = field(default_factory=Counter)
    used: dict[str, Counter[str]] = field(default_factory=dict)
    unused: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    def add(
        self, images: int, used: Iterable[tuple[str, str]], unused: Iterable[str], notes: Iterable[str], rows: int = 1
    ) -> None:
        """Counts rows that are made of the same columns.

        Args:
            images: Number of images of each.
            used: Parts with the column of each.
            unused: Columns that hold something, but are not read.
            notes: What was decided for each.
            rows: How many there are.
        """
        self.rows += rows
        self.images[images] += rows
        for part, column in used:
            self.used.setdefault(part, Counter())[column] += rows
        for column in unused:
            self.unused[column] += rows
        for note in notes:
            self.notes[note] += rows

    def __add__(self, other: Usage) -> Usage:
        """The usage of two data sets together."""
        both = Usage(self.rows + other.rows)
        both.images = _sum(self.images, other.images)
        both.unused, both.notes = _sum(self.unused, other.unused), _sum(self.notes, other.notes)
        for part in [*self.used, *(part for part in other.used if part not in self.used)]:
            both.used[part] = _sum(self.used.get(part, Counter()), other.used.get(part, Counter()))
        return both

    def warnings(self) -> list[str]:
        """What training tells once: the columns that are not read, and what was decided for the rows."""
        told = [f"columns that the task does not read: {self._listed(self.unused)}"] if self.unused else []
        return told + [f"{note} ({_rows(count)})" if count else note for note, count in self.notes.items()]

    def __str__(self) -> str:
        images = ", ".join(f"{_rows(count)} with {number}" for number, count in sorted(self.images.items()))
        parts = [f"{part} from {self._listed(columns)}" for part, columns in self.used.items()]
        return "\n".join([f"images: {images or 'no rows'}", *parts, *self.warnings()])

    def _listed(self, columns: Counter[str]) -> str:
        """Columns by name, with their number of rows where it is not all."""
        return ", ".join(
            f"'{column}'" if count == self.rows else f"'{column}' ({_rows(count)})" for column, count in columns.items()
        )


def _sum(first: Counter[_Key], second: Counter[_Key]) -> Counter[_Key]:
    """`+` of counters, but for entries of 0, which it would drop."""
    both = Counter(first)
    both.update(second)
    return both


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"
