"""Rewards for answers that are points: which of them hit a true region each, matched one to one."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from vlmenv.core.answers import NONE
from vlmenv.core.coordinates import Point, is_point
from vlmenv.core.formats import AnswerFormat
from vlmenv.core.points import LONGEST, parse_marked_points
from vlmenv.envs.regions import Regions, holds
from vlmenv.envs.rewards.matching import best_pairs

MOST: Final = 1_000
"""Points of an answer that are matched; later ones miss."""
_MOLMO = re.compile(r"(?:\s*<points?\s[^<>]*>[^<>]*</points?>)+\s*")
_FENCED = re.compile(r"```(?:json)?\s(.*)```", re.DOTALL)


class Pointing(NamedTuple):
    """The truth of a pointing task."""

    regions: Regions
    """what is to be pointed at, each once"""
    reach: Point
    """half axes of the ellipse around a true point within which it is hit"""


def count_hits(points: Sequence[Point], target: Pointing) -> int:
    """The greatest number of points that can be paired with a region that they hit, none used twice."""
    given = np.array(points[:MOST], dtype=np.float64).reshape(-1, 2)
    if not len(given) or not target.regions:
        return 0
    hits = np.stack([holds(region, given, target.reach) for region in target.regions], axis=1)
    return int(sum(hits[pair] for pair in best_pairs(hits.astype(np.float64))))


def point_f1_reward(text: str, target: Pointing, prediction: Sequence[Point] | None) -> float:
    """2 · hits / (points + regions), in [0, 1]; 1 for "None" where there is nothing to point at.

    Args:
        text: A completion.
        target: The true regions in the coordinates that the prompt asks for.
        prediction: The answered points; None if unreadable, which scores 0.
    """
    if prediction is None:
        return 0.0
    whole = len(prediction) + len(target.regions)
    return 2 * count_hits(prediction, target) / whole if whole else 1.0


def all_points_reward(text: str, target: Pointing, prediction: Sequence[Point] | None) -> float:
    """1 if every region is hit by a point of its own and every point hits, else 0."""
    return float(point_f1_reward(text, target, prediction) == 1)


def point_count_reward(text: str, target: Pointing, prediction: Sequence[Point] | None) -> float:
    """1 if there are as many points as regions, wherever they are, else 0."""
    return float(prediction is not None and len(prediction) == len(target.regions))


def point_format_reward(text: str, target: Any, answer_format: AnswerFormat = AnswerFormat.TAGS) -> float:
    """1 for a text in the answer format and nothing else, whose answer is exactly points or "None"; else 0.

    Points are a JSON list of `[x, y]` or of objects with `point_2d`, or marks as Molmo writes them.
    """
    return float(answer_format.is_followed(text) and is_exact_points(answer_format.extract(text) or ""))


def is_exact_points(content: str) -> bool:
    """Whether the content of an answer is points in one of the forms, and nothing else, or "None"."""
    content = content.strip()
    if len(content) > LONGEST:
        return False
    if content == NONE or _MOLMO.fullmatch(content):
        return content == NONE or parse_marked_points(content) is not None
    fenced = _FENCED.fullmatch(content)
    try:
        value = json.loads(fenced[1] if fenced else content)
    except (ValueError, RecursionError):
        return False
    rows = [value] if _is_pair(value) or isinstance(value, dict) else value
    return isinstance(rows, list) and bool(rows) and all(map(_is_exact_point, rows))


def _is_exact_point(row: object) -> bool:
    return _is_pair(row.get("point_2d") if isinstance(row, dict) else row)


def _is_pair(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 2 or not all(type(one) in (int, float) for one in value):
        return False
    try:
        return is_point((float(value[0]), float(value[1])))
    except OverflowError:
        return False
