"""Rewards for answers that are the text of an image: edit distances of characters and words."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Hashable, Sequence
from typing import Final

from vlmenv.core.formats import AnswerFormat
from vlmenv.envs.rewards.answers import edit_distance

LONGEST: Final = 20_000
"""Characters of a text that are compared. A longer answer scores 0, and a longer truth is refused."""
_PIECE: Final = 1_000
_FENCED = re.compile(r"\s*```[a-z]{0,9}[^\S\n]*\n(.*)\n[^\S\n]*```\s*", re.DOTALL)
_BOXED = re.compile(r"\s*\\boxed\s*\{(?:\s*\\text\s*\{([^{}]*)\}\s*|(.*))\}\s*", re.DOTALL)


def plain_text(text: str) -> str:
    """A text in Unicode's composed form (NFC), with single spaces in the place of any white space."""
    # In pieces: normalisation takes time that grows with the square of a run of combining marks.
    pieces = (text[start : start + _PIECE] for start in range(0, len(text), _PIECE))
    return " ".join("".join(unicodedata.normalize("NFC", piece) for piece in pieces).split())


def unwrapped(text: str) -> str:
    r"""A text without the one Markdown fence, or the one `\boxed`, around all of it."""
    wrapped = _FENCED.fullmatch(text) if text.count("```") == 2 else None
    if wrapped is None and text.count("\\boxed") == 1:
        wrapped = _BOXED.fullmatch(text)
    return text if wrapped is None else wrapped[wrapped.lastindex or 0]


def read_transcript(text: str, answer_format: AnswerFormat) -> str | None:
    """The text in a completion's answer; None if there is none, or more than 20,000 characters."""
    content = answer_format.extract(text)
    return None if content is None or len(content) > LONGEST else plain_text(unwrapped(content))


def edits(answered: Sequence[Hashable] | None, true: Sequence[Hashable]) -> int:
    """Least number of insertions, deletions and replacements; without an answer, all of the truth is missing."""
    return len(true) if answered is None else edit_distance(answered, true)


def similarity_reward(text: str, target: str, prediction: str | None) -> float:
    """1 - edits / characters of the longer text (the normalised edit distance), in [0, 1].

    Args:
        text: A completion.
        target: The true text, as `plain_text` gives it.
        prediction: The answered text; None if unreadable, which scores 0.
    """
    if prediction is None:
        return 0.0
    longest = max(len(prediction), len(target))
    return 1 - edits(prediction, target) / longest if longest else 1.0


def cer_reward(text: str, target: str, prediction: str | None) -> float:
    """1 - edits / true characters (the character error rate), at least 0."""
    return 0.0 if prediction is None else max(0.0, 1 - edits(prediction, target) / len(target))


def wer_reward(text: str, target: str, prediction: str | None) -> float:
    """1 - edits of words / true words (the word error rate), at least 0."""
    if prediction is None:
        return 0.0
    words = target.split()
    return max(0.0, 1 - edits(prediction.split(), words) / len(words))


def exact_text_reward(text: str, target: str, prediction: str | None) -> float:
    """1 for the true text, but for white space, else 0."""
    return float(prediction == target)
