"""The manifest of a checkpoint: checksums of its files, and the facts of the run that resuming compares."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from vlmenv.core.files import file_digest, parse_json

MANIFEST: Final = "manifest.json"
_THREADS: Final = 4


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes the manifest of a folder that holds all its other files.

    Args:
        folder: The folder.
        facts: What else to keep, as JSON can hold it.
    """
    content = {**facts, "files": dict(_described(folder))}
    (folder / MANIFEST).write_text(
        json.dumps({"sha256": _digest(content), "content": content}, indent=1) + "\n", encoding="utf-8"
    )


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The facts and files of a checkpoint; None for one of an earlier version, which has no manifest.

    Raises:
        ValueError: The manifest is damaged.
    """
    file = folder / MANIFEST
    if not file.is_file():
        return None
    try:
        whole = parse_json(file.read_bytes())
        content: dict[str, Any] = whole["content"]
        intact = whole["sha256"] == _digest(content)
        described = all({"bytes", "sha256"} <= told.keys() for told in content["files"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} cannot be read") from error
    if not (intact and described):
        raise ValueError(f"{MANIFEST} has been changed since it was written")
    return content


def damage(folder: Path, manifest: Mapping[str, Any], *, model: bool = False) -> str | None:
    """What is wrong with the files of a checkpoint; None if all are as they were written.

    Args:
        folder: The checkpoint.
        manifest: Its manifest.
        model: Look at the model's files alone, not at the trainer's state.
    """
    files = {name: told for name, told in manifest["files"].items() if not (model and name.endswith(".pt"))}
    for name, told in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != told["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, and had {told['bytes']}"
    digests = _digests([folder / name for name in files])
    changed = [name for name, found in zip(files, digests, strict=True) if found != files[name]["sha256"]]
    return f"{changed[0]} has other bytes than were written" if changed else None


def _described(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST)
    for file, digest in zip(files, _digests(files), strict=True):
        yield file.relative_to(folder).as_posix(), {"bytes": file.stat().st_size, "sha256": digest}


def _digests(files: list[Path]) -> list[str]:
    with ThreadPoolExecutor(_THREADS) as pool:  # hashing releases Python's lock
        return list(pool.map(file_digest, files))


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
