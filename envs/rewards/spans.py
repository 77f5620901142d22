"""Rewards for answers that are a span of time, and the forms of such answers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from vlmenv.core.files import parse_json
from vlmenv.core.formats import AnswerFormat
from vlmenv.core.literals import Cut, find_values

LONGEST: Final = 1_000
"""Characters of an answer that is read; a longer one is unreadable."""
MOST: Final = 1e6
"""Greatest time that is read, in seconds."""

_TIME = r"(?:(?:\d{1,3}:)?\d{1,4}:\d{1,2}(?:\.\d{1,9}|,\d{3})?|\d{1,9}(?:\.\d{1,9})?|\.\d{1,9})"
_UNIT = r"(?:\s*(?:(?:s|secs?|seconds?)\b\.?|秒))?"
_JOINED = r"(?:to|-{1,2}>|-|–|—|~|→|,|and|until|through|到|至)"
_WORDS = re.compile(rf"(?:from\s+|between\s+|从\s*)?({_TIME}){_UNIT}\s*{_JOINED}\s*({_TIME}){_UNIT}\.?", re.IGNORECASE)
_NAMED = re.compile(
    rf"start(?:[\s_]?time)?\s*[:=]\s*({_TIME}){_UNIT}\s*[,;]?\s*end(?:[\s_]?time)?\s*[:=]\s*({_TIME}){_UNIT}\.?",
    re.IGNORECASE,
)
_IN_A_SENTENCE = re.compile(
    rf"(?<![\w.:,-])(?:\(|\[|\bbetween\s+(?={_TIME}{_UNIT}\s*and\b)|(?!{_TIME}{_UNIT}\s*(?:,|and\b)))"
    rf"({_TIME}){_UNIT}\s*{_JOINED}\s*({_TIME}){_UNIT}(?![\w:])",
    re.IGNORECASE,
)
_NO_SPAN = re.compile(
    r"\b(?:not|no|or|nor|either|neither|maybe|except|unless|wrong|incorrect|false|but"
    r"|min|mins|minutes?|hours?|h|ms|frames?)\b|n['’]t\b|[不没或分帧?？]",
    re.IGNORECASE,
)
_LONGEST_SENTENCE: Final = 300
_FENCED = re.compile(r"```(?:json)?\s(.*)```", re.DOTALL)
_TAG = re.compile(r"</?[a-z_]{1,20}>", re.IGNORECASE)
_MARKUP = re.compile(r"\\boxed\{(.*)\}|[*`$\"'“”]+([^*`$\"'“”]*)[*`$\"'“”]+", re.DOTALL)
_BRACKETED = re.compile(rf"[\[(<]([^\[\]()<>]*)[\])>]{_UNIT}", re.IGNORECASE)
_KEYS: Final = (("start", "end"), ("start_time", "end_time"), ("begin", "end"))
_OF: Final = r"(?:at|time|timestamps?|s|sec|secs|seconds?|ts)?"
_START_KEY = re.compile(rf"(?:t|time|event|clip)?(?:start|begin|from)(?:ing)?{_OF}")
_END_KEY = re.compile(rf"(?:t|time|event|clip)?(?:end|stop|finish|to)(?:ing)?{_OF}")
_SPAN_KEY = re.compile(r"(?:time)?(?:stamps?|spans?|intervals?|segments?|windows?|ranges?|period)|time|answer")


class Span(NamedTuple):
    """A span of time in seconds from the start of a video."""

    start: float
    end: float


class TrueSpan(NamedTuple):
    """A true span, with the duration of its video."""

    start: float
    end: float
    duration: float


def parse_span(content: str) -> Span | None:
    """The span in the content of an answer, if it is one span and nothing else; otherwise None.

    The forms are `{"start": 2.5, "end": 6}`, `[2.5, 6]` (both fenced or not), `2.5 to 6 seconds` (Time-R1,
    arXiv 2503.13377) and `from 00:02.5 to 00:06` (Charades-STA's and Qwen2.5-VL's times). Quotes, brackets, Markdown
    and the case of keys do not matter. The start is at most the end.
    """
    content = content.strip()
    if len(content) > LONGEST:
        return None
    content = _unwrapped(content)
    bracketed = _BRACKETED.fullmatch(content)
    words = content if bracketed is None else bracketed[1].strip()
    if found := _WORDS.fullmatch(words) or _NAMED.fullmatch(words):
        return _span(_seconds(found[1]), _seconds(found[2]))
    return _of_value(_json(content)) or _of_literal(content) or _of_sentence(content)


def _of_sentence(content: str) -> Span | None:
    """The span that a sentence tells, if it has no other number and does not deny it."""
    content = _TAG.sub(" ", content)
    found = _IN_A_SENTENCE.search(content) if len(content) <= _LONGEST_SENTENCE else None
    beside = "" if found is None else content[: found.start()] + content[found.end() :]
    if found is None or re.search(r"\d|[{}]", beside) or _NO_SPAN.search(beside):
        return None
    return _span(_seconds(found[1]), _seconds(found[2]))


def _unwrapped(content: str) -> str:
    """A text without a fence, a box, and the marks of Markdown or quotation around it."""
    if fenced := re.fullmatch(r"```(?:[a-z]{1,9}(?![a-z]))?(.*)```", content, re.DOTALL):
        content = fenced[1].strip()
    for _ in range(2):
        if marked := _MARKUP.fullmatch(content):
            content = (marked[1] or marked[2] or "").strip()
    return content


def is_exact_span(content: str) -> bool:
    """Whether the content of an answer is a span as JSON, in a fence or none."""
    content = content.strip()
    return len(content) <= LONGEST and _of_value(_json(content)) is not None


def write_span(span: Span) -> str:
    """A span in the form that prompts ask for."""
    return json.dumps(span._asdict())


def overlap(one: Span, other: Span | TrueSpan) -> float:
    """Intersection over union of two spans, in [0, 1]; 0 where both have no length."""
    shared = min(one.end, other.end) - max(one.start, other.start)
    union = (one.end - one.start) + (other.end - other.start) - max(0.0, shared)
    return max(0.0, shared) / union if union > 0 else 0.0


def span_iou_reward(text: str, target: TrueSpan, prediction: Span | None) -> float:
    """Intersection over union with the true span, in [0, 1]; 0 where unreadable (TimeZero, arXiv 2503.13377v1)."""
    return 0.0 if prediction is None else overlap(prediction, target)


def span_iou50_reward(text: str, target: TrueSpan, prediction: Span | None) -> float:
    """1 for an intersection over union of at least 0.5, else 0."""
    return float(span_iou_reward(text, target, prediction) >= 0.5)


def timed_iou_reward(text: str, target: TrueSpan, prediction: Span | None) -> float:
    """IoU · (1 - |start - true start| / duration) · (1 - |end - true end| / duration), in [0, 1].

    It is Time-R1's reward (arXiv 2503.13377v2, code of `iou_v2`). A difference counts as at most the duration.

    Args:
        text: A completion.
        target: The true span.
        prediction: The answered span; None if unreadable, which scores 0.
    """
    if prediction is None:
        return 0.0
    shares = [abs(a - b) / target.duration for a, b in zip(prediction, target[:2], strict=True)]
    return overlap(prediction, target) * (1 - min(1.0, shares[0])) * (1 - min(1.0, shares[1]))


def span_format_reward(text: str, target: Any, answer_format: AnswerFormat = AnswerFormat.TAGS) -> float:
    """1 for a text in the answer format and nothing else, whose answer is exactly a span as JSON; else 0."""
    return float(answer_format.is_followed(text) and is_exact_span(answer_format.extract(text) or ""))


def _json(content: str) -> Any:
    fenced = _FENCED.fullmatch(content)
    try:
        return parse_json(fenced[1] if fenced else content)
    except ValueError:
        return None


def _of_value(value: Any) -> Span | None:
    """The span of a JSON value."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (list, Mapping)):
        value = value[0]
    if isinstance(value, Mapping):
        named = [[value[key] for key in keys] for keys in _KEYS if value.keys() >= {*keys}]
        value = named[0] if named and all(one == named[0] for one in named) else None
    if not isinstance(value, list) or len(value) != 2:
        return None
    return _span(*map(_time, value))


def _of_literal(content: str) -> Span | None:
    """The span of the only list or object that a text is, with quotes, keys and commas of any kind."""
    values = list(find_values(content))
    if len(values) != 1 or (values[0].start, values[0].end) != (0, len(content)) or isinstance(values[0].value, Cut):
        return None
    value = values[0].value
    while isinstance(value, list | dict) and len(value) == 1:
        (value,) = value.values() if isinstance(value, dict) else value
    return _of_pairs(value) if isinstance(value, dict) else _of_inner(value)


def _of_pairs(value: dict[str, Any]) -> Span | None:
    """The span of an object with a start and an end under names of any kind, or with a span under its name."""
    plain = [(re.sub(r"[\W_]+", "", key).lower(), one) for key, one in value.items()]
    starts, ends, spans = (
        [one for key, one in plain if name.fullmatch(key)] for name in (_START_KEY, _END_KEY, _SPAN_KEY)
    )
    named = [_of_value([start, end]) for start in starts for end in ends] or list(map(_of_inner, spans))
    return named[0] if named and all(one == named[0] for one in named) else None


def _of_inner(value: Any) -> Span | None:
    """The span under a key such as "timestamp"."""
    if isinstance(value, str):
        found = _WORDS.fullmatch(value.strip())
        return None if found is None else _span(_seconds(found[1]), _seconds(found[2]))
    while isinstance(value, list) and len(value) == 1:
        (value,) = value
    return _of_pairs(value) if isinstance(value, dict) else _of_value(value)


def _time(value: Any) -> float | None:
    if isinstance(value, str):
        found = re.fullmatch(rf"({_TIME}){_UNIT}", value.strip(), re.IGNORECASE)
        return None if found is None else _seconds(found[1])
    return float(value) if type(value) in (int, float) and 0 <= value <= MOST else None


def _seconds(text: str) -> float:
    """Seconds of `12.5`, `1:12.5` or `0:01:12.5`."""
    seconds = 0.0
    for part in text.split(":"):
        seconds = 60 * seconds + float(part.replace(",", "."))
    return seconds


def _span(start: float | None, end: float | None) -> Span | None:
    if start is None or end is None or not (math.isfinite(end) and 0 <= start <= end <= MOST):
        return None
    return Span(start, end)
