"""Reads points in the forms that models write. No text raises; time is linear in its length."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, Final

from vlmenv.core.answers import parse_places
from vlmenv.core.coordinates import Point, is_point
from vlmenv.core.literals import OPEN, find_values

LONGEST: Final = 20_000
"""Characters of an answer that are read."""
_MARK = re.compile(r"<points?\b([^<>]{0,20000})>([^<>]{0,20000})", re.IGNORECASE)
_NUMBER = re.compile(r"[+-]?[0-9]{1,9}(?:\.[0-9]{0,17})?")
_NOT_IN_NUMBERS = re.compile(r"[^0-9.+\-,;\s()\[\]]")
_KEYS: Final = ("point_2d", "points_2d", "point", "points", "coordinate", "coordinates")
_SIDES: Final = ("width", "height", "w", "h")
_LONGEST_BARE: Final = 200
_COORDS = re.compile(r"\bcoords ?= ?(?:\"([^\"]{0,20000})\"|'([^']{0,20000})')", re.IGNORECASE)
_FRAME_ENDS = re.compile(r"[\t:;,]")
_CAPTION = re.compile(r"\balt ?= ?(?:\"[^\"]{0,20000}\"|'[^']{0,20000}')", re.IGNORECASE)
_ATTRIBUTE = re.compile(r"\b([xy])([0-9]{0,5}) ?= ?[\"']? {0,9}([+-]?[0-9]{1,9}(?:\.[0-9]{0,17})?)(?![\w.])")


def has_point_marks(content: str) -> bool:
    """Whether a text marks points as Molmo does."""
    return len(content) <= LONGEST and _MARK.search(content) is not None


def parse_marked_points(content: str) -> tuple[Point, ...] | None:
    """The points of `<point x="…" y="…" alt="…">` and `<points x1="…" y1="…" x2="…" y2="…" …>`, as Molmo writes them.

    Molmo2 writes `<points coords="1 1 10 20 2 30 40">`: the number of the image, then the number, x and y of
    each point.
    A mark without points in its attributes has them as its text, `<point>10 20</point>`, as UI-TARS writes it.

    Args:
        content: Any text.

    Returns:
        The points in the coordinates that the text uses; None if a mark has half a point, or none at all.
    """
    if len(content) > LONGEST:
        return None
    found: list[Point] = []
    for mark in _MARK.finditer(content):
        attributes = _CAPTION.sub("", mark[1])
        coords = _COORDS.search(attributes)
        points = _of_attributes(attributes) if coords is None else _of_coords(coords[1] or coords[2] or "")
        found += (_pairs_of(mark[2]) if points is None else points) or [(math.inf, math.inf)]
    return tuple(found) if found and all(map(is_point, found)) else None


def _of_attributes(attributes: str) -> list[Point] | None:
    """The points of attributes x and y, with the same numbers or none; empty if one lacks the other, None if all do."""
    numbers: dict[str, dict[str, float]] = {}
    for axis, number, value in _ATTRIBUTE.findall(attributes):
        numbers.setdefault(number, {})[axis] = float(value)
    if any(len(pair) != 2 for pair in numbers.values()):
        return []
    return [(pair["x"], pair["y"]) for pair in numbers.values()] or None


def _of_coords(coords: str) -> list[Point]:
    """The points of Molmo2's attribute; empty if a number lacks its x or y. Images are divided by any of `\\t:;,`."""
    points: list[Point] = []
    for image in filter(str.strip, _FRAME_ENDS.split(coords)):
        words = image.split()
        if len(words) < 4 or len(words) % 3 != 1 or not all(map(_NUMBER.fullmatch, words)):
            return []
        points += [(float(x), float(y)) for x, y in zip(words[2::3], words[3::3], strict=True)]
    return points


def parse_points(content: str) -> tuple[Point, ...] | None:
    """Reads any number of points from the content of an answer; "None" is the empty tuple.

    Molmo's marks, `{"point_2d": [x, y]}` and other JSON as Qwen writes it, or `[x, y]` in any brackets. Objects with
    `x` and `y` are points too. Of an object with a point under a key other numbers do not count.

    Args:
        content: Any text.

    Returns:
        The points in the coordinates that the text uses; None if there are none.
    """
    if has_point_marks(content):
        return parse_marked_points(content)
    if len(content) > LONGEST:
        return None
    named = [points for found in find_values(content) for points in _named(found.value)]
    if None in named:
        return None
    if named:
        listed = tuple(point for points in named for point in points or ())
        return listed if all(map(is_point, listed)) else None
    found = parse_places(content if OPEN.search(content) else _bracketed(content), 2)
    return None if found is None else tuple((place[0], place[1]) for place in found)


def _bracketed(content: str) -> str:
    """A text whose lines are two numbers each and nothing else, in brackets; any other text as it is."""
    lines = [line for line in content.splitlines() if line.strip()]
    if any(len(line) > _LONGEST_BARE for line in lines):
        return content
    points = [_pair(next((one.value for one in find_values(f"{{{line}}}")), None)) for line in lines]
    return ", ".join(f"[{one[0]}, {one[1]}]" for one in points if one) if points and all(points) else content


def _named(value: Any) -> Iterator[tuple[Point, ...] | None]:
    """The points of each object in a value of which a key says that it has some; None for one that has none."""
    if not isinstance(value, dict):
        for part in value if isinstance(value, list) else ():
            yield from _named(part)
        return
    plain = {key.lower(): one for key, one in value.items()}
    key = next((key for key in _KEYS if key in plain), None)
    inner = plain.get(key or "")
    if isinstance(inner, list) and any(isinstance(one, dict) and not {*_KEYS}.isdisjoint(one) for one in inner):
        yield from _named(inner)
    elif key is not None:
        yield _listed(plain[key])
    elif (point := _pair(plain)) is not None:
        yield (point,)
    elif _rows(plain):
        yield _listed(plain)
    else:
        for part in plain.values():
            yield from _named(part)


def _listed(value: Any) -> tuple[Point, ...] | None:
    """One point, or several; None if it is something else."""
    if value is None or value == []:
        return ()
    if (point := _pair(value)) is not None:
        return (point,)
    points = [_pair(one) for one in _rows(value)]
    found = tuple(point for point in points if point is not None)
    return found if found and len(found) == len(points) else None


def _rows(value: Any) -> list[Any]:
    """The points of a list, or of PixMo's `{"x": […], "y": […]}`."""
    if isinstance(value, dict):
        x, y = value.get("x"), value.get("y")
        if not isinstance(x, list) or not isinstance(y, list) or len(x) != len(y):
            return []
        return [list(pair) for pair in zip(x, y, strict=True)]
    return value if isinstance(value, list) else []


def _pair(value: Any) -> Point | None:
    """Two numbers as a list, as an object of x and y without sides, or as a text."""
    if isinstance(value, dict):
        value = None if any(side in value for side in _SIDES) else [value.get("x"), value.get("y")]
    if isinstance(value, str):
        pairs = _pairs_of(value)
        return pairs[0] if len(pairs) == 1 else None
    if not isinstance(value, list) or len(value) != 2:
        return None
    numbers = [float(one) for one in value if _is_number(one)]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else None


def _is_number(value: Any) -> bool:
    return type(value) is float or (isinstance(value, str) and _NUMBER.fullmatch(value.strip()) is not None)


def _pairs_of(text: str) -> list[Point]:
    """The points of a text of numbers and nothing else; empty for any other."""
    numbers = [] if _NOT_IN_NUMBERS.search(text) else [float(one) for one in _NUMBER.findall(text)]
    return list(zip(numbers[::2], numbers[1::2], strict=True)) if len(numbers) % 2 == 0 else []
