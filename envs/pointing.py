"""Pointing: one point in each thing that is asked for."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from vlmenv.core.points import parse_points
from vlmenv.envs.base import OF_WORDS, VisualTaskEnv
from vlmenv.envs.data.layouts import RowLayout, written_out
from vlmenv.envs.data.pointing import PointScenes
from vlmenv.envs.data.rows import Row
from vlmenv.envs.data.scenes import Split
from vlmenv.envs.data.source import Sample, Source
from vlmenv.envs.geometry import POINTS, Geometry
from vlmenv.envs.regions import Regions, as_json, read_regions, write_inner_point
from vlmenv.envs.rewards import points as rewards
from vlmenv.envs.rewards.points import Pointing
from vlmenv.envs.rewards.terms import RewardTerm


def _pairs(points: Any) -> Any:
    """The points of PixMo's rows as lists: `[{"x", "y"}, …]`, or `{"x": […], "y": […]}`, in percent of the image."""
    points = written_out(points)
    listed = list(zip(points["x"], points["y"], strict=True)) if isinstance(points, Mapping) else points
    pairs = [(one["x"], one["y"]) if isinstance(one, Mapping) else one for one in listed]
    return [[x / 100, y / 100] for x, y in pairs] or "None"


PIXMO_POINTS = RowLayout(
    ("label",), ("points",), "Point at all of these: {}.".format, _pairs, lambda points: "fractions"
)
"""The rows of allenai/pixmo-points, with their images downloaded. Their points are in percent."""

REGIONS = Geometry(
    POINTS.example,
    "points, boxes or outlines",
    parse_points,
    lambda target: f"[{','.join(map(write_inner_point, target.regions))}]" if target.regions else "None",
)
"""Any number of points as an answer, and regions to hit as its truth."""


class PointEnv(VisualTaskEnv):
    """`VLM-Point-v0`: the answer is a point in each region, matched one to one, or "None"."""

    terms: ClassVar[Mapping[str, RewardTerm]] = {
        "f1": rewards.point_f1_reward,
        "all": rewards.all_points_reward,
        "count": rewards.point_count_reward,
        "format": rewards.point_format_reward,
    }
    default_rewards: ClassVar[Mapping[str, float]] = {"f1": 1.0, "format": 0.1}
    row_terms: ClassVar[Mapping[str, str]] = {"f1": "f1", "all": "all", "count": "count"}
    ratios: ClassVar[Mapping[str, tuple[str, str]]] = {
        "precision": ("points/hits", "points/answered"),
        "recall": ("points/hits", "points/true"),
    }
    prompt_template: ClassVar[str] = "Answer as {answer} in {coordinates}, or {none}.\n{question}"
    geometry: ClassVar[Geometry | None] = REGIONS
    layouts: ClassVar[tuple[RowLayout, ...]] = (PIXMO_POINTS,)
    unread: ClassVar[Collection[str]] = OF_WORDS
    reach: ClassVar[float] = 0.05
    """Distance within which a true point is hit, as a part of the image's diagonal."""

    def builtin_source(self, split: Split) -> Source:
        return PointScenes(split)

    def read_target(self, row: Row) -> Regions:
        return read_regions(row.answer)

    def target(self, sample: Sample) -> Pointing:
        width, height = sample.asked_sizes[0]
        reach = self.reach * math.hypot(width, height)
        return Pointing(super().target(sample), self.coordinates.from_pixels((reach, reach), width, height))

    def stored_answer(self, sample: Sample) -> str:
        return as_json(sample.target)

    def measure(self, text: str, target: Pointing, terms: Mapping[str, float]) -> dict[str, float]:
        answered = self.parse(text)
        return {
            "f1/mean": rewards.point_f1_reward(text, target, answered),
            "accuracy": rewards.all_points_reward(text, target, answered),
            "count_accuracy": rewards.point_count_reward(text, target, answered),
            "points/hits": float(rewards.count_hits(answered or (), target)),
            "points/answered": float(len(answered or ())),
            "points/true": float(len(target.regions)),
            "unparsable": float(answered is None),
            "format": rewards.point_format_reward(text, target, self.answer_format),
        }

    def traits(self, prediction: Any, target: Pointing) -> dict[str, float]:
        """Answered points per region; empty if there is nothing to point at."""
        return {"point_ratio": len(prediction or ()) / len(target.regions)} if target.regions else {}
