"""Atomic writes: a file or folder is complete, or not there at all, whenever the process is killed; and JSON files."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from vlmenv.core.errors import DataError


def located_name(name: str) -> str:
    """The absolute path of what exists under a name. Other names, such as those of data sets on a hub, stay."""
    return str(Path(name).absolute()) if Path(name).exists() else name


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """Atomic file write: a temporary file, which replaces `file` on success and is removed on failure.

    Yields:
        The temporary file to write to.
    """
    partial = file.with_name(f".{file.name}")
    try:
        yield partial
        partial.replace(file)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def write_atomic(file: Path, text: str) -> None:
    """Writes a text file atomically, in UTF-8."""
    with atomic_file(file) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Atomic folder write: a temporary folder, renamed on success, removed on failure.

    Yields:
        The temporary folder to write in.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    replace_folder(partial, folder)


def replace_folder(partial: Path, folder: Path) -> None:
    """Renames a complete folder to its final name; an older folder of that name is removed.

    Its files get the permissions of new files, which some libraries withhold. They are on the disk before the rename,
    so that a crash of the machine leaves no empty files behind.
    """
    allow_as_usual(partial)
    _flush(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    flush_file(folder.parent)


def allow_as_usual(folder: Path) -> None:
    """Gives all files of a folder the permissions that the umask gives to new files."""
    probe = folder / ".permissions"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def flush_file(file: Path) -> None:
    """Writes a file, or the entries of a folder, to the disk."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_digest(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(folder: Path) -> None:
    """Writes a folder with all that it holds to the disk."""
    for path in [folder, *folder.rglob("*")]:
        flush_file(path)


def read_object(file: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
        DataError: It holds anything else. The message names the file.
        OSError: It cannot be read.
    """
    return _object(file.read_bytes(), str(file))


def read_objects(file: Path) -> list[dict[str, Any]]:
    """Reads a file with a JSON object per line.

    Raises:
        DataError: A line holds anything else. The message names file and line.
        OSError: It cannot be read.
    """
    with file.open("rb") as stream:
        return [_object(line, f"{file}:{number}") for number, line in enumerate(stream, 1)]


def readable_objects(file: Path, contains: bytes = b"") -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines. Lines that cannot be read, or were not written to their end, are left out.

    Args:
        file: The file. Nothing is yielded if there is none, or if it is no regular file.
        contains: Bytes that a line must contain to be parsed at all.
    """
    if not file.is_file():
        return
    with file.open("rb") as stream:
        for line in stream:
            if contains not in line or not line.endswith(b"\n"):
                continue
            try:
                row = parse_json(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def parse_json(content: str | bytes) -> Any:
    """The content of a JSON document. Raises ValueError, also if it is nested too deeply for the parser."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def jsonable(value: Any) -> Any:
    """A value as JSON can hold it: sequences become lists, and what JSON has no form for becomes its text."""
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, float):  # before the abstract classes, which are slow to ask for
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, (list, tuple)):
        return [jsonable(part) for part in value]
    if isinstance(value, (int, Integral)):
        return int(value)
    if isinstance(value, Real):
        return jsonable(float(value))
    if isinstance(value, Mapping):
        return {str(key): jsonable(part) for key, part in value.items()}
    return str(value)


def _object(content: bytes, place: str) -> dict[str, Any]:
    try:
        found = parse_json(content)
    except ValueError as error:
        raise DataError(f"{place} is damaged: it is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise DataError(f"{place} is damaged: it holds no JSON object")
    return found
