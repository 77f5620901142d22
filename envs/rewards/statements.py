"""Tells which numbers of a text are no statement of it, and which state another number than the last."""

from __future__ import annotations

import re
from typing import Final

_SENTENCE_END = re.compile(r"[.;!?](?:\s|$)|\n")
_PART_END = re.compile(
    r",(?!\d{3})|:\s+(?=[^\s\d*])|\b(?:and|but|while|whereas|which|who|because|although|though)\b|[而但]", re.IGNORECASE
)
_CONCLUDES = re.compile(
    r"\b(?:so|then|thus|hence|therefore|total\w*|altogether|overall|in all|final\w*|sum|difference|product|ratio"
    r"|average|mean|remain\w*|answers?|results?|solution|gives?|gets?|obtain|finds?|yields?|equals?|becomes|to"
    r"|(?:that|this)(?:'s| is))\b|所以|因此|[故共总答则即得选]|等于",
    re.IGNORECASE,
)
_SUPPOSES = re.compile(
    r"\s*(?:(?:if|when|since|because|as|for|given|after|before|suppose|assum\w+|let)\b|如果|因为|[若当设])",
    re.IGNORECASE,
)
_ONLY_SETS_OUT = re.compile(r"\s*(?:in|on|at|by|of|from|to|with|between|among|within|over|during)\b", re.IGNORECASE)
_VERB: Final = r"\b(?:is|are|was|were|has|have|had|shows?|contains?|counts?|sees?|holds?|costs?|equals?)\b"
_HAS_VERB = re.compile(_VERB, re.IGNORECASE)
_DIGITS: Final = r"(?<![A-Za-z0-9_^.,{/\\])\d+(?:[.,]\d+)*"
_NUMBER = re.compile(_DIGITS, re.ASCII)
_STATES = re.compile(
    rf"{_DIGITS} ?(?:%|[\u4e00-\u9fff]"
    r"| (?!(?:and|or|nor|to|plus|minus|times|by|of|over|from|with|into|equals?|gives?)\b)"
    rf"(?!{_VERB})[a-z]{{2,}})|(?:{_VERB}|:)[^\w-]*{_DIGITS}\W*$",
    re.IGNORECASE,
)
_IS_NUMBER = re.compile(rf"\W*{_DIGITS}\W*")


_YEAR: Final = r"(?:19|20)\d\d"
_YEARS: Final = rf"(?:years? |fiscal year |FY ?)?{_YEAR}(?: ?(?:[-–/]|to|and|until|through) ?{_YEAR})?"
_ASIDE = re.compile(
    rf"(?<!\\)\b(?:in|for|during|since|from|until|before|after|between|labell?ed)(?: the)? {_YEARS}"
    r"(?![\d.]|,\d| ?[%$€£])"
    rf"(?!,? (?:and )?{_YEAR})"
    rf"|\((?:in )?{_YEARS}\)"
    r"|\b(?:bar|line|column|row|figure|image|picture|panel|group|page|slide|table|step|point|slice)s?"
    r" (?:#|no\. ?|number )?\d{1,4}(?![\d.%]|,\d| [a-z]+s\b)"
    r"(?!,? ?(?:and|&|,) ?\d)"
    r"|\b\d{1,3}(?:st|nd|rd|th)\b",
    re.IGNORECASE,
)
"""Years of circumstance, names such as "bar 3", and ordinals."""
_OR = re.compile(r"\b(?:or|either)\b|或", re.IGNORECASE)
_REASON = re.compile(r"(?<=[\d)}]),? (?:because|since|as (?:there|it|the))\b.*", re.DOTALL)
_LONGEST: Final = 400
_ADDEND: Final = r"\d{1,9}(?:\.\d{1,9})?(?: [A-Za-z]{3,20}){0,3}(?: \([^()\d]{1,40}\))?"
_WORKING = re.compile(
    rf"(?<![\w.,^({{/*×·=+-])(?<![*×·=+/-] ){_ADDEND}(?: ?[-+*×/÷] ?{_ADDEND}){{1,9}}+"
    r" ?= ?(?=\d)(?![\d.,]+ ?[-+*×/÷^=])"
)
"""The left side of a sum of things, as "2 red + 3 blue = 5 dogs"."""


def without_asides(text: str) -> str:
    """A text without numbers that it names in passing, if it has another: "42" of "42 in 2019".

    Years after "in", "for" and the like, names ("bar 3") and ordinals ("the 3rd") go, and so does the left side of a
    sum, as in "2 + 3 = 5 dogs", and a reason after the number.

    Args:
        text: Plain signs. One of over 400 characters loses its reason alone.
    """
    text = _REASON.sub("", text)
    if len(text) > _LONGEST or len(_NUMBER.findall(text)) < 2:
        return text
    left = text if _OR.search(text) else _ASIDE.sub(" ", text)
    text = left if _NUMBER.search(left) else text
    return _WORKING.sub("", text)


_TOTAL_OF_PARTS = re.compile(
    r"[^\d:(,]*\b\d+(?: [a-z][^\d:(,.]*)? ?[:(,](?: ?(?:and )?\d+ (?=[a-z])(?:(?!\bor\b)[^\d,;:.])*[,;]?)+[).]*",
    re.IGNORECASE,
)
_DENIED = re.compile(r"\b(?:no|none|not|nor|neither|cannot)\b|n['’]t\b|[没不]", re.IGNORECASE)


def total_of_parts(text: str) -> int | None:
    """The number that a text states first and then divides, as "3 dogs: 1 brown and 2 white"; None for all else."""
    first, *parts = map(int, re.findall(r"[0-9]{1,5}", text)) if _TOTAL_OF_PARTS.fullmatch(text.strip()) else [0]
    return first if len(parts) > 1 and first == sum(parts) and not _DENIED.search(text) else None


def states_another(before: str, said: str) -> bool:
    """Whether a clause states another number than the last clause, which is no conclusion of it.

    A conclusion has a word such as "so", "total" or "gives". Numbers in conditions ("if x is 3"), in circumstances
    ("in 2010") and in names ("bar 2 is") are not stated.

    Args:
        before: A text up to a number, the beginning of the last clause included.
        said: The text from there on.
    """
    numbers = set(_NUMBER.findall(said))
    *sentences, last = [_PART_END.split(one) for one in _SENTENCE_END.split(before)]
    if not numbers or _CONCLUDES.search(last.pop()):
        return False
    clauses = [part for parts in (*sentences, last) if parts and not _SUPPOSES.match(parts[0]) for part in parts]
    first = [parts[0] for parts in (*sentences, last) if parts]
    stating = [*filter(_states, clauses), *filter(_IS_NUMBER.fullmatch, first)]
    return any(not numbers.issuperset(_NUMBER.findall(clause)) for clause in stating)


def _states(clause: str) -> bool:
    is_aside = _ONLY_SETS_OUT.match(clause) and not _HAS_VERB.search(clause)
    return not is_aside and _STATES.search(clause) is not None
