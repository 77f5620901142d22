r"""Rewards for short answers: a letter, yes or no, a number, words, or mathematics.

Answers are read leniently in form and strictly in substance: "**(b)**" and "The answer is B." are both B, but an
answer that names two things is none. `\boxed{…}`, `$…$`, Markdown and full-width characters are read through.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Final, get_args

from vlmenv.core.answers import Answer, AnswerKind
from vlmenv.core.errors import unknown_name
from vlmenv.core.formats import SECTIONS, TAGS, AnswerFormat
from vlmenv.core.spaces import Image
from vlmenv.envs.rewards.math import LONGEST_MATH, SPACED_UNIT, UNIT, check_installed, math_equal
from vlmenv.envs.rewards.terms import BatchTerm

LONGEST_ANSWER: Final = 10_000
"""Characters of an answer; longer ones are none."""

_PLAIN: Final = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x2212: "-", 0x3002: ".", 0x3000: " "}


class AnswerAccuracy(BatchTerm):
    """Whether answers are right, each by its target's kind: 1 or 0, and for `edit` the share that is.

    Mathematical answers are spread over processes. What cannot be read as the kind asked for scores 0.
    """

    name = "accuracy"

    def batch(
        self,
        texts: Sequence[str],
        targets: Sequence[Answer],
        images: Sequence[tuple[Image, ...]],
        answer_format: AnswerFormat,
    ) -> list[float]:
        """As `BatchTerm.batch`.

        Raises:
            ValueError: A target is no answer of its kind; `read_answer` finds this out beforehand.
            ConfigError: There is mathematics to compare, and math-verify is not installed.
        """
        contents = [answer_format.extract(text) for text in texts]
        scores = [_compare(content, target) for content, target in zip(contents, targets, strict=True)]
        asked = [i for i, score in enumerate(scores) if score is None]
        equal = math_equal([(contents[i] or "", targets[i].text) for i in asked]) if asked else []
        for i, is_equal in zip(asked, equal, strict=True):
            scores[i] = float(is_equal)
        return [score or 0.0 for score in scores]


accuracy_term: Final = AnswerAccuracy()


def accuracy_reward(text: str, target: Answer, answer_format: AnswerFormat = AnswerFormat.TAGS) -> float:
    """`AnswerAccuracy` of one completion, in [0, 1]."""
    return accuracy_term.batch([text], [target], [()], answer_format)[0]


def _compare(content: str | None, target: Answer) -> float | None:
    """The score of an answer; None where only computer algebra can tell."""
    answer, truth = parse_reply(content, target), parse_answer(target.text, target.kind)
    if truth is None:
        raise ValueError(f"the true answer {target.text[:100]!r} is none of kind '{target.kind}'")
    if answer is None:
        return 0.0
    if isinstance(answer, float) and isinstance(truth, float):
        return float(abs(answer - truth) <= target.tolerance + 1e-12 * abs(truth))
    if target.kind == "edit":
        return edit_ratio(str(answer), str(truth))
    if target.kind == "math" and answer != truth:
        return 1.0 if _same_number(str(answer), str(truth)) else None
    return float(answer == truth)


def _same_number(a: str, b: str) -> bool:
    """Whether two texts are plainly the same number; if not, they may still be equal."""
    if not (_COUNTED.fullmatch(a) and _BARE_NUMBER.fullmatch(b)):
        return False
    number = parse_number(a)
    return number is not None and abs(number) < 2**53 and number == parse_number(b)


def read_answer(
    text: str, kind: AnswerKind | None = None, tolerance: float = 0.0, choices: Sequence[str] = ()
) -> Answer:
    """A true answer from a data set's text.

    Args:
        text: The truth as written there.
        kind: How answers are compared with it. Where left out, a single letter is a choice, "yes" and "no" are
            what they are, a number, also with a unit, is numeric, and all else is exact.
        tolerance: Of numbers: the greatest difference that still counts as equal.
        choices: Of a letter: what the letters from A on stand for, if that is known.

    Raises:
        ValueError: The text is no truth of this kind; the message says why.
        ConfigError: The kind is mathematics, and math-verify is not installed.
    """
    text = " ".join(text.split())
    if not text:
        raise ValueError("the answer is empty")
    if marks := [mark for mark in (*TAGS, *SECTIONS) if mark in text]:
        raise ValueError(f"the answer holds {marks[0]!r}, by which completions are divided")
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"the tolerance is {tolerance}; it must be 0 or more")
    kind = _kind_of(text) if kind is None else kind
    if kind not in get_args(AnswerKind):
        raise ValueError(unknown_name("kind of answer", kind, get_args(AnswerKind)))
    if kind == "math":
        check_installed()
    longest = LONGEST_MATH if kind == "math" else LONGEST_ANSWER
    if len(text) > longest:
        raise ValueError(f"the answer has {len(text)} characters; one of kind '{kind}' may have {longest}")
    read = parse_answer(text, kind)
    if read is None or (kind == "choice" and not _CHOICE.fullmatch(text)):
        raise ValueError(f"the answer is {text[:100]!r}, which is no {_NAMES[kind]}")
    if kind != "choice":
        return Answer(str(read) if kind == "yes_no" else text, kind, tolerance if kind == "numeric" else 0.0)
    if choices and str(read) not in _LETTERS[: len(choices)]:
        raise ValueError(f"the answer is {read}, but there are {len(choices)} choices")
    return Answer(str(read), kind, choices=tuple(choices))


_NAMES: Final[dict[AnswerKind, str]] = {
    "choice": "single letter",
    "yes_no": "yes or no",
    "numeric": "single finite number",
    "exact": "text",
    "math": "text",
    "edit": "text",
}


def _kind_of(text: str) -> AnswerKind:
    if _CHOICE.fullmatch(text) and text.upper() == text:
        return "choice"
    if normalise(text) in ("yes", "no"):
        return "yes_no"
    return "numeric" if _MEASUREMENT.fullmatch(text) and parse_number(text) is not None else "exact"


def parse_reply(content: str | None, target: Answer) -> str | float | None:
    """`parse_answer` by a target's kind; what a letter stands for is read as that letter."""
    parsed = parse_answer(content, target.kind)
    if parsed is not None or content is None or not target.choices or len(content) > LONGEST_ANSWER:
        return parsed
    for read in (normalise, parse_number):
        value = read(content)
        fitting = [letter for letter, choice in zip(_LETTERS, target.choices, strict=False) if read(choice) == value]
        if value not in (None, "") and fitting:
            return fitting[0] if len(fitting) == 1 else None
    return None


def parse_answer(content: str | None, kind: AnswerKind) -> str | float | None:
    """An answer's content as its kind reads it; None where that is not possible, or there is none.

    A capital letter for `choice`, "yes" or "no", a number for `numeric`, a normalised string for `exact`, and
    the text itself, with single spaces, for `math` and `edit`.
    """
    if content is None or len(content) > (LONGEST_MATH if kind == "math" else LONGEST_ANSWER):
        return None
    match kind:
        case "choice":
            return parse_choice(content)
        case "yes_no":
            return parse_yes_no(content)
        case "numeric":
            return parse_number(content)
        case "exact":
            return normalise(content) or None
        case _:
            return " ".join(content.split()) or None


_LETTERS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# Letters. All patterns run on text with single spaces, and none repeats over what another part of it may match.
_MARKUP = re.compile(r"\\(?:boxed|fbox|text(?:bf|rm|it)?|math(?:rm|bf)|left|right)(?![A-Za-z])|[*_`${}\"“”\\]")
_CHOICE = re.compile(r"[(\[]? ?([A-Za-z]) ?[)\]]? ?[.:,;!]?")
_LETTER: Final = r"(?<![\w'’.-])[(\[]?([A-Z])(?!['’.-]?\w)[)\]]?"
_NEGATED = re.compile(
    rf"(?:\b(?:not|[Nn]either|nor|except)|n['’]t) (?:option |choice |answer )?{_LETTER}(?:,? (?:or|nor|and) {_LETTER})*"
)
_LABEL_AT_START = re.compile(r"[(\[]?([A-Za-z]) ?(?:[)\]:]|\.(?![A-Za-z](?![A-Za-z])))")
_LABEL = re.compile(  # (b), b), and B. before a word
    r"(?<![\w(\[])(?:[(\[]([A-Za-z])[)\]]|([A-Za-z])[)\]]|([A-Z])[.:](?: (?=\w)|(?=\w\w)))"
)
_NAMED = re.compile(
    r"(?i:\b(?:answer|option|choice|letter|choose|select|pick)(?: (?:is|would be|must be|should be))?:?) "
    r"[(\[]?(?:([A-Z])(?!['’-]?\w)|([a-z])(?=[)\].,;:!?]|$))"
)
_JOINED = re.compile(rf"{_LETTER}\.?(?:, |,? (?:or|and|&) | ?[/,&+] ?)(?:(?:or|and|option|choice) )?{_LETTER}")
_AFTER_A_LETTER: Final = r"(?:or|and|is|are|was|because|since|as|but|for|with|seems|looks|matches)\b"
_ARTICLE_OR_PRONOUN = re.compile(
    rf"(?<![\w'’.-])(?:A(?= (?!{_AFTER_A_LETTER})\w\w)|I(?!['’.-]?\w)(?! (?:or|and|is)\b|[.!)\]]*$))"
)


def parse_choice(content: str) -> str | None:
    """The letter A to Z that an answer chooses, as a capital; None where it chooses none, or several.

    "b", "(B)", "B) cat", "Option B" and "It is B, not C" choose B; "A or B" does not choose. The article "A" and
    the pronoun "I" are not taken for letters, and small letters only where they stand as a label does.
    """
    if len(content) > LONGEST_ANSWER:
        return None
    text = " ".join(_MARKUP.sub(" ", content.translate(_PLAIN)).split()).strip("'‘’ ")
    if whole := _CHOICE.fullmatch(text):
        return whole[1].upper()
    text = _NEGATED.sub(" ", text)
    label = _LABEL_AT_START.match(text)
    # After a label comes what it stands for, in which letters mean little: "B. Vitamin C".
    joined = [match.groups() for match in _JOINED.finditer(text) if label is None or match.start() < label.end()]
    if any(first != second for first, second in joined):
        return None
    marked = [match for pattern in (_LABEL, _NAMED) for match in pattern.finditer(text)]
    letters = {match[match.lastindex or 0].upper() for match in ([label] if label else []) + marked}
    if not letters:
        letters = {match[1] for match in re.finditer(_LETTER, _ARTICLE_OR_PRONOUN.sub(" ", text))}
    return letters.pop() if len(letters) == 1 else None


_YES_NO = re.compile(r"(?<![^\W_])(?:yes|no)(?![^\W_]|['’-]\w)")


def parse_yes_no(content: str) -> str | None:
    """ "yes" or "no", whichever occurs in an answer as a word; None where both or neither does."""
    if len(content) > LONGEST_ANSWER:
        return None
    words = set(_YES_NO.findall(content.translate(_PLAIN).casefold()))
    return str(words.pop()) if len(words) == 1 else None


# Numbers. Possessive quantifiers: what has been taken for digits is not given back, so that 3.5.2 is not 3.5.
_DIGITS: Final = r"(?:(?:[0-9]{1,3}+(?:,[0-9]{3})++|[0-9]++)(?:\.[0-9]++)?+|\.[0-9]++)(?:[eE][+-]?[0-9]++)?+"
_NUMBER = re.compile(
    rf"(?<![\w.,/])([+-]?)({_DIGITS})(?: ?/ ?({_DIGITS}))?+(?!,?[0-9]|\.[0-9]| ?/ ?[0-9])"
    rf"(?= ?(?:{UNIT})| {SPACED_UNIT}|(?! ?[A-Za-z](?![A-Za-z]))(?!\w))"  # 12 cm and 12 dogs, but not 12x, 12², 12 x
)
_BARE_NUMBER = re.compile(rf"([+-]?)({_DIGITS})")
_COUNTED = re.compile(rf"{_BARE_NUMBER.pattern}(?: [A-Za-z]{{2,}})*")  # "12", "12 dogs"
_MEASUREMENT = re.compile(rf"[$£€¥₹]? ?[+-]?{_DIGITS}(?: ?/ ?{_DIGITS})?+ ?(?:%|{UNIT}|{SPACED_UNIT})?")
_REWRITTEN: Final = tuple(
    (re.compile(pattern), by)
    for pattern, by in (
        (r"\s+", " "),
        (r"\{,\}", ","),
        (r"\^ ?\{? ?\\(?:circ|degree)(?![A-Za-z]) ?\}?", "°"),
        (rf"(?<![0-9.])\\[dtc]?frac ?\{{ ?(-?{_DIGITS}) ?\}} ?\{{ ?({_DIGITS}) ?\}}", r"\1/\2"),
        (r"(?<![0-9.])\\[dtc]?frac([0-9])([0-9])", r"\1/\2"),
        (r"(?<=[0-9]) ?(?:\\times|\\cdot|×|\*|x) ?10 ?\^ ?(?:\{([+-]?[0-9]{1,3})\}|([+-]?[0-9]{1,3}))", r"e\1\2"),
        (r"\\(?:text|mathrm|mbox) ?\{([^{}]*)\}(?:\^\{?[23]\}?)?", r" \1 "),
        (rf"((?<![A-Za-z\\])(?:{UNIT}|[A-Za-z]{{3,}}))\^\{{?[23]\}}?", r"\1"),  # cm^2, feet^2
        (r"(-?)\\?[$£€¥₹]", r" \1"),
        (r"\\(?:boxed|fbox|left|right|displaystyle|q?quad)(?![A-Za-z])|\\[,;:! ()\[\]]|\*\*|[`{}]", " "),
        (r"\\%", "%"),
        (r"\s+", " "),
    )
)
_NO_LONE_NUMBER = re.compile(
    r"(?<![A-Za-z])[0-9]|[\\^√π∞|<>≤≥±]|[-+*/] ?#|#(?: ?[+*/×]|\()"  # other digits, and arithmetic
    r"|#!|[-+]\(|[¼-¾⅐-⅞]"  # factorials, signs of brackets, fractions of one sign
    r"|(?i:\b(?:pi|sqrt|root|minus|negative|half|halves|thirds|squared|cubed|log|ln|exp|sin|cos|tan)\b)"
    r"|(?i:\b(?:more|less|fewer|greater|smaller|at least|at most|over|under|up to|not)\b|n['’]t\b)"
    r"|(?i:\b(?:dozen|hundred|thousand|million|billion|trillion)s?\b)"
)


def parse_number(content: str) -> float | None:
    r"""The number in an answer; None where there is none, or several that differ, or one that is not finite.

    "about 12", "12 cm", "$1,234.5$", "-3", "1/2", "\frac{1}{2}", "1e3" and "x = 12" are numbers. A percent sign is
    read like a unit: "50%" is 50. Arithmetic, "2\pi" and number words are not read.
    """
    if len(content) > LONGEST_ANSWER:
        return None
    if bare := _BARE_NUMBER.fullmatch(content):
        return _value(bare[1], bare[2], None)  # the same result, sooner: data sets have many
    text = content.translate(_PLAIN)
    for pattern, by in _REWRITTEN:
        text = pattern.sub(by, text)
    text = text.strip("*_ ")
    values = {_value(*match.groups()) for match in _NUMBER.finditer(text)}
    if len(values) != 1 or _NO_LONE_NUMBER.search(_NUMBER.sub("#", text)):
        return None
    return values.pop()


def _value(sign: str, over: str, under: str | None) -> float | None:
    value = float((sign + over).replace(",", ""))
    if under is not None:
        value /= float(under.replace(",", "")) or math.nan
    return value if math.isfinite(value) else None


_WRAPPED = re.compile(r"\\(?:boxed|fbox|text(?:bf|rm|it)?|mathrm) ?\{(.*)\}|\$(.*)\$")
_ARTICLE = re.compile(r"(?:an?|the) (?=.)")


def normalise(content: str) -> str:
    """A string for comparison: casefolded, in NFKC, with single spaces, without punctuation and articles around it.

    Signs that may mean something stay: "-3" is not "3", nor "c++" "c". At most 10,000 characters are looked at.
    """
    text = " ".join(unicodedata.normalize("NFKC", content[:LONGEST_ANSWER]).casefold().split())
    for _ in range(2):  # \boxed{\text{…}}
        if wrapped := _WRAPPED.fullmatch(text):
            text = (wrapped[1] or wrapped[2] or "").strip()
    bare = _unquoted(text)
    if article := _ARTICLE.match(bare):
        bare = _unquoted(bare[article.end() :])
    return bare or text


def _unquoted(text: str) -> str:
    return text.lstrip("\"'`*_“”‘’ ").rstrip("\"'`*_“”‘’.,;:!? ")


def edit_ratio(a: str, b: str) -> float:
    """1 - Levenshtein distance / characters of the longer one, in [0, 1]; texts of over 10,000 are not like any other.

    By Myers' bit-parallel algorithm (Journal of the ACM 46, 1999), in Hyyrö's form for whole strings.
    """
    if a == b:
        return 1.0
    if max(len(a), len(b)) > LONGEST_ANSWER or not a or not b:
        return 0.0
    a, b = (a, b) if len(a) >= len(b) else (b, a)
    places: dict[str, int] = {}
    for i, character in enumerate(a):
        places[character] = places.get(character, 0) | 1 << i
    everywhere = (1 << len(a)) - 1
    up, down, distance = everywhere, 0, len(a)  # bits: where the distance rises and falls along `a`
    for character in b:
        same = places.get(character, 0)
        diagonal = (((same & up) + up) ^ up) | same | down
        rises, falls = down | ~(diagonal | up) & everywhere, up & diagonal
        distance += (rises >> len(a) - 1 & 1) - (falls >> len(a) - 1)
        rises, falls = rises << 1 | 1, falls << 1
        up, down = (falls | ~(diagonal | rises)) & everywhere, rises & diagonal
    return 1 - distance / len(a)
