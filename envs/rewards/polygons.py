"""Rewards for answers that are outlines, for tasks that ask for more than a box."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, Final

from vlmenv.core.coordinates import MAX_COORDINATE
from vlmenv.core.formats import AnswerFormat

Polygon = tuple[tuple[float, float], ...]
"""Corners (x, y) of an outline, in order, the first not repeated; at least three."""

MAX_CORNERS: Final = 500
_LONGEST = 20_000  # characters


def parse_polygon(content: str) -> Polygon | None:
    """Reads one outline from the content of an answer: a JSON list of [x, y] pairs, fenced or not.

    Args:
        content: Any text.

    Returns:
        The corners, or None where there is no list of 3 to 500 finite pairs, or it encloses nothing or crosses
        itself.
    """
    if len(content) > _LONGEST:
        return None
    content = content.strip().removeprefix("```json").removeprefix("```").removesuffix("```")
    try:
        return as_polygon(json.loads(content))
    except (ValueError, RecursionError):
        return None


def as_polygon(found: Any) -> Polygon | None:
    """A list of [x, y] pairs as an outline; None where `parse_polygon` gives None."""
    try:
        corners = tuple((float(x), float(y)) for x, y in found) if _is_list_of_pairs(found) else ()
    except OverflowError:
        return None
    corners = corners[:-1] if len(corners) > 1 and corners[0] == corners[-1] else corners
    plausible = all(math.isfinite(value) and abs(value) <= MAX_COORDINATE for corner in corners for value in corner)
    if not 3 <= len(corners) <= MAX_CORNERS or not plausible:
        return None
    shape = _outline(corners)
    return corners if shape.is_valid and shape.area > 0 else None


def polygon_iou(a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]]) -> float:
    """Intersection over union of the areas within two outlines, in [0, 1], by shapely.

    Of outlines that cross themselves, as data sets may have them, what they go around is taken.
    """
    import shapely

    one, other = shapely.make_valid(_outline(a)), shapely.make_valid(_outline(b))
    union = one.union(other).area
    return float(min(1.0, one.intersection(other).area / union)) if union > 0 else 0.0


def polygon_iou_reward(
    text: str, target: Sequence[tuple[float, float]], answer_format: AnswerFormat = AnswerFormat.TAGS
) -> float:
    """Overlap of the answered outline with the true one, in [0, 1]; 0 where the answer is none.

    Args:
        text: A completion.
        target: The true outline in the coordinates that the prompt asks for.
        answer_format: How the completion sets its answer apart.
    """
    answered = parse_polygon(answer_format.extract(text) or "")
    return 0.0 if answered is None else polygon_iou(answered, target)


def _is_list_of_pairs(found: Any) -> bool:
    return isinstance(found, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(type(value) in (int, float) for value in pair)
        for pair in found
    )


def _outline(corners: Sequence[tuple[float, float]]) -> Any:
    import shapely  # takes a while to import, and few tasks need it

    return shapely.Polygon(corners)
