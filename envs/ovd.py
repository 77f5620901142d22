"""Open-vocabulary detection: find every object of the named categories, some of which may be absent."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

from vlmenv.core.answers import Detection, parse_detections, write_detections
from vlmenv.core.coordinates import Box
from vlmenv.core.spaces import Image
from vlmenv.envs.base import Intervals, VisualTaskEnv
from vlmenv.envs.data.rows import Row
from vlmenv.envs.data.scenes import DetectionScenes, Split
from vlmenv.envs.data.source import Sample, Source
from vlmenv.envs.metrics.detection import coco_metrics, nms_ap
from vlmenv.envs.rendering import ANSWERED, TRUE, draw_boxes
from vlmenv.envs.rewards import detection as rewards
from vlmenv.envs.rewards.terms import RewardTerm

Detections = tuple[Detection, ...]


class OVDEnv(VisualTaskEnv):
    """`VLM-OVD-v0`: the answer is a fenced JSON list of labelled boxes, or "None" where there are none."""

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
    answer_example: ClassVar[str] = '```json\n[{"bbox_2d": [x1, y1, x2, y2], "label": "category"}]\n```'
    takes_coco: ClassVar[bool] = True
    unread: ClassVar[Collection[str]] = ("keywords", "choices", "tolerance")

    def builtin_source(self, split: Split) -> Source:
        return DetectionScenes(split)

    def read_target(self, row: Row) -> Detections:
        target = row.detections if row.detections is not None else parse_detections(row.answer)
        if target is None:
            raise ValueError(f'the answer {row.answer[:80]!r} is neither a list of {{"bbox_2d", "label"}} nor None')
        return target

    def map_boxes(self, target: Detections, change: Callable[[Box], Box]) -> Detections:
        return tuple(one._replace(box=change(one.box)) for one in target)

    def parse(self, text: str) -> Detections | None:
        return rewards.parse_detected_answer(text, self.answer_format)

    def target(self, sample: Sample) -> Detections:
        height, width = sample.asked_images[0].shape[:2]
        return tuple(
            Detection(one.label, self.coordinates.from_pixels(one.box, width, height), one.crowd, one.area)
            for one in sample.target
        )

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
        """Boxes answered per true one, as far as they count; nothing where there are none to be found."""
        given, wanted = rewards.countable(prediction or (), target)
        return {"box_ratio": len(given) / len(wanted)} if wanted else {}

    def summarise(self, predictions: Sequence[Any], targets: Sequence[Any], clusters: Sequence[int]) -> Intervals:
        answered = [prediction or () for prediction in predictions]
        nms = {"NMS-AP": nms_ap(answered, targets, clusters=clusters)}
        return coco_metrics(answered, targets, clusters=clusters) | nms

    def write_answer(self, sample: Sample) -> str:
        answer = write_detections([one for one in self.target(sample) if not one.crowd])
        return self.answer_format.write(answer, sample.rationale)

    def draw(self, sample: Sample, prediction: Detections | None) -> Image:
        height, width = sample.asked_images[0].shape[:2]
        boxes = [(one.box, TRUE) for one in sample.target]
        boxes += [(self.coordinates.to_pixels(one.box, width, height), ANSWERED) for one in prediction or ()]
        return draw_boxes(sample.asked_images[0], boxes)
