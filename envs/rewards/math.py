"""Equality of mathematical answers through math-verify, within bounded time.

Some expressions take for ever to work out, such as `9^{9^{9^9}}`, so this is done in child processes.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable, Sequence
from typing import Final

from vlmenv.core.errors import ConfigError
from vlmenv.envs.rewards.workers import Workers

TIME_LIMIT: Final = 0.5
"""Seconds of computing for one comparison; most take some milliseconds."""
LONGEST_MATH: Final = 1_000
"""Characters of an answer; longer ones are equal to none."""
UNIT: Final = (
    r"(?:°[CF]?|[kcdmµ]?m|[km]g|m[lL]|ms|sec|min|hrs?|kW|k[VJ]|k?Pa|[kMG]?Hz|ft|in|yd|mi|lbs?|oz|mph|px|deg)"
    r"(?:/(?:h|s|min))?(?![A-Za-z])"
)
"""A unit of measurement that may follow a number at once; but for m, no letter that may be a variable."""
SPACED_UNIT: Final = r"[gshLNVWJA](?![A-Za-z])"
"""One that must be set apart."""

_CACHED = 10_000
# Long numbers, huge powers, towers of powers, many brackets.
_BOMB = re.compile(
    r"\d{60}|\^\s*\{?\s*\d{5}|(?:\d\s*\^\s*\{?\s*){3}|[(\[{]{20}|[)}\]]\s*\^\s*\{?\s*\d{3}|\d{5}\s*!", re.ASCII
)

_cache: dict[tuple[str, str], bool] = {}
_workers = Workers(f"{__name__}:make_comparison", TIME_LIMIT)


def math_equal(pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """Whether answers are mathematically equal to the truth, by math-verify.

    A comparison that is not done after half a second, and an answer of more than 1,000 characters or with
    a number too large to work out, is no. Units at the end are not compared, percent signs may be left out,
    `x = 3` equals `3`, and decimals are compared to six places.

    Args:
        pairs: N times an answer and the truth, either as LaTeX with or without delimiters, or as plain text.

    Returns:
        N times yes or no.

    Raises:
        ConfigError: math-verify is not installed.
    """
    check_installed()
    results = {pair: False if _is_hopeless(pair[0]) else _cache.get(pair) for pair in pairs}
    unknown = [pair for pair, result in results.items() if result is None]
    found = dict(zip(unknown, _workers.map(unknown), strict=True))
    # Not those that were given up by the clock: a machine that stood still is no reason to call an answer wrong again.
    _remember({pair: result is True for pair, result in found.items() if not isinstance(result, TimeoutError)})
    results |= {pair: result is True for pair, result in found.items()}
    return [results[pair] is True for pair in pairs]


def check_installed() -> None:
    """Does nothing if math-verify is installed.

    Raises:
        ConfigError: It is not.
    """
    if not _is_installed():
        raise ConfigError("mathematical answers need math-verify: pip install math-verify")


def start_math() -> None:
    """Begins to load math-verify in another process, so that the first comparison need not wait for it.

    Raises:
        ConfigError: math-verify is not installed.
    """
    check_installed()
    _workers.start()


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("math_verify") is not None


def _is_hopeless(answer: str) -> bool:
    return len(answer) > LONGEST_MATH or not answer.strip() or _BOMB.search(answer) is not None


def _remember(found: dict[tuple[str, str], bool]) -> None:
    """Keeps the last results, failures too: a policy gives the same answers again and again."""
    _cache.update(found)
    for pair in list(_cache)[: max(0, len(_cache) - _CACHED)]:
        _cache.pop(pair, None)  # without a lock, which a fork might copy while it is held


def make_comparison() -> Callable[[str, str], bool]:
    """What the child processes do; loads math-verify, which takes a while."""
    from math_verify import (  # type: ignore[import-untyped]
        LatexExtractionConfig,
        LatexNormalizationConfig,
        parse,
        verify,
    )

    # Its own list of units holds t, h and c, so that 5t would be 5.
    normalisation = LatexNormalizationConfig(units=False, malformed_operators=True, nits=True)
    # LaTeX alone: its search for numbers in plain text takes "9\pi)" for 9.
    wanted = [LatexExtractionConfig(normalization_config=normalisation)]

    def compare(answer: str, truth: str) -> bool:
        gold, found = (parse(_as_latex(text), wanted, parsing_timeout=None) for text in (truth, answer))
        return bool(verify(gold, found, timeout_seconds=None))

    for answer, truth in (("9\\pi", "9"), ("(x+1)^2", "x^2+1"), ("\\frac{1}{2}x", "x\\sqrt{2}"), ("(1,2)", "x=3")):
        compare(answer, truth)  # loads the rest, and fills the parser's tables
    return compare


_SIGNS: Final = str.maketrans({"²": "^{2}", "³": "^{3}", "°": "^\\circ ", "−": "-"})
_SEGMENT = re.compile(r"\$[^$]*\$|\\\(.*?\\\)|\\\[.*?\\\]|\\boxed.*")
_DELIMITER = re.compile(r"\$|\\[()\[\]]")
_LEAD_IN = re.compile(r"^.*(?:\b(?:is|are|be|equals)\b:?|:) (?=\S)", re.IGNORECASE)
_GAP: Final = r"(?:\\[,;: ]|[ ~])"
_MEASURE = re.compile(
    rf"(?<=[\dA-Za-z}})]){_GAP}*"
    rf"(?:\\(?:text|mathrm|mbox) ?\{{[A-Za-z°/ .]*\}}|(?<![A-Za-z\\]){UNIT})(?:\^\{{?[23]\}}?)?$"
    rf"|(?<=\d){_GAP}{SPACED_UNIT}$"
)
_WORDS = re.compile(r"(?=.*[A-Za-z]{3})[A-Za-z][A-Za-z' -]*")
_PI = re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])")
_ROOT = re.compile(r"√ ?(\d+|[A-Za-z])")
_FUNCTION = re.compile(r"(?<![\\A-Za-z])(cos|sin|tan|log|ln|exp)(?![A-Za-z])")  # or else cos 0 would be c·o·s·0
_MIXED = re.compile(r"(?<![\d.])(\d+) (\d+)/(\d+)(?![\d.])", re.ASCII)


def _as_latex(text: str) -> str:
    """A text with delimiters around what counts in it, and in the signs that math-verify knows."""
    text = " ".join(text.split()).strip("`* ").rstrip(".").translate(_SIGNS).replace("\\$", "").replace(".$", "$")
    outside, segments = _SEGMENT.subn("", text)
    if segments and not any(character.isdigit() for character in outside):
        return text
    text = _MEASURE.sub("", _LEAD_IN.sub("", _DELIMITER.sub("", text)))
    if _WORDS.fullmatch(text):
        return f"$\\text{{{text}}}$"  # or else "act" would be "cat": a·c·t, either of them
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", _ROOT.sub(r"\\sqrt{\1}", _PI.sub(r"\\pi", _FUNCTION.sub(r"\\\1", text))))
    return f"${text}$"
