"""Open-vocabulary detection: find every object of the named categories, some of which may be absent."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from vlmenv.core.answers import Detection
from vlmenv.envs.base import OF_WORDS, Intervals, VisualTaskEnv
from vlmenv.envs.data.rows import Row
from vlmenv.envs.data.scenes import DetectionScenes, Split
from vlmenv.envs.data.source import Source
from vlmenv.envs.geometry import DETECTIONS, Geometry
from vlmenv.envs.metrics.detection import coco_metrics, nms_ap, paired_statistics, suppress
from vlmenv.envs.rewards import detection as rewards
from vlmenv.envs.rewards.terms import RewardTerm

Detections = tuple[Detection, ...]


class OVDEnv(VisualTaskEnv):
    """`VLM-OVD-v0`: the answer is a fenced JSON list of labelled boxes, or "None" if there are none."""

    terms: ClassVar[Mapping[str, RewardTerm]] = rewards.TERMS
    default_rewards: ClassVar[Mapping[str, float]] = {"od_length": 1.0, "format": 0.1}
    right: ClassVar[tuple[str, float]] = ("image_ap50/mean", 0.5)
    row_terms: ClassVar[Mapping[str, str]] = rewards.NAMES_IN_ROWS
    ratios: ClassVar[Mapping[str, tuple[str, str]]] = {
        "precision@0.5": ("boxes/matched", "boxes/answered"),
        "recall@0.5": ("boxes/matched", "boxes/true"),
        "boxes/ratio": ("boxes/answered", "boxes/true"),
    }
    prompt_template: ClassVar[str] = "Answer as {answer} in {coordinates}, or {none}.\n{question}"
    geometry: ClassVar[Geometry | None] = DETECTIONS
    takes_coco: ClassVar[bool] = True
    unread: ClassVar[Collection[str]] = OF_WORDS

    def builtin_source(self, split: Split) -> Source:
        return DetectionScenes(split)

    def read_target(self, row: Row) -> Detections:
        target: Detections = row.detections if row.detections is not None else super().read_target(row)
        return target

    def measure(self, text: str, target: Detections, terms: Mapping[str, float]) -> dict[str, float]:
        answered = self.parse(text)
        return {
            "image_ap/mean": rewards.map_reward(text, target, self.answer_format),
            "image_ap50/mean": rewards.map50_reward(text, target, self.answer_format),
            **rewards.count_boxes(answered or (), target),
            "unparsable": float(answered is None),
            "format": rewards.detection_format_reward(text, target, self.answer_format),
        }

    def traits(self, prediction: Detections | None, target: Detections) -> dict[str, float]:
        """Counted answered boxes per true box; empty if there is no true box."""
        given, wanted = rewards.countable(prediction or (), target)
        return {"box_ratio": len(given) / len(wanted)} if wanted else {}

    def summarise(self, predictions: Sequence[Any], targets: Sequence[Any], clusters: Sequence[int]) -> Intervals:
        answered = [prediction or () for prediction in predictions]
        nms = {"NMS-AP": nms_ap(answered, targets, clusters=clusters)}
        return coco_metrics(answered, targets, clusters=clusters) | nms

    def compare(
        self, before: Sequence[Any], after: Sequence[Any], targets: Sequence[Any], clusters: Sequence[int]
    ) -> Intervals:
        first, last = ([prediction or () for prediction in predictions] for predictions in (before, after))
        kept = [[suppress(row) for row in rows] for rows in (first, last)]
        nms = paired_statistics(kept[0], kept[1], targets, clusters=clusters)["AP"]
        return paired_statistics(first, last, targets, clusters=clusters) | {"NMS-AP": nms}
