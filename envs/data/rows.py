"""Rows of a data set, whatever its layout: conversations, or columns as PeBR-R1 and EasyR1 have them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from PIL.Image import Image as PILImage

from vlmenv.core.answers import Detection
from vlmenv.core.errors import ConfigError, unknown_name
from vlmenv.core.formats import SECTIONS, TAGS, AnswerFormat

IMAGE_MARK: Final = "<image>"

ImageRef = str | bytes | PILImage | None
"""A path, an encoded file's bytes or a picture; None for one that is there but was not read."""

COLUMNS: Final[Mapping[str, tuple[str, ...]]] = {
    "id": ("qid", "id"),
    "images": ("images", "image"),
    "question": ("problem", "question", "query"),
    "answer": ("answer", "solution"),
    "keywords": ("key_word", "keywords"),
    "subject": ("subject",),
    "method": ("accu_reward_method",),
    "tolerance": ("tolerance",),
    "choices": ("choices",),
}
"""What a row is made of, and the columns that it is looked for in."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row as it is stored, before a task makes sense of its answer."""

    id: str
    images: tuple[ImageRef, ...]
    question: str
    answer: str
    """empty where there is none"""
    response: str = ""
    """the whole completion that the answer was taken from, where the row has one with its reasoning"""
    keywords: tuple[str, ...] = ()
    subject: str = ""
    method: str = ""
    """the reward that the row asks for; empty for the task's own"""
    tolerance: float = 0.0
    """by which a number may be off"""
    choices: tuple[str, ...] = ()
    """what the letters from A on stand for"""
    detections: tuple[Detection, ...] | None = None
    """true boxes, where the data set has them as such"""
    size: tuple[int, int] | None = None
    """width and height of the image that the boxes refer to, where the data set tells them"""


def check_columns(columns: Mapping[str, str]) -> None:
    """Raises ConfigError where a column map names what no row has."""
    for name in columns:
        if name not in COLUMNS:
            raise ConfigError(unknown_name("part of a row", name, COLUMNS))


def read_row(raw: Any, number: int, columns: Mapping[str, str]) -> Row:
    """Reads a row of either layout.

    Args:
        raw: The row as a mapping of columns.
        number: Its number, which is its id where it has none.
        columns: For parts of the row, the columns that hold them, where they differ from `COLUMNS`.

    Raises:
        ValueError: A part is missing or of the wrong type; the message names it.
    """
    if not isinstance(raw, Mapping):
        raise ValueError("the row is not a JSON object")
    part = {name: _part(raw, name, columns) for name in COLUMNS}
    for layout in _CONVERSATIONS:
        if raw.get(layout.column) is not None:
            for name, said in zip(("question", "answer"), _turns(raw[layout.column], layout), strict=True):
                part[name] = part[name] if name in columns else said
    images = _images(part["images"])
    for name in ("id", "question", "answer", "subject"):
        _check_text(name, part[name])
    answer, response = _divided(part["answer"])
    return Row(
        id=str(number if part["id"] is None else part["id"]),
        images=images,
        question=_question(part["question"], len(images)),
        answer=_answer(answer),
        response=response,
        keywords=_keywords(part["keywords"]),
        subject=_text(part["subject"], "subject"),
        method=_text(part["method"], "accu_reward_method"),
        tolerance=_tolerance(part["tolerance"]),
        choices=_choices(part["choices"]),
    )


def _part(raw: Mapping[str, Any], name: str, columns: Mapping[str, str]) -> Any:
    if name in columns:
        if columns[name] not in raw:
            raise ValueError(f"the row has no column '{columns[name]}', which the column map names for '{name}'")
        return raw[columns[name]]
    for column in COLUMNS[name]:
        found = raw.get(column)
        if found is not None and not (isinstance(found, list) and not found):
            return found
    return None


def _check_text(name: str, value: Any) -> None:
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the {name} holds half a surrogate pair, which is no character") from None


class _Conversation(NamedTuple):
    """A layout of a question with its answer."""

    column: str
    asks: str
    answers: str
    who: str
    """the key of a turn's role"""
    what: str
    """the key of its text"""


_CONVERSATIONS: Final = (
    _Conversation("conversations", "human", "gpt", "from", "value"),
    _Conversation("messages", "user", "assistant", "role", "content"),
)


def _turns(turns: Any, layout: _Conversation) -> tuple[str, Any]:
    column, asks, answers, who, what = layout
    if not isinstance(turns, list) or len(turns) != 2 or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"'{column}' is not a list of one {asks} and one {answers} turn")
    if turns[0].get(who) != asks or turns[1].get(who) != answers:
        raise ValueError(f"'{column}' must begin with a turn from '{asks}' and one from '{answers}'")
    question, answer = turns[0].get(what), turns[1].get(what)
    if not isinstance(question, str) or answer is None:
        raise ValueError(f"a turn of '{column}' has no text as its '{what}'")
    return question, answer


def _images(found: Any) -> tuple[ImageRef, ...]:
    refs = found if isinstance(found, (list, tuple)) else [] if found is None else [found]
    return tuple(_image(ref) for ref in refs)


def _image(ref: Any) -> ImageRef:
    if isinstance(ref, Mapping) and (ref.get("bytes") or ref.get("path")):
        ref = ref.get("bytes") or ref["path"]
    if ref is Unread:
        return None
    if isinstance(ref, os.PathLike):
        ref = os.fspath(ref)
    if isinstance(ref, str):
        _check_text("image's path", ref)
    if isinstance(ref, PILImage) and 0 in ref.size:
        raise ValueError("an image has no pixels")
    if isinstance(ref, (str, bytes, PILImage)):
        return ref
    raise ValueError("an image is neither a path, nor bytes, nor a picture")


class Unread:
    """Stands in a raw row for an image that is there, but need not be read yet."""


def _question(question: Any, images: int) -> str:
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"the row has no question: no text in 'conversations', {places('question')}")
    marks = question.count(IMAGE_MARK)
    if marks not in (0, images):
        raise ValueError(f"the question has {marks} {IMAGE_MARK} marks for {images} images")
    return _without_marks(question)


def _without_marks(question: str) -> str:
    """Drops the marks at the beginning, where the images go anyhow; one within a sentence becomes its number."""
    number = 1
    question = question.strip()
    while question.startswith(IMAGE_MARK):
        question, number = question.removeprefix(IMAGE_MARK).strip(), number + 1
    while IMAGE_MARK in question:
        question, number = question.replace(IMAGE_MARK, f"image {number}", 1), number + 1
    return question


def _divided(answer: Any) -> tuple[Any, str]:
    """The answer within a text that holds its reasoning too, and that text; else the answer itself."""
    if isinstance(answer, str):
        for form, mark in ((AnswerFormat.TAGS, TAGS[0]), (AnswerFormat.SECTIONS, SECTIONS[0])):
            if mark in answer and (content := form.extract(answer)) is not None:
                return content, answer.strip()
    return answer, ""


def _answer(answer: Any) -> str:
    if answer is None:
        return ""
    if isinstance(answer, float) and not math.isfinite(answer):
        raise ValueError(f"the answer is {answer}")
    try:
        text = answer if isinstance(answer, str) else json.dumps(answer)
    except TypeError:
        raise ValueError(f"the answer is a {type(answer).__name__}: no text, number, or list of such") from None
    return text.replace("<answer>", "").replace("</answer>", "").strip()


def _keywords(found: Any) -> tuple[str, ...]:
    words = [] if found is None else [found] if isinstance(found, str) else found
    if not isinstance(words, (list, tuple)) or not all(isinstance(word, str) for word in words):
        raise ValueError("the key words are no list of texts")
    return tuple(word.strip() for word in words if word.strip())


def _choices(found: Any) -> tuple[str, ...]:
    """A list of what the letters stand for; data sets have other things too in a column of this name."""
    return tuple(map(str.strip, map(str, found))) if isinstance(found, (list, tuple)) else ()


def _text(found: Any, name: str) -> str:
    if not isinstance(found, (str, int, float, type(None))):
        raise ValueError(f"'{name}' is not a text")
    return "" if found is None else str(found)


def _tolerance(found: Any) -> float:
    if found is None:
        return 0.0
    if type(found) not in (int, float) or not 0 <= found < float("inf"):
        raise ValueError(f"'tolerance' is {found!r}, which is no number from 0 up")
    return float(found)


def places(name: str) -> str:
    """Where a part of a row is looked for, for messages."""
    return " or ".join(f"'{column}'" for column in COLUMNS[name])
