"""Optical character recognition: the text that the image shows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import ClassVar

from vlmenv.envs.base import OF_WORDS, VisualTaskEnv
from vlmenv.envs.data.layouts import RowLayout
from vlmenv.envs.data.rows import Row
from vlmenv.envs.data.scenes import Split
from vlmenv.envs.data.source import Sample, Source
from vlmenv.envs.data.transcripts import QUESTIONS, Transcripts
from vlmenv.envs.rewards import transcripts as rewards
from vlmenv.envs.rewards.tables import check_table, require_tables, teds_reward
from vlmenv.envs.rewards.terms import RewardTerm
from vlmenv.envs.rewards.text import format_reward


class OCREnv(VisualTaskEnv):
    """`VLM-OCR-v0`: the answer is a text, of which white space does not count."""

    terms: ClassVar[Mapping[str, RewardTerm]] = {
        "similarity": rewards.similarity_reward,
        "cer": rewards.cer_reward,
        "wer": rewards.wer_reward,
        "exact": rewards.exact_text_reward,
        "teds": teds_reward,
        "format": format_reward,
    }
    default_rewards: ClassVar[Mapping[str, float]] = {"similarity": 1.0, "format": 0.1}
    row_terms: ClassVar[Mapping[str, str]] = {
        **{name: name for name in ("similarity", "cer", "wer", "exact", "teds")},
        "edit": "similarity",
    }
    ratios: ClassVar[Mapping[str, tuple[str, str]]] = {
        "CER": ("characters/edits", "characters/true"),
        "WER": ("words/edits", "words/true"),
    }
    prompt_template: ClassVar[str] = "Answer as {answer}\n{question}"
    answer_example: ClassVar[str | None] = "text"
    layouts: ClassVar[tuple[RowLayout, ...]] = (RowLayout(("text",), ("text",), lambda text: QUESTIONS[0]),)
    unread: ClassVar[Collection[str]] = OF_WORDS

    def builtin_source(self, split: Split) -> Source:
        return Transcripts(split)

    def read_target(self, row: Row) -> str:
        answer = _only_text(row)
        text = rewards.plain_text(rewards.unwrapped(answer[: rewards.LONGEST + 1]))
        if not text or len(answer) > rewards.LONGEST:
            raise ValueError(f"the answer has no text, or more than {rewards.LONGEST:,} characters")
        if "teds" in (row.method, *self.rewards):
            require_tables()
            check_table(text)
        return text

    def parse(self, text: str) -> str | None:
        return rewards.read_transcript(text, self.answer_format)

    def measure(self, text: str, target: str, terms: Mapping[str, float]) -> dict[str, float]:
        """Metrics of one answer. Without a readable one all of the truth is missing."""
        answered = self.parse(text)
        words = None if answered is None else answered.split()
        tables = {"teds/mean": terms["teds"]} if "teds" in self.rewards and "teds" in terms else {}
        return tables | {
            "similarity/mean": rewards.similarity_reward(text, target, answered),
            "accuracy": rewards.exact_text_reward(text, target, answered),
            "characters/edits": float(rewards.edits(answered, target)),
            "characters/true": float(len(target)),
            "words/edits": float(rewards.edits(words, target.split())),
            "words/true": float(len(target.split())),
            "unparsable": float(answered is None),
            "format": format_reward(text, target, self.answer_format),
        }

    def traits(self, prediction: str | None, target: str) -> dict[str, float]:
        """Answered characters per true one."""
        return {"character_ratio": len(prediction or "") / len(target)}

    def write_answer(self, sample: Sample) -> str:
        return self.answer_format.write(sample.target, sample.rationale)


def _only_text(row: Row) -> str:
    """The answer of a row, which may be a list of one text, however often.

    Raises:
        ValueError: It is a list of other texts, or an object.
    """
    if not row.nested:
        return row.answer
    texts = {rewards.plain_text(str(text)): str(text) for text in row.accepted}
    if len(texts) != 1:
        raise ValueError(
            f"the answer {row.answer[:80]} is no single text. Questions with several right answers are for "
            "VLM-VQA-v0 with --rewards anls 1; give JSON that is to be read from the image as a text"
        )
    return texts.popitem()[1]
