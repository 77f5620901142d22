"""Regions of an image, as truths to point at and to cover: points, boxes, outlines, and masks as their outlines.

A region is a tuple of numbers in which x and y alternate: a point (2), a box (4), or the corners of an outline (6 and
more). A tuple of outlines is what an odd number of them goes around, so that holes are outlines too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import reduce
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vlmenv.core.answers import NONE, write_point
from vlmenv.core.coordinates import MAX_COORDINATE, Point, is_box, is_point

Region = tuple[Any, ...]
Regions = tuple[Region, ...]

_COARSEST: Final = 64.0
"""Tolerance of simplification, in coordinates, beyond which a region is written as the box around it."""
_BOX_KEYS: Final = ("bbox_2d", "bbox", "box")
_POINT_KEYS: Final = ("point_2d", "point")
_OUTLINE_KEYS: Final = ("segmentation", "polygon", "polygons", "mask")


def read_regions(answer: str) -> Regions:
    """The regions in the answer of a data set's row, written as JSON; "None" and the empty list are none.

    A region is `[x, y]`, `[x1, y1, x2, y2]`, or a longer list of corners. It may be an object. Then the first of these
    counts: COCO's `segmentation` of polygons or RLE, `outlines` of which an odd number counts, VisionReasoner's
    `bbox_2d` and `point_2d`. Last come `x` and `y` without sides.

    Raises:
        ValueError: The answer holds something else.
    """
    if answer.strip() == NONE:
        return ()
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        raise ValueError(f"the answer {answer[:80]!r} is neither JSON nor None") from None
    if value == []:
        return ()
    alone = isinstance(value, Mapping) or (isinstance(value, list) and bool(value) and _is_number(value[0]))
    return tuple(_region(one) for one in ([value] if alone else _list(value)))


def _region(value: Any) -> Region:
    if not isinstance(value, Mapping):
        return _checked(_list(value))
    if "outlines" in value:
        return tuple(_checked(outline) for outline in _list(value["outlines"]))
    for keys, read in ((_OUTLINE_KEYS, _outlines), (_BOX_KEYS, _checked), (_POINT_KEYS, _checked)):
        if (key := next((key for key in keys if value.get(key)), None)) is not None:
            return read(value[key])
    if "counts" in value and "size" in value:
        return _outlines(value)
    if {"x", "y"} <= {*value} and {"width", "height", "w", "h"}.isdisjoint(value):
        return _checked([value["x"], value["y"]])
    if (empty := next((key for key in (*_OUTLINE_KEYS, *_BOX_KEYS, *_POINT_KEYS) if key in value), None)) is not None:
        raise ValueError(f"{str(dict(value))[:80]} is no region: its {empty} is empty")
    named = ", ".join((*_OUTLINE_KEYS, *_BOX_KEYS, *_POINT_KEYS))
    raise ValueError(f"{str(dict(value))[:80]} is no region: it has none of {named}")


def _outlines(value: Any) -> Region:
    """Polygons of COCO's form, of which the region has every one, or a mask in RLE."""
    if isinstance(value, Mapping):
        return outlines_of_mask(decode_mask(value))
    parts = _list(value)
    if _is_number(parts[0]):
        if len(parts) < 6:
            raise ValueError(f"{str(parts)[:80]} is no outline, which has three corners or more")
        return _checked(parts)
    if isinstance(parts[0], list) and len(parts[0]) == 2:  # corners as pairs
        return _outlines([number for corner in parts for number in _list(corner)])
    found = tuple(_outlines(part) for part in parts)
    return found[0] if len(found) == 1 else _united(found)


def _checked(values: Any) -> Region:
    listed = _list(values)
    fits = all(_is_number(one) and abs(one) <= MAX_COORDINATE for one in listed)  # which NaN is not
    numbers = tuple(map(float, listed)) if fits else ()
    if fits and (is_point(numbers) or is_box(numbers) or (len(numbers) >= 6 and len(numbers) % 2 == 0)):
        return numbers
    raise ValueError(f"{str(values)[:80]} is neither [x, y], nor [x1, y1, x2, y2], nor corners [x1, y1, x2, y2, x3, …]")


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{str(value)[:80]} is no list of numbers")
    return value


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def decode_mask(rle: Mapping[str, Any]) -> NDArray[np.bool_]:
    """A mask [H, W] from COCO's run lengths, `{"size": [H, W], "counts": …}`, compressed or not.

    Raises:
        ValueError: It is no such mask.
    """
    from pycocotools import mask as coco

    try:
        height, width = (int(side) for side in rle["size"])
        counts = rle["counts"]
        if not 0 < height * width <= MAX_COORDINATE**2 or not isinstance(counts, (str, list)):
            raise ValueError("its size or its counts are none")
        if isinstance(counts, str):
            return np.asarray(coco.decode({"size": [height, width], "counts": counts.encode()}), dtype=np.bool_)
        if sum(counts) != height * width or min(counts) < 0:
            raise ValueError("its counts do not add up to its size")
        return np.asarray(coco.decode(coco.frPyObjects(dict(rle), height, width)), dtype=np.bool_)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"a mask is not in COCO's run lengths: {error}") from None


def outlines_of_mask(mask: NDArray[np.bool_]) -> Region:
    """The outlines of a mask's pixels, exactly.

    Args:
        mask: [H, W]. Pixel (row, column) covers the square from (column, row) to (column + 1, row + 1).

    Raises:
        ValueError: The mask is empty.
    """
    import shapely

    padded = np.pad(mask, ((0, 0), (1, 1))).astype(np.int8)
    changes = np.diff(padded, axis=1)
    rows, starts = np.nonzero(changes == 1)
    _, ends = np.nonzero(changes == -1)
    if not len(rows):
        raise ValueError("a mask is empty")
    return _as_region(shapely.union_all(shapely.box(starts, rows, ends, rows + 1)).simplify(0))


def _united(regions: Regions) -> Region:
    import shapely

    return _as_region(shapely.union_all([shape_of(region) for region in regions]))


def _as_region(shape: Any) -> Region:
    parts = [part for part in getattr(shape, "geoms", [shape]) if part.geom_type == "Polygon"]
    rings = [ring for part in parts for ring in (part.exterior, *part.interiors)]
    outlines = tuple(tuple(float(value) for corner in ring.coords[:-1] for value in corner) for ring in rings)
    return outlines[0] if len(outlines) == 1 else outlines


def shape_of(region: Region) -> Any:
    """A region as a shape of shapely: a point, or an area."""
    import shapely

    if not _is_number(region[0]):
        return reduce(lambda one, other: one.symmetric_difference(other), map(shape_of, region))
    if len(region) == 2:
        return shapely.Point(region)
    if len(region) == 4:
        return shapely.box(*region)
    return shapely.make_valid(shapely.Polygon(np.array(region).reshape(-1, 2)))


def holds(region: Region, points: NDArray[np.float64], reach: Point) -> NDArray[np.bool_]:
    """Which of some points hit a region.

    Args:
        region: A point is hit within `reach`, any other region within its border, which belongs to it.
        points: [N, 2].
        reach: The half axes of the ellipse around a true point.
    """
    import shapely

    if _is_number(region[0]) and len(region) == 2:
        hits = (((points - region) / reach) ** 2).sum(axis=1) <= 1
    elif _is_number(region[0]) and len(region) == 4:
        hits = ((points >= region[:2]) & (points <= region[2:])).all(axis=1)
    else:
        hits = shapely.intersects_xy(shape_of(region), points[:, 0], points[:, 1])
    return np.asarray(hits, dtype=np.bool_)


def write_inner_point(region: Region) -> str:
    """A point of a region as `[x,y]`, in whole numbers where they hit it."""
    if _is_number(region[0]) and len(region) in (2, 4):
        return write_point(region)
    shape = shape_of(region)
    inner = shape.representative_point()
    for x, y in ((round(inner.x), round(inner.y)), (round(inner.x, 2), round(inner.y, 2))):
        if shape.intersects(type(inner)(x, y)):
            return f"[{x:g},{y:g}]"
    return f"[{inner.x},{inner.y}]"


def as_json(regions: Regions) -> str:
    """Regions as `read_regions` reads them from a data set."""
    return json.dumps([as_object(region) for region in regions]) if regions else NONE


def as_object(region: Region) -> Any:
    """A region as JSON holds it."""
    if _is_number(region[0]):
        return list(region)
    return {"outlines": [list(outline) for outline in region]}


def simple_outlines(region: Region, corners: int) -> Regions:
    """A region's outlines on a grid of tenths, simplified with a growing tolerance until they have few enough corners.

    Of a region of very many parts the largest are taken.

    Args:
        region: A box or outlines, which may cross themselves; then what they go around is taken.
        corners: Most corners of all outlines together.
    """
    import shapely

    shape = shape_of(region)
    parts = sorted(getattr(shape, "geoms", [shape]), key=lambda part: -part.area)
    shape, tolerance = shapely.union_all(parts[: max(1, corners // 8)]), 0.25
    outlines = _rings(shapely.set_precision(shape, 0.1))
    while sum(map(len, outlines)) > 2 * corners and tolerance < _COARSEST:
        outlines, tolerance = _rings(shapely.set_precision(shape.simplify(tolerance), 0.1)), 2 * tolerance
    fits = outlines and sum(map(len, outlines)) <= 2 * corners
    return outlines if fits else (as_corners(shape.bounds),)


def _rings(shape: Any) -> Regions:
    found: Regions = () if shape.is_empty else _as_region(shape)
    return (found,) if found and _is_number(found[0]) else found


def as_corners(box: Region) -> Region:
    """A box as an outline."""
    x1, y1, x2, y2 = box
    return (x1, y1, x2, y1, x2, y2, x1, y2)
