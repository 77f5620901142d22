"""Referring expression comprehension: find the one object that an expression means."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import ClassVar

from vlmenv.core.answers import NONE, Target
from vlmenv.envs.base import OF_WORDS, VisualTaskEnv
from vlmenv.envs.data.scenes import ReferringScenes, Split
from vlmenv.envs.data.source import Source
from vlmenv.envs.geometry import BOX, Geometry
from vlmenv.envs.rewards.boxes import box_format_reward, dynamic_iou_reward, giou_reward, iou50_reward, iou_reward
from vlmenv.envs.rewards.terms import RewardTerm


class RECEnv(VisualTaskEnv):
    """`VLM-REC-v0`: the answer is a box, or "None" if the image has no such object."""

    terms: ClassVar[Mapping[str, RewardTerm]] = {
        "iou": iou_reward,
        "iou@0.5": iou50_reward,
        "giou": giou_reward,
        "dynamic_iou": dynamic_iou_reward,
        "format": box_format_reward,
    }
    default_rewards: ClassVar[Mapping[str, float]] = {"iou": 1.0, "format": 0.1}
    right: ClassVar[tuple[str, float]] = ("iou/mean", 0.5)
    row_terms: ClassVar[Mapping[str, str]] = {name: name for name in ("iou", "iou@0.5", "giou", "dynamic_iou")}
    prompt_template: ClassVar[str] = "Answer as {answer} in {coordinates}, or {none}.\n{question}"
    geometry: ClassVar[Geometry | None] = BOX
    unread: ClassVar[Collection[str]] = OF_WORDS

    def builtin_source(self, split: Split) -> Source:
        return ReferringScenes(split)

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
        """Answered boxes per true box, 0 or 1; empty if there is no true box."""
        return {} if target == NONE else {"box_ratio": float(prediction not in (None, NONE))}
