"""Perception captioning: describe everything in the image that matters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import ClassVar

from vlmenv.core.answers import Caption
from vlmenv.core.formats import AnswerFormat
from vlmenv.envs.base import VisualTaskEnv
from vlmenv.envs.data.captions import CaptionScenes
from vlmenv.envs.data.rows import Row
from vlmenv.envs.data.scenes import Split
from vlmenv.envs.data.source import Sample, Source
from vlmenv.envs.rewards.answers import accuracy_reward, read_answers
from vlmenv.envs.rewards.clip import ClipScore
from vlmenv.envs.rewards.terms import RewardTerm
from vlmenv.envs.rewards.text import count_words, format_reward, keywords_reward, length_reward
from vlmenv.envs.vqa import accepted_texts


def answer_reward(text: str, target: Caption, answer_format: AnswerFormat = AnswerFormat.TAGS) -> float:
    """1 for a right answer to the row's question, less for a partly right one; 0 without a question."""
    return 0.0 if target.answer is None else accuracy_reward(text, target.answer, answer_format)


def described_keywords_reward(text: str, target: Caption, answer_format: AnswerFormat = AnswerFormat.TAGS) -> float:
    """`keywords_reward` of a completion's description alone; key words in its reasoning and answer do not count."""
    return keywords_reward(answer_format.description(text), target)


def described_length_reward(
    text: str,
    target: Caption,
    count_tokens: Callable[[str], int] = count_words,
    answer_format: AnswerFormat = AnswerFormat.TAGS,
) -> float:
    """`length_reward`, or 0 for a completion that does not describe the image."""
    return length_reward(text, target, count_tokens) if answer_format.description(text) else 0.0


class CaptionEnv(VisualTaskEnv):
    """`VLM-Caption-v0`: the completion describes the image, then answers (PeBR-R1, arXiv 2509.13031, stage 1)."""

    terms: ClassVar[Mapping[str, RewardTerm]] = {
        "clip": ClipScore(),
        "keywords": described_keywords_reward,
        "format": format_reward,
        "length": described_length_reward,
        "accuracy": answer_reward,
    }
    default_rewards: ClassVar[Mapping[str, float]] = {"clip": 0.4, "keywords": 0.4, "format": 0.1, "length": 0.1}
    best: ClassVar[Mapping[str, float | None]] = {"clip": None}
    prompt_template: ClassVar[str] = "Answer as {answer}\n{question}"
    default_format: ClassVar[AnswerFormat] = AnswerFormat.SECTIONS
    needs_answer: ClassVar[bool] = False
    unread: ClassVar[Collection[str]] = ("tolerance", "pages")

    def builtin_source(self, split: Split) -> Source:
        return CaptionScenes(split)

    def read_target(self, row: Row) -> Caption:
        if not row.keywords:
            raise ValueError("the row has no key words: none in 'key_word' or 'keywords'")
        answer = read_answers(accepted_texts(row), choices=row.choices) if row.answer else None
        return Caption(row.keywords, answer)

    def ignored_parts(self, row: Row, target: Caption) -> Collection[str]:
        return () if target.answer is not None else ("choices",)

    def measure(self, text: str, target: Caption, terms: Mapping[str, float]) -> dict[str, float]:
        clip = {"clip": terms["clip"]} if "clip" in terms else {}
        return clip | {
            "keyword_recall": described_keywords_reward(text, target, self.answer_format),
            "accuracy": answer_reward(text, target, self.answer_format),
            "unparsable": float(not self.answer_format.description(text)),
            "format": format_reward(text, target, self.answer_format),
        }

    def write_answer(self, sample: Sample) -> str:
        answer = "None" if sample.target.answer is None else sample.target.answer.text
        return self.answer_format.write(answer, sample.rationale or ", ".join(sample.target.keywords))
