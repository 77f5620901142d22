"""Open-vocabulary detection: find every object of the named categories, some of which may be absent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vlmenv.core.answers import Detection, parse_detections, write_answer, write_detections
from vlmenv.core.spaces import Image
from vlmenv.envs.base import RewardTerm, VisualTaskEnv
from vlmenv.envs.data.scenes import DetectionScenes, Split
from vlmenv.envs.data.source import Sample, Source
from vlmenv.envs.rendering import ANSWERED, TRUE, draw_boxes
from vlmenv.envs.rewards import detection as rewards

Detections = tuple[Detection, ...]


class OVDEnv(VisualTaskEnv):
    """`VLM-OVD-v0`: the answer is a fenced JSON list of labelled boxes, or "None" where there are none."""

    terms: ClassVar[Mapping[str, RewardTerm]] = {
        "od_length": rewards.od_length_reward,
        "map": rewards.map_reward,
        "map50": rewards.map50_reward,
        "weighted_sum": rewards.weighted_sum_reward,
        "repetition": rewards.repetition_reward,
        "format": rewards.detection_format_reward,
    }
    default_rewards: ClassVar[Mapping[str, float]] = {"od_length": 1.0, "format": 0.1}
    prompt_template: ClassVar[str] = (
        "Answer as <think>reasoning</think><answer>```json\n"
        '[{"bbox_2d": [x1, y1, x2, y2], "label": "category"}]\n'
        "```</answer> in {coordinates}, or <answer>None</answer>.\n{question}"
    )

    def builtin_source(self, split: Split) -> Source:
        return DetectionScenes(split)

    def read_target(self, answer: str) -> Detections:
        target = parse_detections(answer)
        if target is None:
            raise ValueError(f'the answer {answer[:80]!r} is neither a list of {{"bbox_2d", "label"}} nor None')
        return target

    def parse(self, text: str) -> Detections | None:
        return rewards.parse_detected_answer(text)

    def target(self, sample: Sample) -> Detections:
        height, width = sample.images[0].shape[:2]
        return tuple((label, self.coordinates.from_pixels(box, width, height)) for label, box in sample.target)

    def measure(self, text: str, target: Detections) -> dict[str, float]:
        answered = self.parse(text)
        pairs = rewards.match_greedily(answered or (), target)
        nothing = float(answered == ())
        return {
            "image_ap/mean": rewards.map_reward(text, target),
            "image_ap50/mean": rewards.map50_reward(text, target),
            "precision@0.5": pairs / len(answered) if answered else nothing,
            "recall@0.5": pairs / len(target) if target else nothing,
            "boxes/answered": float(len(answered or ())),
            "boxes/true": float(len(target)),
            "unparsable": float(answered is None),
            "format": rewards.detection_format_reward(text, target),
        }

    def write_answer(self, sample: Sample) -> str:
        return write_answer(write_detections(self.target(sample)), sample.rationale)

    def draw(self, sample: Sample, prediction: Detections | None) -> Image:
        height, width = sample.images[0].shape[:2]
        boxes = [(box, TRUE) for _, box in sample.target]
        boxes += [(self.coordinates.to_pixels(box, width, height), ANSWERED) for _, box in prediction or ()]
        return draw_boxes(sample.images[0], boxes)
