"""VLM-R1's JSONL: a row is an image, or several, and a conversation of one question and its answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vlmenv.core.errors import DataError
from vlmenv.envs.data.images import load_image
from vlmenv.envs.data.source import Sample, Source

IMAGE_MARK = "<image>"


class Conversations(Source):
    """A JSONL file in VLM-R1's layout.

    Each line is `{"id": …, "image": path or list of paths, "conversations": [{"from": "human",
    "value": …}, {"from": "gpt", "value": …}]}`; `image` may be absent. Every row is checked when the
    file is opened, after which only the lines' offsets are held in memory.

    Args:
        file: The JSONL file.
        image_root: Folder that image paths are relative to; the file's own where left out.
        needs_image: Whether a row without an image is faulty.
        read_target: Turns the answer's text into the truth, and raises ValueError where it cannot.

    Raises:
        DataError: The file is missing or empty, or a row is faulty; the message names file and line.
    """

    def __init__(
        self, file: Path, image_root: Path | None, *, needs_image: bool, read_target: Callable[[str], Any]
    ) -> None:
        if not file.is_file():
            raise DataError(f"{file}: no such file")
        self._file = file
        self._image_root = image_root if image_root is not None else file.parent
        if not self._image_root.is_dir():
            raise DataError(f"image_root {self._image_root}: no such folder")
        self._needs_image = needs_image
        self._read_target = read_target
        self._offsets, self._lines = self._index()
        self.size = len(self._offsets)

    def get(self, index: int) -> Sample:
        line = int(self._lines[index])
        with self._file.open("rb") as stream:
            stream.seek(int(self._offsets[index]))
            identity, paths, question, target = self._read(stream.readline(), line)
        place = f"{self._file}:{line}"
        return Sample(identity, tuple(load_image(path, place) for path in paths), question, target)

    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        """Checks every row; offsets and line numbers of those that are not blank."""
        offsets, lines, offset = [], [], 0
        with self._file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    for path in self._read(line, number)[1]:
                        if not _is_file(path):
                            raise DataError(f"{self._file}:{number}: there is no image {str(path)[:200]}")
                    offsets.append(offset)
                    lines.append(number)
                offset += len(line)
        if not offsets:
            raise DataError(f"{self._file}: the file has no rows")
        return np.array(offsets), np.array(lines)

    def _read(self, line: bytes, number: int) -> tuple[str, list[Path], str, Any]:
        """A row's id, image paths, question and truth."""
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self._file}:{number}: the line is not JSON: {error}") from None
        try:
            paths = [self._image_root / name for name in _image_names(row)]
            if self._needs_image and not paths:
                raise ValueError("the task needs an image, but the row has none")
            question, answer = _turns(row)
            _check_marks(question, len(paths))
            return str(row.get("id", number)), paths, _without_marks(question), self._read_target(answer)
        except ValueError as error:
            raise DataError(f"{self._file}:{number}: {error}") from None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name that is too long
        return False


def _image_names(row: Any) -> list[str]:
    if not isinstance(row, dict):
        raise ValueError("the row is not a JSON object")
    names = row.get("image") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("'image' is neither a path nor a list of paths")
    return names


def _turns(row: dict[str, Any]) -> tuple[str, str]:
    turns = row.get("conversations")
    if not isinstance(turns, list) or len(turns) != 2 or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("'conversations' is not a list of one human and one gpt turn")
    if turns[0].get("from") != "human" or turns[1].get("from") != "gpt":
        raise ValueError("'conversations' must begin with a turn from 'human' and one from 'gpt'")
    question, answer = turns[0].get("value"), turns[1].get("value")
    if not isinstance(question, str) or answer is None:
        raise ValueError("a turn of 'conversations' has no text as its 'value'")
    answer = answer if isinstance(answer, str) else json.dumps(answer)
    return question, answer.replace("<answer>", "").replace("</answer>", "").strip()


def _check_marks(question: str, images: int) -> None:
    marks = question.count(IMAGE_MARK)
    if marks not in (0, images):
        raise ValueError(f"the question has {marks} {IMAGE_MARK} marks for {images} images")


def _without_marks(question: str) -> str:
    """Drops the marks at the beginning, where the images go anyhow; one within a sentence becomes its number."""
    number = 1
    question = question.strip()
    while question.startswith(IMAGE_MARK):
        question, number = question.removeprefix(IMAGE_MARK).strip(), number + 1
    while IMAGE_MARK in question:
        question, number = question.replace(IMAGE_MARK, f"image {number}", 1), number + 1
    return question
