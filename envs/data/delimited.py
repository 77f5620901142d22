"""Rows of CSV and TSV files, read lazily; also TSV files of VLMEvalKit, whose images are base64 within the rows."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, TextIO

from vlmenv.core.errors import DataError
from vlmenv.envs.data.tables import TextFile

_LONGEST_CELL: Final = 1 << 28  # characters; an image in base64 is far longer than the 131,072 that Python allows
_LONGEST_REFERENCE: Final = 32  # characters; an image in base64 is longer


class Delimited(TextFile):
    """A CSV or TSV file with a line of column names; cells may be quoted, and then hold line breaks.

    In files with columns `index` and `image`, as VLMEvalKit has them, an image that is the `index` of an earlier row
    is the image of that row.
    """

    def __init__(self, file: Path, name: Path, delimiter: str | None) -> None:
        super().__init__(file, name)
        self._delimiter = delimiter
        self.suffix = ".tsv" if delimiter == "\t" else ".csv"
        self._columns: list[str] = []
        self._with_image: dict[str, int] = {}  # numbers of rows by their index

    def scan(self) -> Iterator[Any]:
        csv.field_size_limit(_LONGEST_CELL)
        with self._file.open("rb") as stream:
            lines = _Lines(stream, self._name)
            if self._delimiter is None:
                self._delimiter = _delimiter(lines.first())
            records = csv.reader(lines, delimiter=self._delimiter)
            self._columns = self._header(next(records, []))
            offset, line = lines.offset, lines.number
            for record in self._records(records, lines):
                if record:
                    self._add(offset, lines.offset - offset, line + 1)
                    yield self._row(record, len(self._offsets) - 1)
                offset, line = lines.offset, lines.number

    def read(self, number: int) -> Any:
        csv.field_size_limit(_LONGEST_CELL)
        text = self._stored(number).decode("utf-8").splitlines(keepends=True)
        return self._row(next(csv.reader(text, delimiter=self._delimiter or ","), []), number)

    def _records(self, records: Iterator[list[str]], lines: _Lines) -> Iterator[list[str]]:
        try:
            yield from records
        except csv.Error as error:
            raise DataError(f"{self._name}:{lines.number}: not a table of cells: {error}") from None

    def _header(self, names: list[str]) -> list[str]:
        columns = [name.strip() for name in names]
        if columns and not columns[0] and "index" not in columns:
            columns[0] = "index"  # as pandas writes it
        if twice := [name for name, count in Counter(columns).items() if count > 1 or not name]:
            raise DataError(
                f"{self._name}:1: the first line must name the columns; {twice[0]!r} is empty or there twice"
            )
        return columns

    def _row(self, record: list[str], number: int) -> Any:
        if len(record) != len(self._columns):
            return ValueError(f"the row has {len(record)} cells for {len(self._columns)} columns")
        row: dict[str, Any] = dict(zip(self._columns, record, strict=True))
        if "image" in row and "index" in row:
            if len(row["image"]) > _LONGEST_REFERENCE:
                self._with_image.setdefault(row["index"], number)
            elif (owner := self._with_image.get(row["image"])) is not None and owner != number:
                row["image"] = self.read(owner)["image"]
        return row

    def _dump(self, rows: Iterator[dict[str, Any]], stream: TextIO) -> None:
        writer: csv.DictWriter[str] | None = None
        for row in rows:
            if writer is None:
                writer = csv.DictWriter(stream, list(row), delimiter=self._delimiter or ",", lineterminator="\n")
                writer.writeheader()
            writer.writerow(row)


class _Lines:
    """The lines of a file, with how far it has been read."""

    def __init__(self, stream: BinaryIO, name: Path) -> None:
        self._stream, self._name = stream, name
        self.offset = self.number = 0

    def first(self) -> str:
        """The first line, which stays unread."""
        line = self._stream.readline()
        self._stream.seek(0)
        return line.decode("utf-8", "replace")

    def __iter__(self) -> Iterator[str]:
        for line in self._stream:
            self.offset += len(line)
            self.number += 1
            try:
                yield line.decode("utf-8-sig" if self.number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{self._name}:{self.number}: not UTF-8: {error.reason}") from None


def _delimiter(line: str) -> str:
    """The one of comma, semicolon and tab that the names of the columns have most of."""
    return max(",;\t", key=line.count)
