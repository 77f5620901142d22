"""Rewards for questions about charts and documents: relaxed accuracy, ANLS, and lists."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Final

import numpy as np

from vlmenv.core.answers import Answer
from vlmenv.core.formats import AnswerFormat
from vlmenv.core.literals import Cut, find_values
from vlmenv.envs.rewards.answers import (
    Quantity,
    accuracy_reward,
    edit_ratio,
    normalise,
    read_quantity,
    reply_in,
    says_words,
    whole_quantity,
    with_points,
)
from vlmenv.envs.rewards.evidence import conclusions
from vlmenv.envs.rewards.matching import best_pairs
from vlmenv.envs.rewards.numbers import magnitudes_written_out
from vlmenv.envs.rewards.transcripts import unwrapped
from vlmenv.envs.rewards.units import CURRENCIES, Unit

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

    ChartQA's relaxed accuracy (arXiv 2203.10244), with numbers read from their sentences. Other than there, a percent
    sign does not divide by 100, and numbers may have a currency, a magnitude ("5.2B") and marks between thousands.

    Args:
        text: A completion.
        target: The truth, with the others that are right too.
        answer_format: The form that separates the answer from the reasoning.
    """
    if target.kind in ("choice", "yes_no"):
        return accuracy_reward(text, target, answer_format)
    content = reply_in(text, answer_format)
    return 0.0 if content is None else float(any(same_relaxed(content, true) for true in accepted(target)))


def same_relaxed(content: str, true: str) -> bool:
    """Whether a text is a number within 5 % of a true one, or the true words but for case and punctuation around.

    A true number with a unit or a noun is words, which may be written in another unit of its kind: "3 km" as "3000 m".
    A currency or a percent sign of the truth may be left out, but not be another one.
    """
    if len(content) > _LONGEST:
        return False
    if normalise(content) == normalise(true):
        return True
    content = with_points(content, magnitudes_written_out(true)) or ""
    wanted, answered = whole_quantity(magnitudes_written_out(true)), read_quantity(magnitudes_written_out(content))
    if wanted is None:
        return says_words(content, true)
    if not _may_vary(wanted):
        return says_words(content, true) or (answered is not None and _measure(answered) == _measure(wanted))
    if answered is None or not _fits(_unit(answered), _unit(wanted)):
        return False
    return abs(answered.value - wanted.value) <= (TOLERANCE + 1e-12) * abs(wanted.value)


_PERCENT: Final = Unit(Fraction(1), (("%", 1),))


def _unit(quantity: Quantity) -> Unit | None:
    """The unit of a quantity, among them a percent sign."""
    form = quantity.form
    if form is None or form.number is None:
        return None
    return _PERCENT if form.number.is_percent else form.unit


def _may_vary(truth: Quantity) -> bool:
    """Whether a true quantity is a number, perhaps with a percent sign or a currency, and no words."""
    unit = _unit(truth)
    return unit is None or (unit.scale == 1 and unit.powers in _SIGNS)


_SIGNS: Final = _PERCENT.powers, *(((sign, 1),) for sign in CURRENCIES)


def _fits(unit: Unit | None, true: Unit | None) -> bool:
    """Whether an answer's unit does not contradict the true one."""
    if unit is None:
        return True
    return not unit.is_doubtful if true is None else unit == true


def _measure(quantity: Quantity) -> tuple[Fraction, object] | None:
    """The size of a quantity in base units, and these."""
    unit, number = _unit(quantity), quantity.form and quantity.form.number
    return (number.value * unit.scale, unit.powers) if unit and number else None


def anls_reward(text: str, target: Answer, answer_format: AnswerFormat = AnswerFormat.TAGS) -> float:
    r"""Similarity to the nearest true text, in [0, 1]; 0 for one of 0.5 or less.

    DocVQA's average normalised Levenshtein similarity (arXiv 2007.00398), without case and extra white space, and
    without a fence or a `\boxed` around the answer.
    """
    content = answer_format.extract(text)
    if content is None:
        return 0.0
    similarity = max(edit_ratio(_folded(unwrapped(content)), _folded(true)) for true in accepted(target))
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
