"""Counting: how many things of a kind does the image show?"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import ClassVar

from vlmenv.envs.base import OF_WORDS, VisualTaskEnv
from vlmenv.envs.data.layouts import RowLayout
from vlmenv.envs.data.rows import Row
from vlmenv.envs.data.scenes import CountScenes, Split
from vlmenv.envs.data.source import Source
from vlmenv.envs.rewards.counts import MOST, closeness_reward, count_reward, parse_count
from vlmenv.envs.rewards.terms import RewardTerm
from vlmenv.envs.rewards.text import format_reward

PIXMO_COUNT = RowLayout(("label",), ("count",), "How many {} are there?".format)
"""The rows of allenai/pixmo-count, with their images downloaded."""


class CountEnv(VisualTaskEnv):
    """`VLM-Count-v0`: the answer is a whole number from 0."""

    terms: ClassVar[Mapping[str, RewardTerm]] = {
        "accuracy": count_reward,
        "closeness": closeness_reward,
        "format": format_reward,
    }
    default_rewards: ClassVar[Mapping[str, float]] = {"accuracy": 1.0, "format": 0.1}
    row_terms: ClassVar[Mapping[str, str]] = {"exact": "accuracy", "numeric": "accuracy", "closeness": "closeness"}
    prompt_template: ClassVar[str] = "Answer as {answer}\n{question}"
    answer_example: ClassVar[str | None] = "number"
    layouts: ClassVar[tuple[RowLayout, ...]] = (PIXMO_COUNT,)
    unread: ClassVar[Collection[str]] = OF_WORDS

    def builtin_source(self, split: Split) -> Source:
        return CountScenes(split)

    def read_target(self, row: Row) -> int:
        number = parse_count(row.answer)
        if number is None:
            raise ValueError(f"the answer {row.answer[:80]!r} is no whole number from 0 to {MOST:,}")
        return number

    def parse(self, text: str) -> float | None:
        """A float, because Gymnasium's vector environments cannot hold None beside whole numbers."""
        content = self.answer_format.extract(text)
        count = None if content is None else parse_count(content)
        return None if count is None else float(count)

    def measure(self, text: str, target: int, terms: Mapping[str, float]) -> dict[str, float]:
        """Metrics of one answer. The error of an unreadable one is that of the answer 0, but at least 1."""
        answered = self.parse(text)
        error = max(1, target) if answered is None else abs(answered - target)
        return {
            "accuracy": float(answered == target),
            "accuracy_within_1": float(answered is not None and error <= 1),
            "error/mean": float(error),
            "unparsable": float(answered is None),
            "format": format_reward(text, target, self.answer_format),
        }

    def traits(self, prediction: float | None, target: int) -> dict[str, float]:
        """How much the answered number exceeds the true one; empty if unreadable."""
        return {} if prediction is None else {"excess": float(prediction - target)}
