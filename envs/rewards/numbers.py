r"""Reads plain numbers exactly: `1,234.5`, `-1/2`, `1 1/2`, `3×10^8`, `1.6e-19`, `2^{-98}`, `1.5 million`, `28%`."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Final, NamedTuple


class Number(NamedTuple):
    """A number as it is written."""

    value: Fraction
    step: Fraction | None = None
    """what its last decimal is worth; None of whole numbers and fractions, which are exact"""
    digits: int = 0
    """how many significant digits it has, of numbers with a step"""
    is_scientific: bool = False
    is_percent: bool = False
    """whether a percent sign follows; the value is without it, 28 of 28%"""


_LARGEST_POWER: Final = 400
_SCALES: Final = {
    "hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12,
    "百": 2, "千": 3, "万": 4, "百万": 6, "亿": 8,
}  # fmt: skip
_WHOLE: Final = r"\d{1,3}+(?:(?:,|\{,\}|\{ ,\}| |')\d{3})++|\d++"
_DECIMAL: Final = rf"(?:(?P<whole>{_WHOLE})(?:\.(?P<places>\d*+))?+|\.(?P<alone>\d++))"
_POWER_OF_TEN: Final = (
    r"(?: ?[eE] ?(?P<e>[+-]?\d{1,3}+)| ?(?:\\times|\\cdot|×|·|\*|x|X) ?10 ?(?:\^|\*\*) ?"
    r"(?:\{ ?(?P<braced>[+-]?\d{1,3}) ?\}|\(? ?(?P<bare>[+-]?\d{1,3}) ?\)?))"
)
_PERCENT: Final = r"(?: ?(?P<percent>\\?%|[Pp]er ?cent(?:age)?(?: points?)?|pct))"
_SCALE: Final = rf"(?: ?(?P<scale>{'|'.join(sorted(_SCALES, key=len, reverse=True))})s?)"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?) ?{_DECIMAL}{_POWER_OF_TEN}?{_SCALE}?"
    rf"{_PERCENT}?",
    re.ASCII,
)
_INT: Final = r"(?:\{ ?(?:[+-] ?)?\d+ ?\}|\d)"
_PARTS: Final = (
    r"(?:(?P<over>\d+(?:\.\d+)?|\.\d+) ?/ ?(?P<under>[+-]?\d+(?:\.\d+)?)"
    r"|\\[dtc]?frac ?(?:\{ ?(?P<top>[+-]? ?\d+(?:\.\d+)?) ?\}|(?P<top1>\d)) ?"
    r"(?:\{ ?(?P<bottom>[+-]? ?\d+(?:\.\d+)?) ?\}|(?P<bottom1>\d)))"
)
_FRACTION = re.compile(rf"(?P<sign>[+-]?) ?(?:(?P<mixed>\d+) ?(?=\\|(?<= )))?{_PARTS}{_PERCENT}?", re.ASCII)
_POWER = re.compile(
    r"(?P<sign>[+-]?) ?(?P<base>\d+(?:\.\d+)?) ?(?:\^|\*\*) ?"
    r"(?:\{ ?(?P<braced>[+-]? ?\d{1,3}) ?\}|(?P<bare>[+-]?\d{1,3}))",
    re.ASCII,
)
_REPEATING = re.compile(
    r"(?P<sign>[+-]?) ?(?P<whole>\d*)\.(?P<places>\d*)(?:\\overline ?\{ ?(?P<line>\d+) ?\}|\( ?(?P<brackets>\d+) ?\)"
    r"|\\dot ?\{? ?(?P<first>\d) ?\}?(?:(?P<middle>\d*)\\dot ?\{? ?(?P<last>\d) ?\}?)?)" + _PERCENT + "?",
    re.ASCII,
)
_LONGEST: Final = 100


def read_number(text: str) -> Number | None:
    """A plain number; None of all else, also of expressions.

    Args:
        text: As `normalise.stated` gives it, without a unit.
    """
    text = text.strip()
    if len(text) > _LONGEST:
        return None
    while text.startswith(("(", "{")) and text.endswith((")", "}")) and _is_wrapped(text):
        text = text[1:-1].strip()
    for pattern, read in (
        (_NUMBER, _read_decimal), (_FRACTION, _read_fraction), (_POWER, _read_power), (_REPEATING, _read_repeating),
    ):  # fmt: skip
        if match := pattern.fullmatch(text):
            return read(match)
    return None


def _is_wrapped(text: str) -> bool:
    return "," not in text and not any(character in text[1:-1] for character in "(){}")


def _read_decimal(match: re.Match[str]) -> Number:
    whole = re.sub(r"\D", "", match["whole"] or "")
    places = (match["places"] if match["alone"] is None else match["alone"]) or ""
    exponent = int(match["e"] or match["braced"] or match["bare"] or 0) + _SCALES.get(match["scale"], 0)
    step = Fraction(10) ** (exponent - len(places))
    value = int(whole + places or "0") * step * (-1 if match["sign"] == "-" else 1)
    digits = len((whole + places).lstrip("0"))
    is_scientific = any(match[name] is not None for name in ("e", "braced", "bare"))
    is_percent = match["percent"] is not None
    return Number(value, step if places else None, digits if places else 0, is_scientific, is_percent)


def _read_fraction(match: re.Match[str]) -> Number | None:
    over = Fraction((match["over"] or match["top"] or match["top1"]).replace(" ", ""))
    under = Fraction((match["under"] or match["bottom"] or match["bottom1"]).replace(" ", ""))
    if not under:
        return None
    value = over / under
    if match["mixed"] is not None:
        if not 0 < value < 1:
            return None  # 2 3/2 is no mixed number
        value += int(match["mixed"])
    return Number(-value if match["sign"] == "-" else value, is_percent=match["percent"] is not None)


def _read_power(match: re.Match[str]) -> Number | None:
    exponent, base = int((match["braced"] or match["bare"]).replace(" ", "")), Fraction(match["base"])
    if abs(exponent) > _LARGEST_POWER or len(match["base"]) > 10 or (not base and exponent <= 0):
        return None
    value = base**exponent
    return Number(-value if match["sign"] == "-" else value)


def _read_repeating(match: re.Match[str]) -> Number:
    r"""`0.1\overline{6}`, `0.1(6)` and `0.1\dot{6}` are 1/6."""
    block = match["line"] or match["brackets"] or f"{match['first']}{match['middle'] or ''}{match['last'] or ''}"
    places = match["places"]
    value = int(match["whole"] + places or "0") + Fraction(int(block), 10 ** len(block) - 1)
    value /= 10 ** len(places)
    return Number(-value if match["sign"] == "-" else value, is_percent=match["percent"] is not None)


_MAGNITUDES: Final = {
    "k": 3, "m": 6, "b": 9, "t": 12, "mn": 6, "mln": 6, "bn": 9, "tn": 12,
    "thousand": 3, "million": 6, "billion": 9, "trillion": 12,
}  # fmt: skip
_MAGNITUDE = re.compile(
    r"(?<![\w.,^/])(?P<before>(?P<currency>[$€£¥₹] ?)?[+-]?)(?P<whole>\d{1,3}+(?:,\d{3})++|\d*+)"
    r"(?:\.(?P<places>\d++))?+(?<=\d) ?(?P<name>(?i:mn|mln|bn|tn|thousand|million|billion|trillion)"
    r"|(?(currency)[KkMmBbTt]|[KkMBT]))(?![\w/^&-])",
    re.ASCII,
)


def magnitudes_written_out(text: str) -> str:
    """A text with "14000" for "14K" and "14 thousand", and so for M, B, T, mn, bn, tn; small m, b, t only of money."""
    return _MAGNITUDE.sub(_written_out, text)


def _written_out(match: re.Match[str]) -> str:
    whole, places = match["whole"].replace(",", ""), match["places"] or ""
    power = _MAGNITUDES[match["name"].lower()]
    digits = (whole + places[:power].ljust(power, "0")).lstrip("0") or "0"
    return f"{match['before']}{digits}{'.' * (len(places) > power)}{places[power:]}"


_DECIMAL_COMMA = re.compile(
    r"(?<![\d.,'])(?:(?P<whole>\d{1,3}(?:[. ]\d{3})+|0)(?:,|\{,\})(?P<places>\d+)"
    r"|(?P<plain>\d+)(?:,|\{,\})(?P<few>\d\d?|\d{4,}))(?!\d|[.,]\d|\{,|[^\S\n]?[)\]]|\\[}\])])",
    re.ASCII,
)
_IN_A_LIST = re.compile(r"(?:[(\[]|\\\{|(?<![A-Za-z])\{)[\s$+-]*$")


def decimal_commas_as_points(text: str) -> str:
    """A text with "3.5" for "3,5" and "1234.5" for "1.234,5".

    Three places after a comma are thousands, but for "0,125". Numbers in brackets, as "(3,5)", stay, and so do
    those with a space after the comma.
    """
    return _DECIMAL_COMMA.sub(_pointed, text) if "," in text else text


def _pointed(match: re.Match[str]) -> str:
    if _IN_A_LIST.search(match.string[max(0, match.start() - 10) : match.start()]):
        return match[0]
    whole = re.sub(r"\D", "", match["whole"] or match["plain"])
    return f"{whole}.{match['places'] or match['few']}"


LEAST_DIGITS: Final = 3
"""Significant digits of a decimal truth that is taken for rounded."""
LEAST_DIGITS_OF_AN_ANSWER: Final = 6
"""Those that a decimal needs to stand for an exact truth that it rounds."""


def is_rounded(number: Number) -> bool:
    """Whether a number's digits may be those of a longer one: 3.14 and 1.6e-19, but not 4.8, 5 or 1/2."""
    return number.step is not None and number.digits >= (LEAST_DIGITS - 1 if number.is_scientific else LEAST_DIGITS)


def same_number(answer: Number, truth: Number) -> bool:
    """Whether a number is the true one, to the precision that the truth states.

    A truth of three or more significant digits, one of them a decimal, may be given by more digits or as a fraction:
    3.14 by 3.1416. A fraction may be rounded to six or more significant digits: 1/3 to 0.333333.
    All else must be equal. A percent sign on one side alone may be left out, or count as 1/100.
    """
    if answer.is_percent == truth.is_percent:
        return _same_value(answer, truth)
    return _same_value(answer, truth) or _same_value(_as_share(answer), _as_share(truth))


def _as_share(number: Number) -> Number:
    if not number.is_percent:
        return number
    return number._replace(value=number.value / 100, step=number.step and number.step / 100)


def _same_value(answer: Number, truth: Number) -> bool:
    difference = abs(answer.value - truth.value)
    if not difference:
        return True
    if truth.step is not None:
        is_finer = answer.value.denominator > 1 if answer.step is None else answer.step < truth.step
        return is_rounded(truth) and is_finer and difference <= truth.step / 2
    is_whole = truth.value.denominator == 1
    return not is_whole and is_rounding(answer) and answer.step is not None and difference <= answer.step / 2


def is_rounding(number: Number) -> bool:
    """Whether a number has digits enough to stand for an exact one."""
    return number.step is not None and number.digits >= LEAST_DIGITS_OF_AN_ANSWER
