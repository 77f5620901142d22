"""Reads and writes the content of answers. No text raises, and every function runs in time linear in its length."""

from __future__ import annotations

import json
import math
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

from vlmenv.core.coordinates import Box, Point, iou, is_box, is_point
from vlmenv.core.literals import OPEN, Cut, Found, find_values

NONE: Final = "None"
"""The answer, also in data sets, if nothing in the image fits."""

Target = Box | Literal["None"]
"""A box, or `"None"` if nothing in the image fits."""


class Detection(NamedTuple):
    """A labelled box."""

    label: str
    box: Box
    crowd: bool = False
    """for a true box: whether it is a region of many objects, in which answers count neither way, as in COCO"""
    area: float | None = None
    """for a true box: the object's area in squared pixels, if known more exactly than the box's"""


AnswerKind = Literal["choice", "yes_no", "numeric", "exact", "math", "edit"]
"""The method of comparison: `choice` compares letters or sets of letters, `yes_no` words, `numeric` numbers within a
tolerance, `exact` normalised strings, `math` symbolically, and `edit` by string similarity."""


class Answer(NamedTuple):
    """A true answer, and its method of comparison."""

    text: str
    kind: AnswerKind
    tolerance: float = 0.0
    """for numbers: the greatest difference that counts as equal"""
    choices: tuple[str, ...] = ()
    """for letters: the meanings of those from A on, if known; an answer may write them out"""
    others: tuple[Answer, ...] = ()
    """other right answers"""
    pages: tuple[int, ...] = ()
    """numbers of the sample's images that show it, from 1; empty if unknown"""


class Caption(NamedTuple):
    """The truth of a captioning row."""

    keywords: tuple[str, ...]
    """key words that a description should mention"""
    answer: Answer | None = None
    """the answer to the row's question, if it has one"""


class _Mention(NamedTuple):
    """A possible box in an answer."""

    label: str | None
    box: Box | None
    """None if the numbers are no box"""
    by_key: bool = False
    """whether a key says that it is a box"""
    whole: bool = True
    """whether the object around it is complete"""


_LONGEST_BOX = 10_000  # characters; a box needs 30, a wordy answer some hundreds
_LONGEST_DETECTIONS = 100_000
_LONGEST_LOOSE = 20_000  # of what is no JSON, which takes longer to read
_DEEPEST = 50
_LONGEST_NONE = 200

_BOX_KEYS: Final = (
    *("bbox2d", "bbox", "box2d", "box", "boundingbox", "bndbox", "position"),
    *("bboxes2d", "bboxes", "boxes2d", "boxes", "boundingboxes", "coordinates"),
)
_LABEL_KEYS: Final = (
    *("label", "labels", "category", "categoryname", "class", "classname"),
    *("name", "object", "text", "description"),
)
_EDGES: Final = tuple(
    tuple(names.split())
    for names in ("xmin ymin xmax ymax", "x1 y1 x2 y2", "left top right bottom", "x0 y0 x1 y1", "minx miny maxx maxy")
)
_SIDES: Final = tuple(
    tuple(names.split()) for names in ("x y width height", "x y w h", "left top width height", "xmin ymin width height")
)
_CORNERS: Final = (("topleft", "bottomright"), ("tl", "br"))

_NUMBER = re.compile(r"[+-]?[0-9]{1,9}(?:\.[0-9]{0,17})?")
_NOT_IN_NUMBERS = re.compile(r"[^0-9.+\-,;\s()\[\]]")
_TAG = re.compile(r"<[^<>]{1,40}>")
_WRAPPING = re.compile(r"```\w*|<[^<>]{1,40}>|\\(?:boxed|text)|[\s*_`\"'“”{}$.。]")
_NONE_FORMS: Final = frozenset({"none", "null", "[]", "[none]", "[null]", "therearenone", "thereisnone"})
_BULLET = re.compile(r"\s*(?:[-*•]|\d{1,4}[.)])\s")
_NAMED_LABEL = re.compile(r"(?:label|category|class|name|object)\s?[:=]", re.IGNORECASE)
_BETWEEN_CORNERS: Final = frozenset(
    {"to", "and", "at", "is", "the", "bottom", "lower", "right", "corner", "x2", "y2", "max"}
)


_DENIED_PLACE = re.compile(
    r"(?:\b(?:not|never|anything but|nowhere near|except)|n['’]t)\b"
    r"(?:\s{1,3}(?:at|in|on|the|an?|be|box|point|position|located|found|click|it|to|actually|really)\b){0,4}"
    r"[\s:*`\"'$]{0,4}(?:[a-z_.]{2,30})?[\[({]{1,3}\s{0,3}[\d.]"
    r"|\d\s{0,3}[\])}]{1,3}[\s*`]{0,4}(?:\?\s{0,3}no\b|(?:is|are)\s{1,3}(?:wrong|incorrect|not)\b)",
    re.IGNORECASE,
)


def denies_a_place(content: str) -> bool:
    """Whether a text says of numbers in brackets that they are not the place: "It is not at [10, 20]"."""
    return _DENIED_PLACE.search(content) is not None


def parse_box(content: str) -> Target | None:
    """Reads one box, or "None", from the content of an answer, with the leniency of `parse_detections`.

    Content without a box, with several different ones, or with one that it denies, is no answer. Neither is a
    box with swapped edges or implausible coordinates, or content of more than 10,000 characters.

    Args:
        content: Any text.

    Returns:
        The box in the coordinates that the text uses, `"None"`, or None if there is no single answer.
    """
    mentions = _mentions(content) if len(content) <= _LONGEST_BOX else None
    if mentions is None or denies_a_place(content):
        return None
    boxes = {mention.box for mention in mentions}
    return NONE if not boxes else boxes.pop() if len(boxes) == 1 else None


def parse_detections(content: str) -> tuple[Detection, ...] | None:
    """Reads labelled boxes from the content of an answer; "None" and the empty list are none.

    Objects with a box under `bbox_2d`, `bbox`, `box` or the like, or with named edges, such as `x_min` or `left`, are
    read. They may stand in a fence or not, beside sentences, one per line, or nested. They may be in JSON or Python,
    with trailing commas or comments. Without such objects, four numbers in brackets, or two corners as
    `(x1,y1),(x2,y2)`, are boxes. The text before them is the label, as in `<ref>cat</ref><box>[[1,2,3,4]]</box>`. A box
    without a label, or with invalid numbers, makes the content unreadable. A truncated object does not.

    Args:
        content: Any text.

    Returns:
        The detections in the coordinates that the text uses. None: there is no such list, or the content is too long
        (100,000 characters, or 20,000 if it is not JSON).
    """
    mentions = _mentions(content) if len(content) <= _LONGEST_DETECTIONS else None
    if mentions is None:
        return None
    kept = [mention for mention in mentions if mention.whole or mention.label is not None]
    found = [Detection(label.strip(), box) for label, box, *_ in kept if label is not None and box is not None]
    return tuple(found) if len(found) == len(kept) and bool(kept) == bool(mentions) else None


def is_exact_box(content: str) -> bool:
    """Whether the content of an answer is a box in the exact form, or "None".

    The exact form is a JSON list of four numbers, or an object with `bbox_2d`, which may be alone in a list. It may be
    in a fence.
    """
    if len(content) > _LONGEST_BOX:
        return False
    value = _json(content)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    numbers = _four_as_asked(value.get("bbox_2d") if isinstance(value, dict) else value)
    return _unfenced(content) == NONE or (numbers is not None and _box(numbers) is not None)


def is_exact_detections(content: str) -> bool:
    """Whether the content of an answer is a JSON list of `{"bbox_2d", "label"}`, in a fence or none, or "None"."""
    if len(content) > _LONGEST_DETECTIONS:
        return False
    value = _json(content)
    return _unfenced(content) == NONE or (isinstance(value, list) and all(map(_is_exact_detection, value)))


def _is_exact_detection(row: object) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("label"), str):
        return False
    numbers = _four_as_asked(row.get("bbox_2d"))
    return numbers is not None and _box(numbers) is not None


def fold_label(label: str) -> str:
    """A label without case and extra white space, for comparison."""
    return " ".join(label.casefold().split())


def _mentions(content: str) -> list[_Mention] | None:
    """The boxes in an answer: those under keys, otherwise all. Empty if it says "None"; None if it has no box."""
    value = _json(content)
    if not isinstance(value, list | dict) and len(content) > _LONGEST_LOOSE:
        return None
    values = [Found(0, len(content), value)] if isinstance(value, list | dict) else _values_in(content)
    mentions = _placed_mentions(content, values)
    if not values and not OPEN.search(content):  # x1: 1, y1: 2, … or 1, 2, 3, 4
        whole = find_values("{" + _TAG.sub(" ", content) + "}")
        mentions = [one for found in whole for one in _boxes_in(found.value)]
    if mentions:
        return [mention for mention in mentions if mention.by_key] or mentions
    empty = bool(values) and all(_is_empty(found.value) for found in values)
    return [] if empty or _says_none(content) else None


def _values_in(content: str) -> list[Found]:
    """The lists and objects in a text. A list of objects that is repeated at once counts once."""
    kept: list[Found] = []
    for found in find_values(content):
        objects = isinstance(found.value, list) and bool(found.value) and isinstance(found.value[0], dict)
        if not (objects and kept and kept[-1].value == found.value):
            kept.append(found)
    return kept


def _json(content: str) -> object:
    """The JSON value of a text, which may be in a fence. None: it is not JSON."""
    try:
        return json.loads(_unfenced(content))
    except (ValueError, RecursionError):
        return None


def _unfenced(content: str) -> str:
    """`content` without white space and a Markdown code fence around it."""
    content = content.strip()
    if len(content) > 5 and content.startswith("```") and content.endswith("```"):
        content = content[3:-3].lstrip(string.ascii_letters)
    return content.strip()


def _is_empty(value: object) -> bool:
    """Whether a JSON value lists nothing, as `[]`, `{"objects": []}` or `{"bbox_2d": null}`."""
    values = list(value.values()) if isinstance(value, dict) else [value]
    return (bool(values) and all(one == [] for one in values)) or _names_no_box(value)


def _names_no_box(value: object) -> bool:
    rows = value if isinstance(value, list) else [value]
    return bool(rows) and all(isinstance(row, dict) and _says_no_box(row) for row in rows)


def _says_no_box(row: dict[str, object]) -> bool:
    return any(_plain(key) in _BOX_KEYS and value in (None, [], NONE, "none") for key, value in row.items())


def _says_none(content: str) -> bool:
    """Whether a text, or its first or last line, is "None"."""
    lines = content.strip().splitlines()
    return any(_is_none(text) for text in (content, *lines[:1], *lines[-1:]))


def _is_none(text: str) -> bool:
    return len(text) <= _LONGEST_NONE and _WRAPPING.sub("", text).lower() in _NONE_FORMS


def _placed_mentions(content: str, values: Sequence[Found]) -> list[_Mention]:
    """The boxes in the values within a text. The text before a list is its label."""
    mentions: list[_Mention] = []
    place, label, corner = 0, None, None
    for start, end, value in values:
        before, place = content[place:start], end
        if isinstance(value, list):
            label = _label_before(before) or label
        if _is_pair(value):
            if corner is None or not _joins_corners(before):
                corner = value
                continue
            value = [*corner, *value]
        corner = None
        mentions += _boxes_in(value, label if isinstance(value, list) else None)
    return mentions


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_number(one) is not None for one in value)


def _joins_corners(between: str) -> bool:
    words = re.findall(r"[^\W_]+", between[:60].lower())
    return len(between) <= 60 and _BETWEEN_CORNERS.issuperset(words)


def _label_before(text: str) -> str | None:
    """The label that precedes a box: the last line of a text, without markup, bullets and "label:"."""
    for line in reversed(_TAG.sub(" ", text[-1000:]).splitlines()):
        line = _BULLET.sub("", line, count=1).strip(" \t*_`:=-–—,;.>|\"'“”")
        line = _NAMED_LABEL.sub("", line, count=1) if _NAMED_LABEL.match(line) else line
        if line and _plain(line) not in _BOX_KEYS:
            return line.strip(" *_`\"'")
    return None


def _boxes_in(value: object, label: str | None = None, depth: int = 0) -> Iterator[_Mention]:
    """The boxes within a value, with their labels."""
    if depth > _DEEPEST:
        return
    if isinstance(value, dict):
        yield from _boxes_of_object(value, label, depth)
    elif isinstance(value, list):
        numbers = four_numbers(value)
        if numbers is not None:
            yield _Mention(label, _box(numbers))
            return
        words = [one for one in value if isinstance(one, str)]
        if len(words) == 1:  # ["cat", 1, 2, 3, 4] or ["cat", [1, 2, 3, 4]]
            value, label = [one for one in value if one is not words[0]], words[0]
        rows = [value] if len(value) == 4 and four_numbers(value) is not None else value
        for one in rows:
            yield from _boxes_in(one, label, depth + 1)


def _boxes_of_object(value: dict[str, Any], label: str | None, depth: int) -> Iterator[_Mention]:
    if (numbers := _four_as_asked(value.get("bbox_2d"))) is not None and isinstance(value.get("label"), str):
        yield _Mention(value["label"], _box(numbers), True, not isinstance(value, Cut))
        return
    named = {_plain(key): one for key, one in value.items()}
    own = next((named[key] for key in _LABEL_KEYS if isinstance(named.get(key), str | list)), None)
    whole = not isinstance(value, Cut)
    numbers = _named_numbers(named)
    key = next((key for key in _BOX_KEYS if key in named), None)
    if key is not None:
        for found in _boxes_by_key(named[key], own if own is not None else label, depth):
            yield found._replace(by_key=True, whole=whole and found.whole)
    elif numbers is not None:
        yield _Mention(own if isinstance(own, str) else label, _box(numbers), by_key=True, whole=whole)
    else:
        for name, one in value.items():
            yield from _boxes_in(one, own if isinstance(own, str) else name, depth + 1)


def _boxes_by_key(value: object, label: str | list[Any] | None, depth: int) -> Iterator[_Mention]:
    """The boxes of a value of which a key says that it is one, or several; they may have a label each."""
    numbers = four_numbers(value)
    single = label if isinstance(label, str) else label[0] if label and len(label) == 1 else None
    single = single if isinstance(single, str) else None
    if numbers is not None:
        yield _Mention(single, _box(numbers))
    elif value in (None, [], NONE, "none"):
        return
    elif isinstance(value, list) and all(isinstance(one, list | dict) for one in value):
        labels = label if isinstance(label, list) and len(label) == len(value) else [single] * len(value)
        for one, own in zip(value, labels, strict=True):
            yield from _boxes_in(one, own if isinstance(own, str) else None, depth + 1)
    elif isinstance(value, dict):
        yield from _boxes_in(value, single, depth + 1)
    else:
        yield _Mention(single, None)


def _four_as_asked(value: object) -> list[Any] | None:
    """A JSON list of four numbers, unchanged. None for all else, which `_four` reads leniently."""
    exact = type(value) is list and len(value) == 4 and all(type(one) in (int, float) for one in value)
    return value if exact else None  # type: ignore[return-value]


def four_numbers(value: object) -> list[float] | None:
    """The four numbers of a list of them, of two corners, of an object of edges, or of a text; else None."""
    if isinstance(value, dict):
        return _named_numbers({_plain(key): one for key, one in value.items()})
    if isinstance(value, str):
        numbers: list[Any] = _NUMBER.findall(value) if not _NOT_IN_NUMBERS.search(value) else []
    elif isinstance(value, list) and len(value) == 2 and all(isinstance(one, list) and len(one) == 2 for one in value):
        numbers = [*value[0], *value[1]]
    else:
        numbers = value if isinstance(value, list) else []
    read = [_number(one) for one in numbers] if len(numbers) == 4 else []
    found = [one for one in read if one is not None]
    return found if len(found) == 4 else None


def _named_numbers(named: Mapping[str, Any]) -> list[float] | None:
    """The edges of an object with named edges, or with corner, width and height. None: it has neither."""
    if len(named) < 2:
        return None
    for names in _EDGES:
        if all(name in named for name in names):
            return four_numbers([named[name] for name in names])
    for names in _CORNERS:
        if all(name in named for name in names):
            return four_numbers([_pair(named[name]) for name in names])
    for names in _SIDES:
        if all(name in named for name in names):
            sides = four_numbers([named[name] for name in names])
            return None if sides is None else [*sides[:2], sides[0] + sides[2], sides[1] + sides[3]]
    return None


def _pair(value: object) -> object:
    return [value.get("x"), value.get("y")] if isinstance(value, dict) else value


def _number(value: object) -> float | None:
    if isinstance(value, str):
        return float(value) if _NUMBER.fullmatch(value.strip()) else None
    if type(value) not in (int, float):
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except OverflowError:
        return math.inf


def _box(numbers: Sequence[float]) -> Box | None:
    """Four numbers as a box; None if they are none."""
    try:
        x1, y1, x2, y2 = map(float, numbers)
    except OverflowError:
        return None
    return (x1, y1, x2, y2) if is_box((x1, y1, x2, y2)) else None


def _plain(key: object) -> str:
    """A key in small letters and digits alone, so that `x_min`, `xMin` and `x-min` are one."""
    return re.sub(r"[\W_]+", "", key).lower() if isinstance(key, str) else ""


def write_detections(detections: Sequence[Detection]) -> str:
    """Detections in the form that prompts ask for: fenced JSON, or "None".

    Coordinates are whole numbers, but for boxes so small that rounding would cost COCO's highest threshold.
    """
    if not detections:
        return NONE
    rows = [{"bbox_2d": _rounded(box), "label": label} for label, box, *_ in detections]
    return f"```json\n{json.dumps(rows, ensure_ascii=False)}\n```"


def _rounded(box: Box) -> list[float]:
    whole = (round(box[0]), round(box[1]), round(box[2]), round(box[3]))
    return list(whole if is_box(whole) and iou(whole, box) >= 0.95 else (round(value, 2) for value in box))


def write_box(target: Target) -> str:
    """A box in the form that prompts ask for, or "None".

    Coordinates are whole numbers, but for boxes so small that rounding would cost COCO's highest threshold.
    """
    return NONE if target == NONE else f"[{','.join(map(str, _rounded(target)))}]"


def parse_places(content: str, size: int) -> tuple[tuple[float, ...], ...] | None:
    """Reads any number of points or boxes from the content of an answer; "None" is the empty tuple.

    Each place is its own list of numbers, bare, fenced, beside sentences or within JSON. Any other list of numbers
    makes the content unreadable.

    Args:
        content: Any text.
        size: 2 for points, 4 for boxes.

    Returns:
        The places in the coordinates that the text uses; None if there are none, or more than 20,000 characters.
    """
    if len(content) > _LONGEST_LOOSE or denies_a_place(content):
        return None
    value = _json(content)
    values = [value] if isinstance(value, list | dict) else [found.value for found in find_values(content)]
    found = tuple(_number_lists(values))
    if not found:
        return () if _says_none(content) else None
    fits = is_point if size == 2 else is_box
    return found if all(map(fits, found)) else None


def _number_lists(value: object, depth: int = 0) -> Iterator[tuple[float, ...]]:
    """The lists of numbers within a value."""
    if depth > _DEEPEST:
        return
    parts = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    numbers = [_number(one) for one in parts if type(one) in (int, float)]
    if isinstance(value, list) and numbers and len(numbers) == len(parts):
        yield tuple(one for one in numbers if one is not None)
        return
    for part in parts:
        yield from _number_lists(part, depth + 1)


def parse_point(content: str) -> Point | Literal["None"] | None:
    """Reads one point `[x, y]`, or "None", from the content of an answer.

    Args:
        content: Any text.

    Returns:
        The point in the coordinates that the text uses, `"None"`, or None if there is no single point.
    """
    found = parse_places(content, 2)
    if not found:
        return None if found is None else NONE
    return (found[0][0], found[0][1]) if len(found) == 1 else None


def write_point(place: Sequence[float] | Literal["None"]) -> str:
    """A point in the form that prompts ask for, rounded to whole numbers; "None" stays "None".

    Args:
        place: A point, or a box, whose centre is written. If a rounded centre would miss the box, it has two decimals.
    """
    if isinstance(place, str):
        return NONE
    if len(place) == 2:
        return f"[{place[0]:.0f},{place[1]:.0f}]"
    x1, y1, x2, y2 = place
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    digits = 0 if x1 <= round(x) <= x2 and y1 <= round(y) <= y2 else 2
    return f"[{x:.{digits}f},{y:.{digits}f}]"
