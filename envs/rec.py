"""Referring expression comprehension: find the one object that an expression means."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import ClassVar

from vlmenv.core.answers import NONE, Target, parse_box, write_box
from vlmenv.core.coordinates import Box
from vlmenv.core.spaces import Image
from vlmenv.envs.base import VisualTaskEnv
from vlmenv.envs.data.rows import Row
from vlmenv.envs.data.scenes import ReferringScenes, Split
from vlmenv.envs.data.source import Sample, Source
from vlmenv.envs.rendering import ANSWERED, TRUE, draw_boxes
from vlmenv.envs.rewards.boxes import box_format_reward, iou50_reward, iou_reward, parse_boxed_answer
from vlmenv.envs.rewards.terms import RewardTerm


class RECEnv(VisualTaskEnv):
    """`VLM-REC-v0`: the answer is a box, or "None" where the image holds no such object."""

    terms: ClassVar[Mapping[str, RewardTerm]] = {
        "iou": iou_reward,
        "iou@0.5": iou50_reward,
        "format": box_format_reward,
    }
    default_rewards: ClassVar[Mapping[str, float]] = {"iou": 1.0, "format": 0.1}
    right: ClassVar[tuple[str, float]] = ("iou/mean", 0.5)
    row_terms: ClassVar[Mapping[str, str]] = {"iou": "iou", "iou@0.5": "iou@0.5"}
    prompt_template: ClassVar[str] = "Answer as {answer} in {coordinates}, or {none}.\n{question}"
    answer_example: ClassVar[str] = "[x1,y1,x2,y2]"
    unread: ClassVar[Collection[str]] = ("keywords", "choices", "tolerance")

    def builtin_source(self, split: Split) -> Source:
        return ReferringScenes(split)

    def read_target(self, row: Row) -> Target:
        target = parse_box(row.answer)
        if target is None:
            raise ValueError(f"the answer {row.answer[:80]!r} is neither one box [x1, y1, x2, y2] nor None")
        return target

    def map_boxes(self, target: Target, change: Callable[[Box], Box]) -> Target:
        return NONE if target == NONE else change(target)

    def parse(self, text: str) -> Target | None:
        return parse_boxed_answer(text, self.answer_format)

    def target(self, sample: Sample) -> Target:
        if sample.target == NONE:
            return NONE
        height, width = sample.asked_images[0].shape[:2]
        return self.coordinates.from_pixels(sample.target, width, height)

    def measure(self, text: str, target: Target, terms: Mapping[str, float]) -> dict[str, float]:
        overlap = iou_reward(text, target, self.answer_format)
        return {
            "iou/mean": overlap,
            "accuracy@0.5": float(overlap >= 0.5),
            "accuracy@0.75": float(overlap >= 0.75),
            "unparsable": float(self.parse(text) is None),
            "format": box_format_reward(text, target, self.answer_format),
        }

    def traits(self, prediction: Target | None, target: Target) -> dict[str, float]:
        """Boxes answered per true one, 0 or 1; nothing where there is none to be found."""
        return {} if target == NONE else {"box_ratio": float(prediction not in (None, NONE))}

    def write_answer(self, sample: Sample) -> str:
        return self.answer_format.write(write_box(self.target(sample)), sample.rationale)

    def draw(self, sample: Sample, prediction: Target | None) -> Image:
        height, width = sample.asked_images[0].shape[:2]
        answered = NONE if prediction is None else prediction
        boxes = [] if sample.target == NONE else [(sample.target, TRUE)]
        boxes += [] if answered == NONE else [(self.coordinates.to_pixels(answered, width, height), ANSWERED)]
        return draw_boxes(sample.asked_images[0], boxes)
