"""Rewards for the shape of a response: its length, its format, the words it uses."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable
from typing import Any, Final

from vlmenv.core.answers import Caption
from vlmenv.core.formats import AnswerFormat

FREE_TOKENS: Final = 512
"""Number of tokens without a penalty."""
LONGEST_TEXT: Final = 300_000
"""Number of characters of a response that are read."""

_PIECE: Final = 1000
_TOKEN = re.compile(r"\w+|[^\w\s]")


def count_words(text: str) -> int:
    """Number of words and punctuation marks in a text, which replace tokens if there is no tokenizer.

    A word counts once for every eight characters begun. Only the first 300,000 characters count.
    """
    return sum(1 + (match.end() - match.start() - 1) // 8 for match in _TOKEN.finditer(text, 0, LONGEST_TEXT))


def length_reward(text: str, target: Any, count_tokens: Callable[[str], int] = count_words) -> float:
    """1 up to 512 tokens, then 512 / tokens, in (0, 1] (PeBR-R1, arXiv 2509.13031)."""
    return FREE_TOKENS / max(FREE_TOKENS, count_tokens(text))


def cosine_length(correct: float, tokens: int, max_tokens: int) -> float:
    """Favours short answers: right ones fall from 1 to 0.5 and wrong ones from 0 to -0.5, along half a cosine.

    After arXiv 2502.03373; the reward is constant beyond `max_tokens`.

    Args:
        correct: Correctness of the answer, in [0, 1].
        tokens: Length of the response.
        max_tokens: Length at which the cosine ends; at least 1.
    """
    share = min(max(tokens / max_tokens, 0.0), 1.0)
    return correct - (1 - math.cos(math.pi * share)) / 4


def format_reward(text: str, target: Any, answer_format: AnswerFormat = AnswerFormat.TAGS) -> float:
    """1 for a response in the requested format and nothing else; else 0."""
    return float(answer_format.is_followed(text))


def keywords_reward(text: str, target: Caption) -> float:
    """Share of the keywords in the first 300,000 characters, in [0, 1]; 0 if there are none (PeBR-R1).

    Whole words, whatever their case: "cat" is not in "concatenate", nor in "cats". In scripts without
    spaces between words, such as Chinese and Thai, anything may stand beside a keyword.
    """
    keywords = {folded for keyword in target.keywords if (folded := _folded(keyword))}
    words = _folded(text)
    return sum(_occurs(keyword, words) for keyword in keywords) / len(keywords) if keywords else 0.0


def _folded(text: str) -> str:
    # In pieces: normalisation takes time that grows with the square of a run of combining marks.
    pieces = (text[start : start + _PIECE] for start in range(0, min(len(text), LONGEST_TEXT), _PIECE))
    return " ".join(
        "".join(unicodedata.normalize("NFKC", piece) for piece in pieces).casefold().translate(_APOSTROPHES).split()
    )


_APOSTROPHES: Final = str.maketrans("‘’", "''")


def _occurs(keyword: str, text: str) -> bool:
    """Whether a keyword is found with no letter or digit that might belong to its word on either side."""
    place = text.find(keyword)
    while place >= 0:
        end = place + len(keyword)
        before, after = text[max(place - 1, 0) : place], text[end : end + 1]
        if not _is_one_word(before, keyword[0]) and not _is_one_word(keyword[-1], after):
            return True
        place = text.find(keyword, place + 1)
    return False


_SCRIPTS_WITHOUT_SPACES = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\ua4cf\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]"
)  # Thai and Lao, Burmese, Khmer, Chinese and Japanese; Korean, which adds particles to its words


def _is_one_word(left: str, right: str) -> bool:
    return left.isalnum() and right.isalnum() and not _SCRIPTS_WITHOUT_SPACES.search(left + right)
