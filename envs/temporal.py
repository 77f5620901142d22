"""Temporal grounding: when does the video show what is described?"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Final

from vlmenv.core.spaces import Image
from vlmenv.envs.base import OF_WORDS, VisualTaskEnv
from vlmenv.envs.data.clips import TemporalClips
from vlmenv.envs.data.layouts import RowLayout
from vlmenv.envs.data.rows import Row
from vlmenv.envs.data.scenes import Split
from vlmenv.envs.data.source import Sample, Source
from vlmenv.envs.rendering import ANSWERED, TRUE, picture_of, strip_of
from vlmenv.envs.rewards import spans as rewards
from vlmenv.envs.rewards.spans import Span, TrueSpan
from vlmenv.envs.rewards.terms import RewardTerm


def _ask(event: str) -> str:
    return f"When does this happen in the video: {event.strip().rstrip('.')}?"


LAYOUTS: Final = (
    RowLayout(("sentence",), ("timestamp",), _ask),
    RowLayout(("caption",), ("timestamp",), _ask),
    RowLayout(("query",), ("relevant_windows",), _ask),
)
"""Time-R1's rows, lmms-eval's of Charades-STA, and QVHighlights' with one window each."""


class TemporalEnv(VisualTaskEnv):
    """`VLM-Temporal-v0`: the answer is a span of seconds."""

    terms: ClassVar[Mapping[str, RewardTerm]] = {
        "iou": rewards.span_iou_reward,
        "iou@0.5": rewards.span_iou50_reward,
        "timed_iou": rewards.timed_iou_reward,
        "format": rewards.span_format_reward,
    }
    default_rewards: ClassVar[Mapping[str, float]] = {"iou": 1.0, "format": 0.1}
    right: ClassVar[tuple[str, float]] = ("iou/mean", 0.5)
    row_terms: ClassVar[Mapping[str, str]] = {name: name for name in ("iou", "iou@0.5", "timed_iou")}
    prompt_template: ClassVar[str] = "Answer as {answer}, in seconds from the start of the video.\n{question}"
    answer_example: ClassVar[str | None] = '{"start": seconds, "end": seconds}'
    needs_image: ClassVar[bool] = False
    takes_videos: ClassVar[bool] = True
    needs_video: ClassVar[bool] = True
    layouts: ClassVar[tuple[RowLayout, ...]] = LAYOUTS
    unread: ClassVar[Collection[str]] = OF_WORDS

    def builtin_source(self, split: Split) -> Source:
        return TemporalClips(split, self.frame_rule)

    def read_target(self, row: Row) -> Span:
        span = rewards.parse_span(row.answer)
        if span is None or span.end <= span.start:
            raise ValueError(
                f"the answer {row.answer[:80]!r} is no single span of time with a length, as [2.5, 6] in seconds"
            )
        return span

    def target(self, sample: Sample) -> TrueSpan:
        """The true span, with the duration of the question's video."""
        span: Span = sample.target
        return TrueSpan(span.start, span.end, sample.videos[-1].duration)

    def parse(self, text: str) -> Span | None:
        content = self.answer_format.extract(text)
        return None if content is None else rewards.parse_span(content)

    def measure(self, text: str, target: TrueSpan, terms: Mapping[str, float]) -> dict[str, float]:
        answered = self.parse(text)
        iou = rewards.span_iou_reward(text, target, answered)
        return {
            "iou/mean": iou,
            **{f"accuracy@{least}": float(iou >= least) for least in (0.3, 0.5, 0.7)},
            "unparsable": float(answered is None),
            "format": rewards.span_format_reward(text, target, self.answer_format),
        }

    def traits(self, prediction: Span | None, target: TrueSpan) -> dict[str, float]:
        """Answered seconds per true one; empty if unreadable."""
        if prediction is None:
            return {}
        return {"span_ratio": (prediction.end - prediction.start) / (target.end - target.start)}

    def write_answer(self, sample: Sample) -> str:
        return self.answer_format.write(rewards.write_span(sample.target), sample.rationale)

    def stored_answer(self, sample: Sample) -> str:
        return json.dumps(list(sample.target))

    def draw(self, sample: Sample, prediction: Any) -> Image:
        """Frames above a line of time, with the true span in blue and the answered one in orange."""
        spans = [(*sample.target, TRUE), *([(*prediction, ANSWERED)] if prediction else [])]
        *others, asked = sample.videos
        return picture_of((*sample.images, *map(strip_of, others), strip_of(asked, spans)))
