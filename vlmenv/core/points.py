"""Reads points in the forms that models write. No text raises; time is linear in its length."""

from __future__ import annotations

import re
from typing import Final

from vlmenv.core.answers import parse_places
from vlmenv.core.coordinates import Point, is_point

LONGEST: Final = 20_000
"""Characters of an answer that are read."""
_MARK = re.compile(r"<points?\b([^<>]{0,20000})>", re.IGNORECASE)
_ATTRIBUTE = re.compile(r"\b([xy])([0-9]{0,5}) ?= ?[\"']?([+-]?[0-9]{1,9}(?:\.[0-9]{0,17})?)(?![\w.])")


def has_point_marks(content: str) -> bool:
    """Whether a text marks points as Molmo does."""
    return len(content) <= LONGEST and _MARK.search(content) is not None


def parse_marked_points(content: str) -> tuple[Point, ...] | None:
    """The points of `<point x="…" y="…" alt="…">` and `<points x1="…" y1="…" x2="…" y2="…" …>`, as Molmo writes them.

    Args:
        content: Any text.

    Returns:
        The points in the coordinates that the text uses; None if a mark has an x without its y, or none at all.
    """
    if len(content) > LONGEST:
        return None
    found: list[Point] = []
    for mark in _MARK.finditer(content):
        numbers: dict[str, dict[str, float]] = {}
        for axis, number, value in _ATTRIBUTE.findall(mark[1]):
            numbers.setdefault(number, {})[axis] = float(value)
        if not numbers or any(len(pair) != 2 for pair in numbers.values()):
            return None
        found += [(pair["x"], pair["y"]) for pair in numbers.values()]
    return tuple(found) if found and all(map(is_point, found)) else None


def parse_points(content: str) -> tuple[Point, ...] | None:
    """Reads any number of points from the content of an answer; "None" is the empty tuple.

    Molmo's marks, `{"point_2d": [x, y]}` and other JSON as Qwen writes it, or `[x, y]` in any brackets.

    Args:
        content: Any text.

    Returns:
        The points in the coordinates that the text uses; None if there are none.
    """
    if has_point_marks(content):
        return parse_marked_points(content)
    found = parse_places(content, 2)
    return None if found is None else tuple((place[0], place[1]) for place in found)
