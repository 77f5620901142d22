"""Rewards for answers that are a number of things."""

from __future__ import annotations

import re
from typing import Final

from vlmenv.core.literals import find_values
from vlmenv.core.points import has_point_marks, parse_marked_points
from vlmenv.envs.rewards.answers import CALL_KEYS, normalise, parse_number
from vlmenv.envs.rewards.evidence import unframed
from vlmenv.envs.rewards.numbers import magnitudes_written_out
from vlmenv.envs.rewards.statements import total_of_parts

MOST: Final = 99_999
"""Greatest count that is read."""
_WRITTEN: Final = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)
_TENS: Final = "twenty thirty forty fifty sixty seventy eighty ninety"
_WORDS: Final = {word: number for number, word in enumerate(_WRITTEN.split())} | {"no": 0, "none": 0}
_VALUES: Final = {word: 10 * number for number, word in enumerate(_TENS.split(), 2)} | {
    word: number for word, number in _WORDS.items() if word not in ("no", "none")
}
_WORD: Final = rf"\b(?:(?:{'|'.join(_TENS.split())})[- ](?:{'|'.join(_WRITTEN.split()[1:10])})|{'|'.join(_VALUES)})\b"
_IN_WORDS = re.compile(_WORD, re.IGNORECASE)
_BESIDE_DIGITS = re.compile(rf"(?<!\bthe )(?<!\bthese )(?<!\bthose )(?!one\b){_WORD}", re.IGNORECASE)
"""Number words that count beside digits: no pronoun, and none of "5 dogs in the two images"."""
_SINGLE = re.compile(r"\b(?:a|only a|just a) single (?=[a-z])", re.IGNORECASE)
_PERCENT = re.compile(r"\d ?(?:\\?%|per ?cent)", re.IGNORECASE)
_OR = re.compile(rf"\bor {_WORD}|{_WORD} or\b|或", re.IGNORECASE)
_DENIED = re.compile(r"\b(?:no|none|not|nor|neither|cannot)\b|n['’]t\b|[没不]", re.IGNORECASE)
_NOTHING = re.compile(
    r"(?:there (?:is|are) (?:no(?:ne)?|not any)\b|there (?:is|are)n['’]t any\b"
    r"|i (?:cannot|can['’]t|do not|don['’]t) see any\b"
    r"|no (?:[a-z]+ ){0,3}(?:[a-z]{2,}s|people|children|men|women|sheep|fish)\b|[图中里]{0,3}没有)[^.,;:!?，0-9]{0,60}",
    re.IGNORECASE,
)
_HAN_DIGITS: Final = dict(zip("零一二两三四五六七八九", (0, 1, 2, 2, *range(3, 10)), strict=True))
_IN_HAN = re.compile(
    r"(?<![一二两三四五六七八九十百千万第])(?:(?P<tens>[二三四五六七八九]?)十(?P<ones>[一二三四五六七八九]?)|(?P<one>[零一二两三四五六七八九]))"
    r"(?=[个個只隻条條辆輛张張头頭匹位名人本支朵棵块塊颗顆把件架艘座栋棟间間台杯瓶]|[\s.,!。，]|$)"
)
"""Chinese number words to 99 before a measure word or at an end."""
_LONGEST_IN_WORDS: Final = 200


def parse_count(content: str) -> int | None:
    """The count in an answer: a whole number, a number word below 100, or as many as there are marked points.

    In a JSON object it stands under a key such as "count" or "answer", or is the only number. Lists of numbers are
    none.

    Args:
        content: Any text. Points are in Molmo's form, `<points x1="…" y1="…" …>`.

    Returns:
        A number from 0 to 99,999; None if there is no single one.
    """
    if has_point_marks(content):
        points = parse_marked_points(content)
        return None if points is None else len(points)
    objects = _without_objects(unframed(content))
    if objects is None:
        return None
    if _PERCENT.search(objects):
        return None
    content = magnitudes_written_out(objects)
    word = _WORDS.get(normalise(content)) if len(content) < 100 else None
    number = _number(content) if word is None else word
    return int(number) if number is not None and number == int(number) and 0 <= number <= MOST else None


_KEYS: Final = (
    "count", "answer", "number", "total", "result", "value", "numberofobjects", "totalcount", "finalanswer",
    "答案", "数量",
)  # fmt: skip
"""Keys of an object of which the value is the count, in small letters alone."""


def _without_objects(content: str) -> str | None:
    """A text with the counts in the places of JSON objects; None if a list or an object in it is no count."""
    parts, end = [], 0
    for found in find_values(content):
        value = found.value
        while isinstance(value, list) and len(value) == 1:  # [{"count": 3}], \boxed{\text{3}}
            value = value[0]
        written = content[found.start : found.end]
        value = next((value[key] for key in CALL_KEYS if isinstance(value, dict) and key in value), value)
        if isinstance(value, float | str) or _is_remark(value, written) or not _HAS_NUMBER.search(written):
            continue
        named = [one for key, one in value.items() if _letters(key) in _KEYS] if isinstance(value, dict) else []
        named = named or _only_number(value)
        if not named or any(one != named[0] or not isinstance(one, float | str) for one in named):
            return None
        parts += [content[end : found.start], f" {named[0]} "]
        end = found.end
    text = "".join([*parts, content[end:]])
    return None if _CUT_OFF.search(text) else text


def _only_number(value: object) -> list[object]:
    """The number that an object has under any key, if nothing else in it tells a number."""
    told = [one for one in value.values() if _HAS_NUMBER.search(str(one))] if isinstance(value, dict) else []
    return told if len(told) == 1 else []


def _is_remark(value: object, written: str) -> bool:
    """Whether what stands in brackets is a part of a sentence, as "(two adults, three children)"."""
    if isinstance(value, list):
        return any(isinstance(one, str) for one in value)
    return written.startswith(("(", "（"))


_CUT_OFF = re.compile(r"\{\s*[\"'“‘]")
_HAS_NUMBER = re.compile(rf"\d|{_WORD}", re.IGNORECASE)


def _letters(key: str) -> str:
    return re.sub(r"[\W_]+", "", key).lower()


def _number(content: str) -> float | None:
    """The only number of a text, in digits or, if it has none, in words; 0 for "there are no dogs"."""
    if len(content) > _LONGEST_IN_WORDS or "\\boxed" in content:
        return parse_number(content)
    if _OR.search(content):
        return None
    content = _SINGLE.sub("1 ", _IN_HAN.sub(_of_han, content))
    words = _IN_WORDS.sub(_in_digits, content)
    if any(map(str.isdigit, content)):
        number = parse_number(_BESIDE_DIGITS.sub(_in_digits, content))
        return total_of_parts(words) if number is None else number
    if _DENIED.search(content):
        nothing = _NOTHING.fullmatch(content.strip(" .*。")) and not _IN_WORDS.search(content)
        return 0 if nothing else None
    number = parse_number(words)
    return total_of_parts(words) if number is None else number


def _of_han(found: re.Match[str]) -> str:
    if found["one"]:
        return str(_HAN_DIGITS[found["one"]])
    return str(10 * _HAN_DIGITS.get(found["tens"], 1) + _HAN_DIGITS.get(found["ones"], 0))


def _in_digits(word: re.Match[str]) -> str:
    return str(sum(_VALUES[part] for part in re.split("[- ]", word[0].lower())))


def count_reward(text: str, target: int, prediction: float | None) -> float:
    """1 for the true number, else 0 (R1-V's and Visual-RFT's reward for counting)."""
    return float(prediction == target)


def closeness_reward(text: str, target: int, prediction: float | None) -> float:
    """1 - |answered - true| / true, at least 0; of a true number 0 only that answer scores.

    Args:
        text: A completion.
        target: The true number.
        prediction: The answered number; None if unreadable, which scores 0.
    """
    return 0.0 if prediction is None else max(0.0, 1 - abs(prediction - target) / max(1, target))
