"""Files that are whole or not there at all, whenever the process is killed."""

from __future__ import annotations

from pathlib import Path


def write_whole(file: Path, text: str) -> None:
    """Writes a text file, which takes its name, and the place of an older one, only when all is written."""
    partial = file.with_name(f".{file.name}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
