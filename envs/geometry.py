"""Places in images: reading and writing them, and conversion between conventions of coordinates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Final

from vlmenv.core.answers import (
    NONE,
    Detection,
    parse_box,
    parse_detections,
    parse_places,
    parse_point,
    write_box,
    write_detections,
    write_point,
)
from vlmenv.core.coordinates import Box
from vlmenv.core.errors import ConfigError


@dataclass(frozen=True)
class Geometry:
    """The kind of place that a task's answers name.

    A task declares it as `geometry = POINT`. The base class uses it to read and write answers. It converts the truth
    from pixels of the stored image to the convention of the prompt.

    Example:
        A polygon as a flat list of corners::

            POLYGON = Geometry(
                example="[x1,y1,x2,y2,x3,y3]",
                kind="one polygon [x1, y1, x2, y2, …]",
                read=read_polygon,  # text -> tuple of numbers, or None
                write=write_polygon,  # tuple of numbers -> text
            )

    Args:
        example: The form of an answer, as the prompt shows it.
        kind: Required content of a row's answer, for messages.
        read: Reads the content of an answer. It returns None for other content, and never raises.
        write: Writes a truth, in the requested convention, as the content of an answer.
        read_truth: Reads the answer of a data set's row. Default: `read`.
    """

    example: str
    kind: str
    read: Callable[[str], Any]
    write: Callable[[Any], str]
    read_truth: Callable[[str], Any] | None = None

    def truth(self, answer: str) -> Any:
        """The truth in the answer of a data set's row.

        Raises:
            ValueError: The answer has no place of this kind.
        """
        found = (self.read_truth or self.read)(answer)
        if found is None:
            raise ValueError(f"the answer {answer[:80]!r} is neither {self.kind} nor None")
        return found


def convert(value: Any, one: Callable[[tuple[float, ...]], tuple[float, ...]]) -> Any:
    """Converts every place in a truth or an answer.

    A tuple or list of numbers is a place, in which x and y alternate. All other tuples, lists and mappings are
    searched. Texts, single numbers and None stay as they are.

    Args:
        value: A place, or a container of places at any depth.
        one: Converts one place.

    Raises:
        ConfigError: A place has an odd number of coordinates, or a type cannot be searched.
    """
    if isinstance(value, (tuple, list)):
        parts = one(tuple(value)) if _is_place(value) else [convert(part, one) for part in value]
        return value._make(parts) if hasattr(value, "_make") else type(value)(parts)
    if isinstance(value, Mapping):
        return {key: convert(part, one) for key, part in value.items()}
    if value is None or isinstance(value, (str, Real)):
        return value
    raise ConfigError(
        f"a truth with places is made of tuples, lists, mappings, numbers and texts, not of {type(value).__name__}: "
        "convert it in read_target() or in the source of samples"
    )


def places(value: Any) -> Iterator[tuple[float, ...]]:
    """Every place in a truth or an answer, as `convert` finds them."""
    if isinstance(value, (tuple, list)) and _is_place(value):
        yield tuple(value)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from places(part)
    elif isinstance(value, Mapping):
        yield from places(list(value.values()))


def labelled_places(value: Any, label: str = "") -> Iterator[tuple[str, tuple[float, ...]]]:
    """Every place in a truth or an answer, with the text that stands beside it, such as a category.

    Args:
        value: A place, or a container of places at any depth, also as JSON holds it.
        label: The label of places without a text of their own.
    """
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, (tuple, list)):
        return
    if _is_place(value):
        yield label, tuple(value)
        return
    own = next((part for part in value if isinstance(part, str)), label)
    for part in value:
        yield from labelled_places(part, own)


def changed_place(place: tuple[float, ...], change: Callable[[Box], Box]) -> tuple[float, ...]:
    """Converts a place by a function for boxes: a box by its edges, any other place corner by corner."""
    if len(place) == 4:
        return change((place[0], place[1], place[2], place[3]))
    corners = zip(place[::2], place[1::2], strict=True)
    return tuple(value for x, y in corners for value in change((x, y, x, y))[:2])


def _is_place(values: Sequence[Any]) -> bool:
    if not values or not all(isinstance(value, Real) and not isinstance(value, bool) for value in values):
        return False
    if len(values) % 2:
        raise ConfigError(f"a place has an x for each y, but there are {len(values)} numbers: {tuple(values)}")
    return True


def _write_list(found: Sequence[Sequence[float]], write: Callable[[Any], str]) -> str:
    return f"[{','.join(map(write, found))}]" if found else NONE


def _write_labelled(found: Sequence[Detection]) -> str:
    return write_detections([one for one in found if not one.crowd])


def _read_target_of_point(answer: str) -> Any:
    point = parse_point(answer)
    return parse_box(answer) if point is None else point


POINT: Final = Geometry(
    "[x,y]",
    "one point [x, y], nor one box [x1, y1, x2, y2] that holds it,",
    parse_point,
    write_point,
    _read_target_of_point,
)
"""One point, or "None" if nothing fits. The truth is a point, or a box to hit; `write` gives its centre."""

POINTS: Final = Geometry(
    "[[x,y],[x,y]]",
    "a list of points [[x, y], …]",
    lambda content: parse_places(content, 2),
    lambda found: _write_list(found, write_point),
)
"""Any number of points; the empty tuple for "None"."""

BOX: Final = Geometry("[x1,y1,x2,y2]", "one box [x1, y1, x2, y2]", parse_box, write_box)
"""One box, or "None" if nothing fits."""

BOXES: Final = Geometry(
    "[[x1,y1,x2,y2],[x1,y1,x2,y2]]",
    "a list of boxes [[x1, y1, x2, y2], …]",
    lambda content: parse_places(content, 4),
    lambda found: _write_list(found, write_box),
)
"""Any number of boxes; the empty tuple for "None"."""

DETECTIONS: Final = Geometry(
    '```json\n[{"bbox_2d": [x1, y1, x2, y2], "label": "category"}]\n```',
    'a list of {"bbox_2d", "label"}',
    parse_detections,
    _write_labelled,
)
"""Any number of boxes with labels, as `Detection`s; the empty tuple for "None". Crowds are not written."""
