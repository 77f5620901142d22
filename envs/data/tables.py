"""Rows by number, read lazily: lines of JSON, a JSON list, a Hugging Face data set, a list in memory."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO

import numpy as np

from vlmenv.core.errors import ConfigError, DataError
from vlmenv.core.files import atomic_file
from vlmenv.envs.data.media import Unread

_CHUNK = 1 << 20  # bytes read at a time
_LARGEST_VALUE = 1 << 26  # characters of one JSON value; beyond it a quote is missing, and not data
_SPACE = " \t\r\n"


class Table(ABC):
    """Raw rows by number. After `scan`, `read` may be called from several threads at once."""

    suffix: str = ".jsonl"
    """Of the files that `write` makes."""
    notes: Sequence[str] = ()
    """What was decided for the table as a whole, to be told once; complete after `scan`."""

    @abstractmethod
    def scan(self) -> Iterator[Any]:
        """Every row once, in order; one that is no row is given as the ValueError that says why.

        Images that are stored within the rows may come as `Unread`.
        """

    @abstractmethod
    def read(self, number: int) -> Any:
        """Row `number`, counted from 0."""

    @abstractmethod
    def place(self, number: int) -> str:
        """Where row `number` stands, for messages: file and line."""

    def stored(self) -> Iterator[bytes]:
        """Every row once, in order, as bytes that are others if its content is another; after `scan`."""
        yield from map(_as_bytes, self.scan())

    def write(self, file: Path, added: Mapping[int, Mapping[str, Any]]) -> None:
        """Writes some rows to a file in the format that they are stored in.

        Args:
            file: Its name ends in `suffix`; an older one is overwritten.
            added: By the numbers of the rows, in their order, columns that each is given besides its own.
        """
        with atomic_file(file) as partial, partial.open("w", encoding="utf-8") as stream:
            self._dump((dict(self.read(number)) | dict(more) for number, more in added.items()), stream)

    def _dump(self, rows: Iterator[dict[str, Any]], stream: TextIO) -> None:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


class TextFile(Table):
    """A file of rows; only their positions are held in memory.

    Args:
        file: The file, unpacked.
        name: What messages call it.
    """

    def __init__(self, file: Path, name: Path | None = None) -> None:
        self._file, self._name = file, name or file
        self._offsets, self._lengths, self._lines = array("q"), array("q"), array("q")

    def place(self, number: int) -> str:
        return f"{self._name}:{self._lines[number]}"

    def stored(self) -> Iterator[bytes]:
        with self._file.open("rb") as stream:
            for offset, length in zip(self._offsets, self._lengths, strict=True):
                stream.seek(offset)
                yield stream.read(length).strip()

    def _stored(self, number: int) -> bytes:
        with self._file.open("rb") as stream:
            stream.seek(self._offsets[number])
            return stream.read(self._lengths[number])

    def _add(self, offset: int, length: int, line: int) -> None:
        self._offsets.append(offset)
        self._lengths.append(length)
        self._lines.append(line)


class JSONLines(TextFile):
    """A file with a JSON object a line; blank lines do not count."""

    def scan(self) -> Iterator[Any]:
        offset = 0
        with self._file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if not line.isspace():
                    self._add(offset, len(line), number)
                    yield _loaded(line)
                offset += len(line)

    def read(self, number: int) -> Any:
        return _parsed(self._stored(number))


class JSONList(TextFile):
    """A file with one JSON list of objects, or an object that holds such a list.

    Args:
        file: The file, unpacked.
        name: What messages call it.
        key: Key of the list in the object. Default: the document is the list.
    """

    suffix = ".json"

    def __init__(self, file: Path, name: Path | None = None, key: str | None = None) -> None:
        super().__init__(file, name)
        self._key = key

    def scan(self) -> Iterator[Any]:
        with self._file.open("rb") as stream:
            document = JSONStream(stream, self._name)
            if self._key is None:
                yield from self._listed(document)
            else:
                for key in document.members():
                    if key == self._key:
                        yield from self._listed(document)
                    else:
                        document.skip_value()
            document.expect_end()

    def read(self, number: int) -> Any:
        return json.loads(self._stored(number))

    def _listed(self, document: JSONStream) -> Iterator[Any]:
        for value in document.elements():
            self._add(value.offset, value.length, value.line)
            yield value.content

    def _dump(self, rows: Iterator[dict[str, Any]], stream: TextIO) -> None:
        stream.write("[")
        stream.writelines(f"{',' * (i > 0)}\n{json.dumps(row)}" for i, row in enumerate(rows))
        stream.write("\n]\n")


class JSONById(TextFile):
    """A file with one JSON object that holds the rows by their ids."""

    def scan(self) -> Iterator[Any]:
        with self._file.open("rb") as stream:
            document = JSONStream(stream, self._name)
            for key, value in document.entries():
                self._add(key.offset, value.offset + value.length - key.offset, key.line)
                yield _with_id(str(key.content), value.content)
            document.expect_end()

    def read(self, number: int) -> Any:
        ((key, row),) = json.loads(b"{" + self._stored(number) + b"}").items()
        return _with_id(key, row)


class Rows(Table):
    """Rows that are in memory."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self._rows = rows

    def scan(self) -> Iterator[Any]:
        yield from map(_without_arrays, self._rows)

    def read(self, number: int) -> Any:
        return _without_arrays(self._rows[number])

    def place(self, number: int) -> str:
        return f"row {number}"


class Rewritten(Table):
    """A table whose rows are rewritten, each for itself, before anyone sees them.

    Args:
        table: The rows as they are stored.
        rewrite: Converts a stored row. Raises ValueError or KeyError if it cannot.
    """

    def __init__(self, table: Table, rewrite: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
        self._table, self._rewrite = table, rewrite

    def scan(self) -> Iterator[Any]:
        yield from map(self._rewritten, self._table.scan())

    def read(self, number: int) -> Any:
        return self._rewritten(self._table.read(number))

    def stored(self) -> Iterator[bytes]:
        yield from self._table.stored()

    def place(self, number: int) -> str:
        return self._table.place(number)

    @property
    def notes(self) -> Sequence[str]:  # type: ignore[override]
        return self._table.notes

    def _rewritten(self, row: Any) -> Any:
        if not isinstance(row, Mapping):
            return row
        try:
            return self._rewrite(row)
        except KeyError as error:
            return ValueError(f"the row has no column {error}")
        except ValueError as error:
            return error


class HuggingFace(Table):
    """A data set of the library `datasets`, whose images stay encoded until they are shown."""

    suffix = ".parquet"

    def __init__(self, dataset: Any, name: str) -> None:
        self._arrow = dataset.with_format("arrow")
        self.name = name
        features = (dataset.features or {}).items()
        self._classes = {column: feature.names for column, feature in features if hasattr(feature, "int2str")}
        self._labels = _names_of_objects(dict(features).get("objects"))

    def scan(self) -> Iterator[Any]:
        for table in self._arrow.iter(batch_size=1000):
            stored = [field.name for field in table.schema if _IMAGE_TYPE.fullmatch(str(field.type))]
            rows = table.drop_columns(stored).to_pylist()
            for name in stored:
                for row, images in zip(rows, table.column(name), strict=True):
                    row[name] = _unread(images)
            yield from map(self._named, rows)

    def read(self, number: int) -> Any:
        return self._named(self._arrow[number].to_pylist()[0])

    def _named(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row with the names of classes in place of their numbers."""
        for column, names in self._classes.items():
            if row.get(column) is not None:
                row[column] = names[row[column]]
        if self._labels and row.get("objects"):
            row["objects"] = _with_names(row["objects"], *self._labels)
        return row

    def place(self, number: int) -> str:
        return f"{self.name}: row {number}"

    @property
    def commit(self) -> str | None:
        """The commit of the hub's repository that the rows came from; None if they came from elsewhere."""
        urls = list(self._arrow.info.download_checksums or {})
        commits = {found[1] for url in urls if (found := _HUB_FILE.match(url))}
        return commits.pop() if len(commits) == 1 else None

    def write(self, file: Path, added: Mapping[int, Mapping[str, Any]]) -> None:
        chosen = self._arrow.with_format(None).select(list(added))
        for column in dict.fromkeys(name for more in added.values() for name in more):
            kept = chosen.remove_columns([column]) if column in chosen.column_names else chosen
            chosen = kept.add_column(column, [more.get(column) for more in added.values()])
        with atomic_file(file) as partial:
            chosen.to_parquet(str(partial))


class JSONValue:
    """A value within a JSON document, and its position."""

    __slots__ = ("content", "length", "line", "offset")

    def __init__(self, content: Any, offset: int, length: int, line: int) -> None:
        self.content, self.offset, self.length, self.line = content, offset, length, line


class JSONStream:
    """Walks through a JSON document, one element at a time, whatever its size.

    Raises:
        DataError: The document is not JSON; the message names file and line.
    """

    def __init__(self, stream: BinaryIO, file: Path) -> None:
        self._stream, self._file = stream, file
        self._decode = codecs.getincrementaldecoder("utf-8")()
        self._scan = _DECODER.raw_decode
        self._text, self._at, self._ended = "", 0, False
        self._offset, self._line = 0, 1  # of `_at`
        if self._peek() == "\ufeff":
            self._skip(1)

    def elements(self) -> Iterator[JSONValue]:
        """The elements of the list that stands here."""
        self._expect("[")
        if self._peek() != "]":
            yield self._value()
            while self._peek() == ",":
                self._skip(1)
                yield self._value()
        self._expect("]")

    def members(self) -> Iterator[str]:
        """The keys of the object that stands here; each value is to be taken before the next key is asked for."""
        for key in self._keys():
            yield str(key.content)

    def entries(self) -> Iterator[tuple[JSONValue, JSONValue]]:
        """The keys and values of the object that stands here."""
        for key in self._keys():
            yield key, self._value()

    def _keys(self) -> Iterator[JSONValue]:
        self._expect("{")
        while self._peek() != "}":
            key = self._value()
            self._expect(":")
            yield key
            if self._peek() != "}":
                self._expect(",")
        self._expect("}")

    def expect_end(self) -> None:
        """Reads to the end of the document.

        Raises:
            DataError: Something follows.
        """
        if self._peek():
            raise DataError(f"{self._file}:{self._line}: not JSON: something follows after the end of the document")

    def skip_value(self) -> None:
        """Reads the next value, and keeps nothing of it.

        Raises:
            DataError: It is not JSON.
        """
        self._value()

    def next_mark(self) -> str:
        """The first character of the next value; empty at the end."""
        return self._peek()

    def _value(self) -> JSONValue:
        self._peek()
        while True:
            try:
                content, end = self._scan(self._text, self._at)
                if end + 3 < len(self._text) or self._ended:  # else a number might go on, as 1, 1. and 1e- do
                    break
            except (json.JSONDecodeError, RecursionError) as error:
                self._check_cut_off(error)
            self._fill()
        offset, line = self._offset, self._line
        self._skip(end - self._at)
        return JSONValue(content, offset, self._offset - offset, line)

    def _check_cut_off(self, error: json.JSONDecodeError | RecursionError) -> None:
        """Raises unless more text may mend the value."""
        where = getattr(error, "pos", 0)
        open_text = str(error).startswith("Unterminated string")
        cut_off = open_text or where > len(self._text) - 16
        if self._ended or not cut_off or len(self._text) - self._at > _LARGEST_VALUE:
            line = self._line + self._text.count("\n", self._at, where)
            reason = getattr(error, "msg", "nested too deeply")
            raise DataError(f"{self._file}:{line}: not JSON: {reason}") from None

    def _expect(self, mark: str) -> None:
        if self._peek() != mark:
            found = f"'{self._peek()}'" if self._peek() else "the end of the file"
            raise DataError(f"{self._file}:{self._line}: not JSON: {found} stands where '{mark}' is expected")
        self._skip(1)

    def _peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            end = self._at
            while end < len(self._text) and self._text[end] in _SPACE:
                end += 1
            self._skip(end - self._at)
            if end < len(self._text):
                return self._text[end]
            if self._ended:
                return ""
            self._fill()

    def _skip(self, characters: int) -> None:
        passed = self._text[self._at : self._at + characters]
        self._offset += len(passed) if passed.isascii() else len(passed.encode())
        self._line += passed.count("\n")
        self._at += characters

    def _fill(self) -> None:
        """Reads on; the more, the longer the value is that does not end yet."""
        rest = self._text[self._at :]
        chunk = self._stream.read(max(_CHUNK, len(rest)))
        self._ended = not chunk
        try:
            self._text, self._at = rest + self._decode.decode(chunk, self._ended), 0
        except UnicodeDecodeError as error:
            raise DataError(f"{self._file}: not UTF-8, after line {self._line}: {error.reason}") from None


_LISTS = ("data", "rows", "samples", "examples", "items", "questions")
_COCO = ("images", "annotations", "categories")
_ABOUT = ("info", "licenses", "license", "meta", "metadata", "version", "config", "features", "dataset")


def json_layout(file: Path, name: Path) -> tuple[Literal["lines", "list", "by id", "coco"], str | None]:
    """How a file of JSON holds its rows, and for a list within an object, its key there.

    Raises:
        DataError: The layout is unknown; the message has the file's content.
    """
    with file.open("rb") as stream:
        if name.name.removesuffix(".gz").endswith(".jsonl") and not _begins_list(stream):
            return "lines", None
        stream.seek(0)
        if _has_lines(stream):
            return "lines", None
        stream.seek(0)
        document = JSONStream(stream, name)
        if document.next_mark() == "[":
            return "list", None
        keys = []
        for key in document.members():
            keys.append(key)
            mark = document.next_mark()
            if mark == "[" and key in (*_LISTS, *_COCO):
                return ("list", key) if key in _LISTS else ("coco", None)
            if mark == "{" and key not in _ABOUT:
                return "by id", None
            document.skip_value()
    found = ", ".join(f"'{key}'" for key in keys[:10]) or "nothing"
    convert = "; LabelMe's become rows by `vlmenv data convert FOLDER TARGET.jsonl`" if "shapes" in keys else ""
    lists = " or ".join(map(repr, _LISTS))
    raise DataError(
        f"{name}: a JSON object with {found}, and no list of rows, in {lists}, and no rows by their ids{convert}"
    )


def _begins_list(stream: BinaryIO) -> bool:
    return stream.read(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _has_lines(stream: BinaryIO) -> bool:
    """Whether a file has an object on its first line, and another after it."""
    first = stream.readline(_CHUNK)
    if not first.lstrip().startswith(b"{") or not first.endswith(b"\n") or isinstance(_loaded(first), ValueError):
        return False
    return any(line.strip() for line in stream)


def require_datasets() -> None:
    """Raises ConfigError if the library `datasets` is not installed."""
    if find_spec("datasets") is None:
        raise ConfigError('parquet files and Hugging Face data sets need an extra: pip install "vlmenv[data]"')


def _as_bytes(row: Any) -> bytes:
    return json.dumps(row, sort_keys=True, default=_content).encode()


def _content(value: Any) -> str:
    """A value that JSON does not know, such as an image in memory, by its checksum, or else by its type."""
    data = value if isinstance(value, bytes) else value.tobytes() if hasattr(value, "tobytes") else b""
    shape = getattr(value, "shape", None) or getattr(value, "size", "")
    return f"{type(value).__name__} {shape} {hashlib.sha256(data).hexdigest()}"


def _loaded(line: bytes) -> Any:
    try:
        return _parsed(line)
    except ValueError as error:
        return error


def _parsed(line: bytes) -> Any:
    """The content of a line. Raises ValueError if it is not JSON in UTF-8, or an object has a key twice."""
    try:
        return _DECODER.decode(line.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"the line is not text in UTF-8: {error}") from None
    except RecursionError:
        raise ValueError("the line is not JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"the line is not JSON: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of its pairs, none of which another one hides."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise json.JSONDecodeError(f"the key '{twice}' stands twice in an object", "", 0)
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


_HUB_FILE = re.compile(r"hf://datasets/[^@]+@([0-9a-f]{40})/")
"""How the library `datasets` names a file of the hub."""
_IMAGE_TYPE = re.compile(r"(?:(?:large_)?list<[a-z]+: )?(?:(?:large_)?binary|struct<bytes: .*binary, path: \w+>)>?")
"""How Arrow writes the type of an image, or of a list of them."""


def _names_of_objects(feature: Any) -> tuple[str, list[str]] | None:
    """Of a column of objects, the part that holds a number for the category, and the names of the numbers."""
    inner = getattr(feature, "feature", feature)
    for part, kind in inner.items() if isinstance(inner, Mapping) else ():
        named: Any = getattr(kind, "feature", kind)
        if hasattr(named, "int2str"):
            return str(part), list(named.names)
    return None


def _with_names(objects: Any, part: str, names: list[str]) -> dict[str, Any]:
    """Objects with the names of their categories in place of the numbers, and all names beside them."""
    if isinstance(objects, list):
        objects = {key: [one.get(key) for one in objects] for key in objects[0]}
    named = [names[number] if isinstance(number, int) else number for number in objects[part] or ()]
    return {**objects, part: named, "names_of_all": names}


def _without_arrays(row: Any) -> Any:
    """A row with lists and numbers in the place of NumPy's, which tables of pandas have."""
    arrays = (np.ndarray, np.generic)
    if not isinstance(row, Mapping) or not any(isinstance(cell, arrays) for cell in row.values()):
        return row
    for column, cell in row.items():
        if isinstance(cell, np.ndarray) and cell.ndim > 2:
            return ValueError(f"'{column}' is an array of {cell.ndim} dimensions: give a picture as Image.fromarray(…)")
    return {column: _as_list(cell) for column, cell in row.items()}


def _as_list(cell: Any) -> Any:
    if isinstance(cell, (np.ndarray, np.generic)):
        cell = cell.tolist()
    return list(map(_as_list, cell)) if isinstance(cell, list) else cell


def _with_id(key: str, row: Any) -> Any:
    return (
        {**row, "id": row.get("id") or key}
        if isinstance(row, Mapping)
        else ValueError(f"what stands at {key[:80]!r} is no object")
    )


def _unread(images: Any) -> Any:
    """`Unread` for an image, or each of a list of them, that is there, and None for one that is missing."""
    if "list" in str(images.type):
        return [Unread if image.is_valid else None for image in images.values] if images.is_valid else []
    return Unread if images.is_valid else None
