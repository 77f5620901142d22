"""Rewards for questions about charts and documents: relaxed accuracy, ANLS, and lists."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Final

import numpy as np

from vlmenv.core.answers import Answer
from vlmenv.core.formats import AnswerFormat
from vlmenv.core.literals import Cut, find_values
from vlmenv.envs.rewards.answers import accuracy_reward, edit_ratio, is_number, normalise, parse_number, says_words
from vlmenv.envs.rewards.evidence import conclusions
from vlmenv.envs.rewards.matching import best_pairs

TOLERANCE: Final = 0.05
"""Greatest relative error of a number (ChartQA, arXiv 2203.10244)."""
LEAST_SIMILARITY: Final = 0.5
"""Similarity up to which a text earns nothing (DocVQA, arXiv 2007.00398)."""
MOST_ITEMS: Final = 500
"""Items of a list that are read."""

_COMMAS = re.compile(r"\s*(?:\n|[，、]|,(?!\d{3}(?!\d))|\band\b)\s*")
_FENCED = re.compile(r"```[a-z]{0,9}\s(.*)```", re.DOTALL)
_BULLET = re.compile(r"\s*(?:[-*•]|\d{1,3}[.)])\s+(?=\S)")
_LONGEST = 10_000


def relaxed_reward(text: str, target: Answer, answer_format: AnswerFormat = AnswerFormat.TAGS) -> float:
    """1 for a number within 5 % of a true one, or for the same words, else 0. Choices and yes or no must be equal.

    ChartQA's relaxed accuracy (arXiv 2203.10244), with numbers read from their sentences. A percent sign is read like a
    unit.

    Args:
        text: A completion.
        target: The truth, with the others that are right too.
        answer_format: The form that separates the answer from the reasoning.
    """
    if target.kind in ("choice", "yes_no"):
        return accuracy_reward(text, target, answer_format)
    content = answer_format.extract(text)
    return 0.0 if content is None else float(any(same_relaxed(content, true) for true in accepted(target)))


def same_relaxed(content: str, true: str) -> bool:
    """Whether a text is a number within 5 % of a true one, or the true words but for case and punctuation around."""
    if len(content) > _LONGEST:
        return False
    wanted = parse_number(true) if is_number(true) else None
    answered = None if wanted is None else parse_number(content)
    if wanted is not None and answered is not None:
        return abs(answered - wanted) <= TOLERANCE * abs(wanted) + 1e-12 * abs(wanted)
    return normalise(content) == normalise(true) or (wanted is None and says_words(content, true))


def anls_reward(text: str, target: Answer, answer_format: AnswerFormat = AnswerFormat.TAGS) -> float:
    """Similarity to the nearest true text, in [0, 1]; 0 for one of 0.5 or less.

    DocVQA's average normalised Levenshtein similarity (arXiv 2007.00398), without case and extra white space.
    """
    content = answer_format.extract(text)
    if content is None:
        return 0.0
    similarity = max(edit_ratio(_folded(content), _folded(true)) for true in accepted(target))
    return similarity if similarity > LEAST_SIMILARITY else 0.0


def list_reward(text: str, target: Answer, answer_format: AnswerFormat = AnswerFormat.TAGS) -> float:
    """F1 of the items of a list, in any order, each as in `relaxed_reward`; matched one to one.

    Items are those of a JSON list; or they are divided by semicolons or, without any, by commas, lines and "and". They
    may stand in brackets, in a fence, in a box, as lines of a list, or after "the answer is".
    """
    content = answer_format.extract(text)
    given = [] if content is None else items(content)
    wanted = items(target.text)
    if not given or not wanted:
        return 0.0
    same = np.array([[same_relaxed(one, true) for true in wanted] for one in given], dtype=np.float64)
    hits = sum(same[pair] for pair in best_pairs(same))
    return float(2 * hits / (len(given) + len(wanted)))


def items(content: str) -> list[str]:
    """The items of a list, up to 500; empty for a text of more than 10,000 characters."""
    if len(content) > _LONGEST:
        return []
    content = content.strip()
    if fenced := _FENCED.fullmatch(content):
        content = fenced[1].strip()
    content = next((said for said, _ in conclusions(content)), content)
    found = _json_items(content)
    if found is None:
        parts = content.split(";") if ";" in content else _COMMAS.split(_unlisted(content))
        found = [part.strip() for part in parts]
    return [one for one in found if one][:MOST_ITEMS]


def _unlisted(content: str) -> str:
    """A text without the bullets or numbers of its lines, if all of several lines have them, or its brackets."""
    lines = [line for line in content.splitlines() if line.strip()]
    if len(lines) > 1 and all(map(_BULLET.match, lines)):
        return "\n".join(_BULLET.sub("", line, count=1) for line in lines)
    bracketed = re.fullmatch(r"\(([^()]*)\)|\[([^\[\]]*)\]", content)
    return content if bracketed is None else (bracketed[1] or bracketed[2] or "")


def _json_items(content: str) -> Sequence[str] | None:
    """The items of a list with quotes of any kind, also as the only value of an object."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = _literal(content)
    if isinstance(value, dict) and len(value) == 1:
        (value,) = value.values()
    fits = isinstance(value, list) and all(type(one) in (str, int, float) for one in value)
    return [str(one) for one in value] if fits else None


def _literal(content: str) -> object:
    """The list or object that a text with quotes is."""
    values = list(find_values(content)) if content[:1] in ("[", "{") and re.search("[\"']", content) else []
    fits = len(values) == 1 and values[0].end == len(content) and not isinstance(values[0].value, Cut)
    return values[0].value if fits else None


def accepted(target: Answer) -> list[str]:
    """All texts that are right."""
    return [target.text, *(other.text for other in target.others)]


def _folded(text: str) -> str:
    return " ".join(text[: _LONGEST + 1].casefold().split())
