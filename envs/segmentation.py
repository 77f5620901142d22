"""Segmentation: the outline, or the box with a point, of each thing that is asked for."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from vlmenv.envs.base import OF_WORDS, VisualTaskEnv
from vlmenv.envs.data.rows import Row
from vlmenv.envs.data.scenes import Split
from vlmenv.envs.data.segments import SegmentScenes
from vlmenv.envs.data.source import Sample, Source
from vlmenv.envs.geometry import Geometry
from vlmenv.envs.regions import as_object, read_regions, shape_of, simple_outlines
from vlmenv.envs.rewards import segments as rewards
from vlmenv.envs.rewards.segments import Objects, Segment
from vlmenv.envs.rewards.terms import RewardTerm

CORNERS = 450
"""Most corners that `write_answer` writes."""


def _written(one: Segment, corners: int) -> dict[str, Any]:
    """An object as an answer holds it: a box and a point, or outlines with so many corners at most."""
    region = one.region
    if len(region) == 4 and not isinstance(region[0], tuple):
        centre = ((region[0] + region[2]) / 2, (region[1] + region[3]) / 2)
        return {"bbox_2d": _short(region), "point_2d": _short(one.point or centre)}
    outlines = [_pairs(outline) for outline in simple_outlines(region, corners)]
    written: dict[str, Any] = {"polygon": outlines[0]} if len(outlines) == 1 else {"polygons": outlines}
    return written | ({"point_2d": _short(one.point)} if one.point else {})


def _short(numbers: Sequence[float]) -> list[float]:
    """Numbers with at most one decimal."""
    rounded = (round(number, 1) for number in numbers)
    return [int(number) if number == int(number) else number for number in rounded]


def _pairs(outline: Sequence[float]) -> list[list[float]]:
    return [_short(corner) for corner in zip(outline[::2], outline[1::2], strict=True)]


def _write(target: Objects) -> str:
    corners = max(4, CORNERS // max(1, len(target.objects)))
    return json.dumps([_written(one, corners) for one in target.objects]) if target.objects else "None"


def _true_points(answer: str) -> list[Any]:
    """The points of the objects in a row's answer, empty where they have none beside their region."""
    value = json.loads(answer) if answer.strip() != "None" else []
    rows = [value] if isinstance(value, dict) else value
    points: list[Any] = [row.get("point_2d") if isinstance(row, dict) else None for row in rows]
    return [(float(point[0]), float(point[1])) if _is_pair(point) else () for point in points]


def _is_pair(point: Any) -> bool:
    return isinstance(point, list) and len(point) == 2 and all(type(number) in (int, float) for number in point)


def _stored(one: Segment) -> Any:
    """An object as a data set's row holds it."""
    region = as_object(one.region)
    if not one.point:
        return region
    named = region if isinstance(region, dict) else {"bbox_2d" if len(region) == 4 else "polygon": region}
    return named | {"point_2d": list(one.point)}


SEGMENTS = Geometry('[{"polygon": [[x, y], [x, y], [x, y]]}]', "boxes or outlines", rewards.parse_segments, _write)
"""Any number of objects as an answer, and their regions as its truth."""


class SegmentEnv(VisualTaskEnv):
    """`VLM-Seg-v0`: the answer is an outline, or a box and a point, of each object, or "None"."""

    terms: ClassVar[Mapping[str, RewardTerm]] = {
        "iou": rewards.mask_iou_reward,
        "matched_iou": rewards.matched_iou_reward,
        "boxes_points": rewards.boxes_points_reward,
        "non_repeat": rewards.non_repeat_reward,
        "format": rewards.segment_format_reward,
    }
    default_rewards: ClassVar[Mapping[str, float]] = {"iou": 1.0, "format": 0.1}
    row_terms: ClassVar[Mapping[str, str]] = {name: name for name in ("iou", "matched_iou", "boxes_points")}
    right: ClassVar[tuple[str, float]] = ("iou/mean", 0.5)
    ratios: ClassVar[Mapping[str, tuple[str, str]]] = {"cIoU": ("area/intersection", "area/union")}
    prompt_template: ClassVar[str] = "Answer as {answer} in {coordinates}, or {none}.\n{question}"
    geometry: ClassVar[Geometry | None] = SEGMENTS
    unread: ClassVar[Collection[str]] = OF_WORDS

    def builtin_source(self, split: Split) -> Source:
        return SegmentScenes(split)

    def read_target(self, row: Row) -> tuple[Segment, ...]:
        regions = read_regions(row.answer)
        if any(len(region) == 2 and not isinstance(region[0], tuple) for region in regions):
            raise ValueError(
                f"the answer {row.answer[:80]!r} has a point, which covers nothing; of one outline, write the corners "
                'as {"polygon": [[x, y], …]}'
            )
        if any(not shape_of(region).area for region in regions):
            raise ValueError(f"the answer {row.answer[:80]!r} has an outline that goes around nothing")
        points = _true_points(row.answer) if len(regions) > 1 or "point_2d" in row.answer else [()] * len(regions)
        return tuple(Segment(region, point) for region, point in zip(regions, points, strict=True))

    def target(self, sample: Sample) -> Objects:
        width, height = sample.asked_sizes[0]
        places = [self.coordinates.from_pixels(one, width, height) for one in ((1.0, 1.0), (width, height))]
        return Objects(super().target(sample), places[0], (float(places[1][0]), float(places[1][1])))

    def stored_answer(self, sample: Sample) -> str:
        return json.dumps([_stored(one) for one in sample.target]) if sample.target else "None"

    def measure(self, text: str, target: Objects, terms: Mapping[str, float]) -> dict[str, float]:
        """Metrics of one answer: the mean of `iou/mean` is the literature's gIoU, `cIoU` divides summed areas."""
        answered = self.parse(text)
        overlap = rewards.mask_iou_reward(text, target, answered)
        intersection, union = rewards.areas(answered, target)
        return {
            "iou/mean": overlap,
            "accuracy@0.5": float(overlap >= 0.5),
            "boxes_points/mean": rewards.boxes_points_reward(text, target, answered),
            "area/intersection": intersection,
            "area/union": union,
            "unparsable": float(answered is None),
            "format": rewards.segment_format_reward(text, target, self.answer_format),
        }

    def traits(self, prediction: Any, target: Objects) -> dict[str, float]:
        """Answered objects per true one; empty if there is none."""
        return {"object_ratio": len(prediction or ()) / len(target.objects)} if target.objects else {}
