"""Rewards for answers that cover objects: by outlines, or by a box and a point each for a segmenting model."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlmenv.core.answers import parse_places
from vlmenv.core.coordinates import Box, Point, iou, is_box, is_point
from vlmenv.core.formats import AnswerFormat
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
_FENCED = re.compile(r"```(?:json)?\s(.*)```", re.DOTALL)


class Segment(NamedTuple):
    """One answered object."""

    region: Region
    """its outline or box"""
    point: Point | tuple[()] = ()
    """a point in it, if the answer has one"""


class Objects(NamedTuple):
    """The truth of a segmentation task."""

    regions: Regions
    """the objects; empty if there is none"""
    pixel: Point
    """width and height of a pixel of the stored image"""
    extent: Point
    """width and height of the image"""


def parse_segments(content: str) -> tuple[Segment, ...] | None:
    """Reads outlines, or boxes with points, from the content of an answer; "None" is the empty tuple.

    An object is `{"polygon": [[x, y], …]}`, `{"polygons": […]}` of which an odd number counts, or
    `{"bbox_2d": […], "point_2d": […]}`. A list of pairs alone is an outline.

    Args:
        content: Any text.

    Returns:
        Up to 120 objects in the coordinates that the text uses. None: one of them is none, or they have more than 500
        corners in all.
    """
    if len(content) > LONGEST:
        return None
    values = [found.value for found in find_values(content)]
    if len(values) != 1 or not values[0]:
        return () if parse_places(content, 4) == () else None
    value = values[0]
    alone = isinstance(value, dict) or as_polygon(value) is not None
    segments = [_segment(one) for one in ([value] if alone else value)[:MOST]]
    found = tuple(one for one in segments if one is not None)
    corners = sum(len(outline) for one in found for outline in _outlines(one.region)) / 2
    return found if found and len(found) == len(segments) and corners <= MAX_CORNERS else None


def _segment(value: Any) -> Segment | None:
    if isinstance(value, Cut):
        return None
    if not isinstance(value, dict):
        outline = _flat(value)
        return None if outline is None else Segment(outline)
    if "polygon" in value or "polygons" in value:
        parts = value["polygons"] if "polygons" in value else [value["polygon"]]
        outlines = [_flat(part) for part in parts] if isinstance(parts, list) else []
        whole = tuple(outline for outline in outlines if outline is not None)
        if not whole or len(whole) < len(outlines):
            return None
        return Segment(whole[0] if len(whole) == 1 else whole, _point(value))
    box = _numbers(value.get("bbox_2d"))
    return Segment(box, _point(value)) if is_box(box) else None


def _point(value: dict[str, Any]) -> Point | tuple[()]:
    point = _numbers(value.get("point_2d"))
    return (point[0], point[1]) if is_point(point) else ()


def _numbers(value: Any) -> tuple[float, ...]:
    return tuple(value) if isinstance(value, list) and all(type(one) is float for one in value) else ()


def _flat(value: Any) -> tuple[float, ...] | None:
    polygon = as_polygon(value)
    return None if polygon is None else tuple(number for corner in polygon for number in corner)


def _outlines(region: Region) -> Regions:
    return region if isinstance(region[0], tuple) else (region,)


def areas(answered: Sequence[Segment] | None, target: Objects) -> tuple[float, float]:
    """The intersection and the union of all answered and all true objects, in squared pixels of the stored image."""
    import shapely

    given = shapely.union_all([shape_of(one.region) for one in answered or ()])
    true = shapely.union_all([shape_of(region) for region in target.regions])
    whole = target.pixel[0] * target.pixel[1]
    return given.intersection(true).area / whole, given.union(true).area / whole


def mask_iou_reward(text: str, target: Objects, prediction: Sequence[Segment] | None) -> float:
    """IoU of all answered and all true objects together, in [0, 1]; 1 for "None" where there is no object.

    Args:
        text: A completion.
        target: The true objects in the coordinates that the prompt asks for.
        prediction: The answered objects; None if unreadable, which scores 0.
    """
    if prediction is None or not prediction or not target.regions:
        return float(prediction is not None and not prediction and not target.regions)
    intersection, union = areas(prediction, target)
    return min(1.0, intersection / union) if union > 0 else 0.0


def matched_iou_reward(text: str, target: Objects, prediction: Sequence[Segment] | None) -> float:
    """Sum of the IoUs of objects matched one to one, by the greater number of objects, in [0, 1]."""
    if prediction is None or not prediction or not target.regions:
        return float(prediction is not None and not prediction and not target.regions)
    given, true = ([shape_of(region) for region in regions] for regions in (_regions(prediction), target.regions))
    overlaps = np.array([[_overlap(one, other) for other in true] for one in given])
    return float(sum(overlaps[pair] for pair in best_pairs(overlaps))) / max(len(given), len(true))


def _regions(segments: Sequence[Segment]) -> Regions:
    return tuple(one.region for one in segments)


def _overlap(a: Any, b: Any) -> float:
    inside = a.intersection(b).area
    union = a.area + b.area - inside
    return float(inside / union) if union > 0 else 0.0


def boxes_points_reward(text: str, target: Objects, prediction: Sequence[Segment] | None) -> float:
    """VisionReasoner's accuracy (arXiv 2505.12081), in [0, 1]: a third for each of three conditions of a pair.

    The boxes have an IoU above 0.5; their edges are less than 10 apart on average; the points are less than 30 apart,
    and the answered one is in its box. Pairs are those with the greatest sum, which is divided by the greater number
    of objects. Distances are of an image scaled to 840 x 840. The true point is the centre of the true box.
    """
    if prediction is None or not prediction or not target.regions:
        return float(prediction is not None and not prediction and not target.regions)
    scale = np.array([_SIDE / target.extent[0], _SIDE / target.extent[1]] * 2)
    given = np.array([_bounds(one.region) for one in prediction])
    true = np.array([_bounds(region) for region in target.regions])
    points = [one.point or None for one in prediction]
    met = _met(given, true, points, scale)
    return float(sum(met[pair] for pair in best_pairs(met))) / (3 * max(len(given), len(true)))


def _bounds(region: Region) -> Box:
    corners = np.array([number for outline in _outlines(region) for number in outline]).reshape(-1, 2)
    (x1, y1), (x2, y2) = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
    return (x1, y1, x2, y2)


def _met(
    given: NDArray[np.float64], true: NDArray[np.float64], points: Sequence[Point | None], scale: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The number of conditions [A, B] that pairs of answered and true boxes meet."""
    met = np.zeros((len(given), len(true)))
    for a, (box, point) in enumerate(zip(given.tolist(), points, strict=True)):
        for b, other in enumerate(true.tolist()):
            centre = ((other[0] + other[2]) / 2, (other[1] + other[3]) / 2)
            near = point is not None and box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]
            apart = np.inf if point is None else np.hypot(*((np.array(point) - centre) * scale[:2]))
            edges = np.abs((np.array(box) - other) * scale).mean()
            overlap = iou((box[0], box[1], box[2], box[3]), (other[0], other[1], other[2], other[3]))
            met[a, b] = (overlap > LEAST_IOU) + (edges < MOST_L1) + (near and apart < MOST_APART)
    return met


def non_repeat_reward(text: str, target: Any) -> float:
    """0 for a completion with two or more repeated sentences, else 1 (VisionReasoner, arXiv 2505.12081)."""
    sentences = [one.strip() for one in text[:_LONGEST_TEXT].split(".") if one.strip()]
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
    exact = isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)
    return exact and parse_segments(content) is not None
