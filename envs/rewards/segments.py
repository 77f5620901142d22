"""Rewards for answers that cover objects: by outlines, or by a box and a point each for a segmenting model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlmenv.core.answers import denies_a_place, four_numbers, parse_places
from vlmenv.core.coordinates import Box, Point, iou, is_box, is_point
from vlmenv.core.formats import TAGS, AnswerFormat
from vlmenv.core.literals import Cut, find_values
from vlmenv.core.points import LONGEST
from vlmenv.envs.regions import Region, Regions, shape_of
from vlmenv.envs.rewards.matching import best_pairs
from vlmenv.envs.rewards.polygons import MAX_CORNERS, as_polygon

MOST: Final = 120
"""Objects of an answer that are read, as in VisionReasoner (arXiv 2505.12081)."""
LEAST_IOU, MOST_L1, MOST_APART = 0.5, 10.0, 30.0
"""VisionReasoner's thresholds: of the IoU of boxes, the mean distance of edges and the distance of points, in images of
840 x 840."""
_SIDE: Final = 840
_LONGEST_TEXT = 100_000
_OUTLINE_KEYS: Final = (
    *("polygon", "polygons", "segmentation", "polygon_2d", "polygons_2d", "outline", "contour", "vertices", "mask"),
    "points",
)
_BOX_KEYS: Final = ("bbox_2d", "bbox", "box_2d", "box", "bounding_box", "position")
_ASKED: Final = ("polygon", "polygons", "bbox_2d")
_SENTENCE_END = re.compile(rf"\.(?!\d)|{'|'.join(TAGS)}")  # and no decimal point
_FENCED = re.compile(r"```(?:json)?\s(.*)```", re.DOTALL)


class Segment(NamedTuple):
    """One object, answered or true."""

    region: Region
    """its outlines or box"""
    point: Point | tuple[()] = ()
    """a point in it, if it has one"""


class Objects(NamedTuple):
    """The truth of a segmentation task."""

    objects: tuple[Segment, ...]
    """empty if there is none"""
    pixel: Point
    """width and height of a pixel of the stored image"""
    extent: Point
    """width and height of the image"""


def parse_segments(content: str) -> tuple[Segment, ...] | None:
    """Reads outlines, or boxes with points, from the content of an answer; "None" is the empty tuple.

    An object is `{"polygon": [[x, y], …]}`, `{"polygons": […]}` of which an odd number counts, or
    `{"bbox_2d": […], "point_2d": […]}`. A list of pairs alone is an outline, as are six and more numbers in a row.
    Objects may be in one list, or stand one after the other.

    Args:
        content: Any text.

    Returns:
        Up to 120 objects in the coordinates that the text uses. None: one of them is none, or they have more than 500
        corners in all.
    """
    if len(content) > LONGEST or denies_a_place(content):
        return None
    values = [found.value for found in find_values(content)]
    rows = _rows(values)
    if not rows or all(map(_is_nothing, rows)):
        return () if rows or parse_places(content, 4) == () else None
    segments = [_segment(one) for one in rows[:MOST]]
    found = tuple(one for one in segments if one is not None)
    corners = sum(len(outline) for one in found for outline in _outlines(one.region)) / 2
    return found if found and len(found) == len(segments) and corners <= MAX_CORNERS else None


def _rows(values: list[Any]) -> list[Any]:
    """The objects of an answer: in one list, one after the other, or in an object that holds nothing else."""
    if len(values) > 1 and _is_place(values):  # corners without brackets around them
        return [values]
    rows: list[Any] = []
    for value in values:
        while isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):  # of \boxed{[…]}
            (value,) = value
        while isinstance(value, dict) and not isinstance(value, Cut) and len(value) == 1:
            ((key, inner),) = value.items()
            if key in (*_OUTLINE_KEYS, *_BOX_KEYS) or not isinstance(inner, list):
                break
            value = inner
        alone = not isinstance(value, list) or _is_place(value)
        rows += [value] if alone else value
        if isinstance(value, list) and not value and len(values) == 1:
            rows.append({_BOX_KEYS[0]: None})
    return rows


def _is_place(value: list[Any]) -> bool:
    """Whether a list is one outline, or one box."""
    return _flat(value) is not None or is_box(_box(value))


def _box(value: Any) -> tuple[float, ...]:
    return tuple(four_numbers(value) or ())


def _is_nothing(row: Any) -> bool:
    """Whether an object says that there is none, as `{"bbox_2d": null}`."""
    if row is None:
        return True
    named = [row[key] for key in (*_OUTLINE_KEYS, *_BOX_KEYS) if key in row] if isinstance(row, dict) else []
    return bool(named) and all(one in (None, []) for one in named)


def _segment(value: Any) -> Segment | None:
    if isinstance(value, Cut):
        return None
    if isinstance(value, dict):
        value = {key.lower(): one for key, one in value.items()}
    else:
        outline = _flat(value) or _box(value)
        return Segment(outline) if len(outline) >= 6 or is_box(outline) else None
    box = _box(next((value[key] for key in _BOX_KEYS if key in value), None))
    keys = _OUTLINE_KEYS[:-1] if is_box(box) else _OUTLINE_KEYS  # "points" beside a box are no outline
    if (outlines := next((value[key] for key in keys if value.get(key)), None)) is not None:
        alone = _flat(outlines)
        parts = outlines if isinstance(outlines, list) else []
        whole = (alone,) if alone is not None else tuple(one for part in parts if (one := _flat(part)) is not None)
        if not whole or (alone is None and len(whole) < len(parts)):
            return None
        return Segment(whole[0] if len(whole) == 1 else whole, _point(value))
    return Segment(box, _point(value)) if is_box(box) else None


def _point(value: dict[str, Any]) -> Point | tuple[()]:
    point = _numbers(value.get("point_2d", value.get("point")))
    return (point[0], point[1]) if is_point(point) else ()


def _numbers(value: Any) -> tuple[float, ...]:
    return tuple(value) if isinstance(value, list) and all(type(one) is float for one in value) else ()


def _flat(value: Any) -> tuple[float, ...] | None:
    """The corners of an outline: pairs, objects of x and y, or numbers in a row."""
    if len(_numbers(value)) >= 6 and len(value) % 2 == 0:
        value = [list(pair) for pair in zip(value[::2], value[1::2], strict=True)]
    elif isinstance(value, list) and value and all(isinstance(one, dict) and one.keys() == {"x", "y"} for one in value):
        value = [[one["x"], one["y"]] for one in value]
    polygon = as_polygon(value)
    return None if polygon is None else tuple(number for corner in polygon for number in corner)


def _outlines(region: Region) -> Regions:
    return region if isinstance(region[0], tuple) else (region,)


def areas(answered: Sequence[Segment] | None, target: Objects) -> tuple[float, float]:
    """The intersection and the union of all answered and all true objects, in squared pixels of the stored image."""
    import shapely

    given = shapely.union_all([shape_of(one.region) for one in answered or ()])
    true = shapely.union_all([shape_of(one.region) for one in target.objects])
    whole = target.pixel[0] * target.pixel[1]
    return given.intersection(true).area / whole, given.union(true).area / whole


def mask_iou_reward(text: str, target: Objects, prediction: Sequence[Segment] | None) -> float:
    """IoU of all answered and all true objects together, in [0, 1]; 1 for "None" where there is no object.

    Args:
        text: A completion.
        target: The true objects in the coordinates that the prompt asks for.
        prediction: The answered objects; None if unreadable, which scores 0.
    """
    if prediction is None or not prediction or not target.objects:
        return float(prediction is not None and not prediction and not target.objects)
    intersection, union = areas(prediction, target)
    return min(1.0, intersection / union) if union > 0 else 0.0


def matched_iou_reward(text: str, target: Objects, prediction: Sequence[Segment] | None) -> float:
    """Sum of the IoUs of objects matched one to one, by the greater number of objects, in [0, 1]."""
    if prediction is None or not prediction or not target.objects:
        return float(prediction is not None and not prediction and not target.objects)
    given, true = ([shape_of(one.region) for one in objects] for objects in (prediction, target.objects))
    overlaps = np.array([[_overlap(one, other) for other in true] for one in given])
    return float(sum(overlaps[pair] for pair in best_pairs(overlaps))) / max(len(given), len(true))


def _overlap(a: Any, b: Any) -> float:
    inside = a.intersection(b).area
    union = a.area + b.area - inside
    return float(inside / union) if union > 0 else 0.0


def boxes_points_reward(text: str, target: Objects, prediction: Sequence[Segment] | None) -> float:
    """VisionReasoner's accuracy (arXiv 2505.12081), in [0, 1]: a third for each of three conditions of a pair.

    The boxes have an IoU above 0.5; their edges are less than 10 apart on average; the points are less than 30 apart,
    and the answered one is in its box. Pairs are those with the greatest sum, which is divided by the greater number
    of objects. Distances are of an image scaled to 840 x 840. An outline counts by the box around it. A true object
    without a point has the centre of its box.
    """
    if prediction is None or not prediction or not target.objects:
        return float(prediction is not None and not prediction and not target.objects)
    scale = np.array([_SIDE / target.extent[0], _SIDE / target.extent[1]] * 2)
    met = np.array([[_met(one, other, scale) for other in target.objects] for one in prediction], dtype=np.float64)
    return float(sum(met[pair] for pair in best_pairs(met))) / (3 * max(len(prediction), len(target.objects)))


def _bounds(region: Region) -> Box:
    corners = np.array([number for outline in _outlines(region) for number in outline]).reshape(-1, 2)
    (x1, y1), (x2, y2) = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
    return (x1, y1, x2, y2)


def _met(answered: Segment, true: Segment, scale: NDArray[np.float64]) -> int:
    """The number of conditions that an answered and a true object meet."""
    box, other = _bounds(answered.region), _bounds(true.region)
    apart, edges = math.inf, float(np.abs((np.array(box) - other) * scale).mean())
    if answered.point and box[0] <= answered.point[0] <= box[2] and box[1] <= answered.point[1] <= box[3]:
        wanted = true.point or ((other[0] + other[2]) / 2, (other[1] + other[3]) / 2)
        apart = math.hypot(*((np.array(answered.point) - wanted) * scale[:2]).tolist())
    return int(iou(box, other) > LEAST_IOU) + int(edges < MOST_L1) + int(apart < MOST_APART)


def non_repeat_reward(text: str, target: Any) -> float:
    """0 for a completion with two or more repeated sentences, else 1 (VisionReasoner, arXiv 2505.12081).

    Sentences end at full stops, and at the tags of the answer format.
    """
    sentences = [one.strip() for one in _SENTENCE_END.split(text[:_LONGEST_TEXT]) if one.strip()]
    return float(len(sentences) - len(set(sentences)) < 2)


def segment_format_reward(text: str, target: Any, answer_format: AnswerFormat = AnswerFormat.TAGS) -> float:
    """1 for a text in the answer format and nothing else, whose answer is a JSON list of objects or "None"; else 0."""
    content = (answer_format.extract(text) or "").strip()
    return float(answer_format.is_followed(text) and (content == "None" or _is_exact(content)))


def _is_exact(content: str) -> bool:
    fenced = _FENCED.fullmatch(content)
    try:
        value = json.loads(fenced[1] if fenced else content) if len(content) <= LONGEST else None
    except (ValueError, RecursionError):
        return False
    exact = isinstance(value, list) and all(
        isinstance(one, dict) and not one.keys().isdisjoint(_ASKED) for one in value
    )
    return exact and bool(parse_segments(content))
