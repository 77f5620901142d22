"""Files that are whole or not there at all, whenever the process is killed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A path to write to, which takes the file's name, and the place of an older one, only when all is written."""
    partial = file.with_name(f".{file.name}")
    yield partial
    partial.replace(file)


def write_whole(file: Path, text: str) -> None:
    """Writes a text file, which takes its name, and the place of an older one, only when all is written."""
    with whole_file(file) as partial:
        partial.write_text(text, encoding="utf-8")
