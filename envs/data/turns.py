"""Reads conversations: turns of roles with text, or with parts of text, images and videos."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from vlmenv.core.rollout import IMAGE_MARK, Role, Turn
from vlmenv.core.video import VIDEO_MARK

_ROLES: Final[Mapping[str, Role]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
_TEXTS: Final = ("text", "input_text", "output_text")
_IMAGES: Final = ("image", "image_url", "input_image")
_VIDEOS: Final = ("video", "video_url")


class Conversation(NamedTuple):
    """A conversation, divided into question and answer."""

    turns: tuple[Turn, ...]
    """before the question"""
    question: str
    """the last turn of the user"""
    answer: Any
    """the turn of the assistant after it; None if there is none"""
    images: tuple[Any, ...]
    """those that stand in parts of turns, as they are written there"""
    videos: tuple[Any, ...] = ()
    """likewise"""


def read_turns(stored: Any, column: str) -> Conversation:
    """Reads a conversation in the forms of LLaVA (`from`, `value`), of OpenAI, Qwen and TRL (`role`, `content`).

    Args:
        stored: A list of turns, or one written as JSON.
        column: The column that has it, for messages.

    Raises:
        ValueError: It is no conversation that ends with a question.
    """
    if isinstance(stored, str):
        stored = _parsed(stored)
    if not isinstance(stored, list) or not stored or not all(isinstance(turn, Mapping) for turn in stored):
        raise ValueError(f"'{column}' is not a list of turns, each with a role and a text")
    images, videos = list[Any](), list[Any]()
    turns = [(_role(turn, column), _content(turn, column, images, videos)) for turn in stored]
    _check_order([role for role, _ in turns], column)
    answer = turns.pop()[1] if turns[-1][0] == "assistant" else None
    if not all(isinstance(text, str) for _, text in turns):
        raise ValueError(f"a turn of '{column}' has no text")
    return Conversation(
        tuple(Turn(role=role, text=text) for role, text in turns[:-1]),
        turns[-1][1],
        answer,
        tuple(images),
        tuple(videos),
    )


def _check_order(roles: list[str], column: str) -> None:
    """Raises ValueError unless user and assistant take turns, after a system turn or none."""
    spoken = roles[1:] if roles[0] == "system" else roles
    if not spoken or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(spoken)):
        raise ValueError(
            f"'{column}' has turns of {', '.join(roles)}: user and assistant must take turns, the user first, "
            "and only a system turn may come before"
        )


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _role(turn: Mapping[str, Any], column: str) -> Role:
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(f"'{column}' has a turn of {role!r}; known are {', '.join(_ROLES)}")
    return _ROLES[role]


def _content(turn: Mapping[str, Any], column: str, images: list[Any], videos: list[Any]) -> Any:
    """The text of a turn, parts joined; what else is there, such as a list of numbers, as it is."""
    content = turn.get("content", turn.get("value"))
    if content is None:
        raise ValueError(f"a turn of '{column}' has no text")
    if isinstance(content, (list, tuple)) and content and all(map(_is_part, content)):
        return "".join(_part(part, column, images, videos) for part in content)
    return content


def _is_part(part: Any) -> bool:
    return isinstance(part, Mapping) and not part.keys().isdisjoint(("type", *_TEXTS, *_IMAGES, *_VIDEOS))


def _part(part: Mapping[str, Any], column: str, images: list[Any], videos: list[Any]) -> str:
    """The text of a part; that of an image or a video is its mark."""
    named = ("text", "image", "image_url", *_VIDEOS)
    kind = part.get("type") or next((key for key in named if part.get(key)), None)
    if kind in _TEXTS:
        return str(part.get("text") or "")
    if kind in _IMAGES:
        stored = next((part[key] for key in ("image_url", "image", "url", "path", "base64") if part.get(key)), None)
        if stored is not None:
            images.append(stored)
        return IMAGE_MARK
    if kind in _VIDEOS:
        stored = next((part[key] for key in ("video", "video_url", "url", "path") if part.get(key)), None)
        if stored is not None:
            videos.append(stored)
        return VIDEO_MARK
    raise ValueError(f"'{column}' has a part of type {kind!r}, and the tasks show text, images and videos only")
