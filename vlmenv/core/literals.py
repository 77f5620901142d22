"""Finds lists and objects in any text. No text raises; time is linear in its length.

JSON, Python's literals and models' variants of them are read alike. Quotes may be single, double, curly or missing.
Commas may trail or be missing. Comments, full-width punctuation, and lists without their last bracket are read too.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

DEEPEST: Final = 50
"""Greatest depth of nesting that is read."""


class Cut(dict[str, Any]):
    """An object without a closing bracket; it has the complete pairs."""


class Found(NamedTuple):
    """A list or an object in a text."""

    start: int
    end: int
    """start and end, in characters"""
    value: Any


class _Word(str):
    """Text without quotes."""

    __slots__ = ()


class _Frame:
    """A bracket that is open."""

    __slots__ = ("bracket", "items", "key", "keyed", "pending", "start")

    def __init__(self, start: int, bracket: str) -> None:
        self.start, self.bracket = start, bracket
        self.items: list[tuple[str | None, Any]] = []
        self.pending: list[Any] = []  # since the last comma or colon
        self.key: str | None = None
        self.keyed = False


OPEN: Final = re.compile(r"[\[({［（｛【]")
"""What a list or an object begins with."""
_TOKEN = re.compile(
    r"""
    (?P<open>[\[({［（｛【]) | (?P<close>[\])}］）｝】]) | (?P<comma>[,，、;；]) | (?P<colon>[:：=])
    | (?P<quote>["“”'‘’]) | (?P<comment>//|\#(?!\d)|/\*)
    | (?P<number>[+-]?(?:[0-9０-９]++\.?[0-9０-９]*+|\.[0-9]++)(?:[eE][+-]?[0-9]++)?+)
    | (?P<word>[^\s\[\](){},:;=，、；：＝［］（）｛｝【】"“”'‘’][^\s\[\](){},:;=，、；：＝［］（）｛｝【】"“”]*+)
    """,
    re.VERBOSE,
)
_CLOSING: Final = {  # a quote ends a string only before what may follow one
    mark: re.compile(rf"(?<!\\)(?:\\\\)*[{mark}](?=\s*+(?:[,，、;:：=\]}})］｝）】]|\Z))") for mark in ('"“”', "'‘’")
}
_CONSTANTS: Final = {"none": None, "null": None, "true": True, "false": False}
_MARKUP = "*`$"


def find_values(text: str) -> Iterator[Found]:
    """Yields the outermost lists and objects of a text, in order.

    Round and square brackets are lists, as are curly ones without keys. Any bracket with `key: value` or `key=value` in
    it is an object, with texts as keys. A list without its closing bracket yields its complete members. An object
    without one yields its complete pairs, as a `Cut`.
    """
    return _Scanner(text).run()


class _Scanner:
    def __init__(self, text: str) -> None:
        self._text = text
        self._frames: list[_Frame] = []
        self._closings: dict[str, list[int]] = {}

    def run(self) -> Iterator[Found]:
        place = 0
        while match := (_TOKEN if self._frames else OPEN).search(self._text, place):
            place = match.end()
            kind = match.lastgroup or "open"
            if kind == "open":
                self._open(match)
            elif kind == "close":
                frame = self._frames.pop()
                if (found := self._closed(frame, place, whole=True)) is not None:
                    yield found
            elif kind == "quote":
                place = self._string(match)
            elif kind == "comment":
                place = self._comment(match)
            else:
                _take(self._frames[-1], kind, match[0])
        while self._frames:
            frame = self._frames.pop()
            if (found := self._closed(frame, len(self._text), whole=False)) is not None:
                yield found

    def _open(self, match: re.Match[str]) -> None:
        if len(self._frames) >= DEEPEST:
            self._frames.clear()  # nobody nests boxes that deeply
        self._frames.append(_Frame(match.start(), match[0]))

    def _closed(self, frame: _Frame, end: int, *, whole: bool) -> Found | None:
        """Yields the value of an outermost bracket; adds that of another one to the bracket around it."""
        value = _value(frame) if whole else _rest(frame)
        if not whole and not value:
            return None
        if not self._frames:
            return Found(frame.start, end, value)
        self._frames[-1].pending.append(value)
        return None

    def _comment(self, match: re.Match[str]) -> int:
        """Skips a comment, which only square and curly brackets have. Returns the position after it."""
        if self._frames[-1].bracket in "(（":
            return match.end()
        closing = "*/" if match[0] == "/*" else "\n"
        end = self._text.find(closing, match.end())
        return len(self._text) if end < 0 else end + len(closing)

    def _string(self, match: re.Match[str]) -> int:
        """Reads a string, unless the mark is an apostrophe or has no end. Returns the position after it."""
        end = None if self._text[match.start() - 1].isalnum() else self._closing(match)
        if end is None:
            return match.end()
        self._frames[-1].pending.append(_unescaped(self._text[match.end() : end]))
        return end + 1

    def _closing(self, match: re.Match[str]) -> int | None:
        marks = next(marks for marks in _CLOSING if match[0] in marks)
        if marks not in self._closings:
            self._closings[marks] = [found.end() - 1 for found in _CLOSING[marks].finditer(self._text)]
        places = self._closings[marks]
        index = bisect_right(places, match.start())
        return places[index] if index < len(places) else None


def _take(frame: _Frame, kind: str, token: str) -> None:
    """Adds a comma, a colon, a number or a word to an open bracket."""
    if kind == "comma":
        _flush(frame)
    elif kind == "colon":
        _begin_pair(frame)
    elif kind == "number":
        frame.pending.append(float(token))
    elif not token.startswith("\\") and (word := token.strip(_MARKUP)):
        frame.pending.append(_Word(word))


def _begin_pair(frame: _Frame) -> None:
    """Takes the text before a colon as the key of what follows."""
    pending = frame.pending
    first = len(pending)
    while first and isinstance(pending[first - 1], _Word):
        first -= 1
    if first == len(pending) and pending and isinstance(pending[-1], str):
        first -= 1
    key = " ".join(pending[first:])
    del pending[first:]
    _flush(frame)
    frame.key, frame.keyed = key, True


def _flush(frame: _Frame) -> None:
    """Ends a member of a list, or the value of a pair."""
    tokens, key = frame.pending, frame.key
    frame.pending, frame.key = [], None
    if not tokens:
        return
    compound = [token for token in tokens if isinstance(token, list | dict)]
    values = compound or (tokens if all(isinstance(token, float) for token in tokens) else [_scalar(tokens)])
    if key is not None and len(values) > 1:
        values = [values]
    frame.items += [(key, value) for value in values]


def _scalar(tokens: list[Any]) -> Any:
    """The value of adjacent words, strings and numbers: a constant, a number of pixels, or a text."""
    if len(tokens) == 2 and isinstance(tokens[0], float) and tokens[1] in ("px", "pixels"):
        return tokens[0]
    text = " ".join(f"{token:g}" if isinstance(token, float) else token for token in tokens)
    return _CONSTANTS.get(text.lower(), text) if isinstance(tokens[0], _Word) else text


def _value(frame: _Frame) -> Any:
    _flush(frame)
    if frame.keyed or (not frame.items and frame.bracket in "{｛"):
        return {key: value for key, value in frame.items if key is not None}
    return [value for _, value in frame.items]


def _rest(frame: _Frame) -> Any:
    """The complete members of an unclosed bracket. Its last number may be truncated, so it is left out."""
    if not frame.keyed:
        _flush(frame)
        return [value for _, value in frame.items if isinstance(value, list | dict)]
    if frame.pending and not isinstance(frame.pending[-1], float | _Word):
        _flush(frame)
    return Cut({key: value for key, value in frame.items if key is not None})


def _unescaped(content: str) -> str:
    if "\\" not in content:
        return content
    try:
        return str(json.loads(f'"{content}"', strict=False))
    except ValueError:
        return content
