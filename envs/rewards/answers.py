r"""Rewards for short answers: a letter, yes or no, a number, words, or mathematics.

Answers are read leniently in form and strictly in substance. "**(b)**" and "The answer is B." are both B, but an answer
that names two things is none. `\boxed{…}`, `$…$`, Markdown and full-width characters are read through.
"""

from __future__ import annotations

import functools
import json
import math
import re
import unicodedata
from collections.abc import Hashable, Sequence
from typing import Final, NamedTuple, get_args

from vlmenv.core.answers import Answer, AnswerKind
from vlmenv.core.errors import unknown_name
from vlmenv.core.formats import SECTIONS, TAGS, AnswerFormat
from vlmenv.core.literals import find_values
from vlmenv.core.spaces import Image
from vlmenv.envs.rewards.evidence import OTHER_DENIAL, conclusions, sentence, tidy, unframed
from vlmenv.envs.rewards.formulas import Form, read_form
from vlmenv.envs.rewards.letters import LETTERS, read_letters, truth_letters
from vlmenv.envs.rewards.math import LONGEST_MATH, SPACED_UNIT, UNIT, check_installed, compare, math_equal
from vlmenv.envs.rewards.normalise import stated
from vlmenv.envs.rewards.numbers import decimal_commas_as_points, same_number
from vlmenv.envs.rewards.statements import total_of_parts, without_asides
from vlmenv.envs.rewards.terms import BatchTerm
from vlmenv.envs.rewards.units import conversion

LONGEST_ANSWER: Final = 10_000
"""Greatest length of an answer, in characters; longer ones score 0."""


class AnswerAccuracy(BatchTerm):
    """The rightness of answers, each by its target's kind: 1 or 0, and for `edit` the similarity.

    The best match of several accepted answers counts. Mathematical answers are compared in several processes. Answers
    that cannot be read as their kind score 0.
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
            ValueError: A target is no answer of its kind; `read_answer` checks this beforehand.
            ConfigError: There is mathematics to compare, and math-verify is not installed.
        """
        contents = [reply_in(text, answer_format) for text in texts]
        pairs = [
            (i, with_points(content, accepted.text), accepted)
            for i, (content, target) in enumerate(zip(contents, targets, strict=True))
            for accepted in (target, *target.others)
        ]
        found = [_compare(content, accepted) for _, content, accepted in pairs]
        asked = [i for i, score in enumerate(found) if score is None]
        equal = math_equal([_formulas(pairs[i][1] or "", pairs[i][2]) for i in asked]) if asked else []
        for i, is_equal in zip(asked, equal, strict=True):
            found[i] = float(is_equal)
        scores = [0.0] * len(texts)
        for (i, _, _), score in zip(pairs, found, strict=True):
            scores[i] = max(scores[i], score or 0.0)
        return scores


accuracy_term: Final = AnswerAccuracy()


def accuracy_reward(text: str, target: Answer, answer_format: AnswerFormat = AnswerFormat.TAGS) -> float:
    """`AnswerAccuracy` of one completion, in [0, 1]."""
    return accuracy_term.batch([text], [target], [()], answer_format)[0]


def reply_in(text: str, answer_format: AnswerFormat) -> str | None:
    """The answer in a completion; of an object, its text or number.

    It is the value under a key such as "answer", the only value, or the only number: `{"answer": "red", "step": 2}`,
    `{"colour": "red"}`, `{"object": "dog", "count": 3}`.
    """
    content = answer_format.extract(text)
    if content is None or len(content) > LONGEST_ANSWER:
        return content
    content = unframed(content)
    if not (match := _OBJECT.fullmatch(content)):
        return content
    try:
        pairs = json.loads(match[1], parse_int=str, parse_float=str, object_pairs_hook=list)
    except (ValueError, RecursionError):
        pairs = [pair for found in find_values(match[1]) if type(found.value) is dict for pair in found.value.items()]
    pairs = next((value for key, value in pairs if key in CALL_KEYS and isinstance(value, list)), pairs)
    pairs = [pair for pair in pairs if isinstance(pair, tuple)]
    answers = [value for key, value in pairs if re.sub(r"[\W_]+", "", key).lower() in _ANSWER_KEYS]
    pairs = [pair for pair in pairs if not _OF_THINKING.fullmatch(pair[0])]
    if not answers and not any(re.fullmatch("[A-Z]", key) for key, _ in pairs):  # {"A": "cat"} is a letter too
        answers = [value for _, value in pairs if len(pairs) == 1] or _only_number(pairs)
    said = _written(answers[0]) if len(answers) == 1 else None
    return content if said is None else said


def _only_number(pairs: Sequence[tuple[str, object]]) -> list[object]:
    """The value that is a number, if no other one has digits: the count of `{"object": "dog", "count": 3}`."""
    numbers = [value for _, value in pairs if any(map(str.isdigit, str(value)))]
    return numbers if len(numbers) == 1 and _BARE_NUMBER.fullmatch(str(numbers[0])) else []


def _written(value: object) -> str | None:
    """A text, number or truth value as text; None of all else."""
    if isinstance(value, bool | float):
        return str(value).lower().removesuffix(".0")
    return value if isinstance(value, str) else None


_OF_THINKING = re.compile(
    r"(?:step by step )?(?:thoughts?|think(?:ing)?|reason(?:s|ing)?|rationale|explanation|analysis"
    r"|confidence|question|error)",
    re.IGNORECASE,
)
"""Keys whose values are no answers."""
CALL_KEYS: Final = ("arguments", "args", "parameters", "params")
"""Keys under which a call of a tool has what it is called with."""
_OBJECT = re.compile(r"\s*(?:```[a-z]{0,9}\s)?\s*(\{.*\})\s*(?:```)?\s*", re.DOTALL | re.IGNORECASE)
_ANSWER_KEYS: Final = ("answer", "finalanswer", "答案")


def with_points(content: str | None, true: str) -> str | None:
    """An answer with decimal points for decimal commas, if the truth is a number that is not whole."""
    if content is None or "," not in content:
        return content
    truth = read_quantity(true)
    number = truth and truth.form and truth.form.number
    return decimal_commas_as_points(content) if number and (number.step or number.value.denominator > 1) else content


def _compare(content: str | None, target: Answer) -> float | None:
    """The score of an answer; None if it needs computer algebra."""
    truth = parse_reply(target.text, target)
    if truth is None:
        raise ValueError(f"the true answer {target.text[:100]!r} is none of kind '{target.kind}'")
    answer = parse_reply(content, target)
    if answer is None:
        return None if target.kind == "choice" and _may_be_formula(content, target) else 0.0
    if target.kind == "numeric":
        return float(_same_quantity(content or "", target))
    if target.kind == "edit":
        return edit_ratio(str(answer), str(truth))
    if target.kind == "exact":
        return float(says_words(content or "", target.text))
    if target.kind == "math" and answer != truth:
        return 1.0 if _same_number(str(answer), str(truth)) else None
    return float(answer == truth)


def says_words(content: str, true: str) -> bool:
    """Whether a text, or what it concludes, is the true words but for what does not matter, as white space."""
    answer = parse_answer(content, "exact")
    alone = _ONLY_ITEM.fullmatch(content)
    said = (content, str(answer or ""), _said_of(content), alone[1] or alone[2] if alone else "")
    return any(_same_words(one, true) for one in said)


_ONLY_ITEM = re.compile(r"\s*(?:(?:[-*•>]|1\.) ([^\W\d].{0,200})|[(\[]([^()\[\],;]{1,200})[)\]])[.\s]*")
"""The one item of a list, or words in brackets."""
_LONGEST_SENTENCE: Final = 200


def _said_of(content: str) -> str:
    """What a sentence says of its subject: "red" of "The colour is red."; a text that is negated stays."""
    return stated(content) if len(content) <= _LONGEST_SENTENCE else ""


def _same_number(a: str, b: str) -> bool:
    """Whether two texts are plainly the same number; if not, they may still be equal."""
    if not (_BARE_NUMBER.fullmatch(a) and _BARE_NUMBER.fullmatch(b)):
        return False
    number = parse_number(a)
    return number is not None and abs(number) < 2**53 and number == parse_number(b)


def read_answer(
    text: str, kind: AnswerKind | None = None, tolerance: float = 0.0, choices: Sequence[str] = ()
) -> Answer:
    """A true answer from a data set's text.

    Args:
        text: The truth as written there.
        kind: The method of comparison. Default: `choice` if there are choices, for a single capital letter, and for
            several as in "A, C". "yes", "no", "true" and "false" are `yes_no`. A number, also with a unit, is
            `numeric`. All else is `exact`.
        tolerance: For numbers: the greatest difference that counts as equal.
        choices: The meanings of the letters from A on, if known. The truth is then one of these letters, several of
            them, or the text of one of the choices.

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
    kind = ("choice" if choices else _kind_of(text)) if kind is None else kind
    if kind not in get_args(AnswerKind):
        raise ValueError(unknown_name("kind of answer", kind, get_args(AnswerKind)))
    if kind == "choice":
        return _read_choice(text, tuple(choices))
    if choices:
        raise ValueError(f"the row has choices, which answers of kind '{kind}' do not have: leave out one of the two")
    if kind == "math":
        check_installed()
    longest = LONGEST_MATH if kind == "math" else LONGEST_ANSWER
    if len(text) > longest:
        raise ValueError(f"the answer has {len(text)} characters; one of kind '{kind}' may have {longest}")
    if parse_answer(text, kind) is None:
        raise ValueError(f"the answer is {text[:100]!r}, which is no {_NAMES[kind]}")
    return Answer(normalise(text) if kind == "yes_no" else text, kind, tolerance if kind == "numeric" else 0.0)


def read_answers(
    texts: Sequence[str], kind: AnswerKind | None = None, tolerance: float = 0.0, choices: Sequence[str] = ()
) -> Answer:
    """A true answer with several accepted texts; each is read as by `read_answer`.

    Raises:
        ValueError: There is no text, or one is no truth of this kind.
        ConfigError: The kind is mathematics, and math-verify is not installed.
    """
    if not texts:
        raise ValueError("the answer is empty")
    first, *others = dict.fromkeys(read_answer(text, kind, tolerance, choices) for text in texts)
    return first._replace(others=tuple(others))


def _read_choice(text: str, choices: tuple[str, ...]) -> Answer:
    letters = truth_letters(text, choices)
    if letters is not None:
        return Answer(", ".join(letters), "choice", choices=choices)
    if not choices:
        raise ValueError(f"the answer is {text[:100]!r}, which is no {_NAMES['choice']}")
    listed = ", ".join(f"{letter}: {choice[:40]!r}" for letter, choice in zip(LETTERS, choices, strict=False))
    raise ValueError(
        f"the answer is {text[:100]!r}, which is neither one of the letters {LETTERS[0]} to {LETTERS[len(choices) - 1]}"
        f" nor one of the choices: {listed}"
    )


_NAMES: Final[dict[AnswerKind, str]] = {
    "choice": "single letter, or several as in 'A, C'",
    "yes_no": "yes or no",
    "numeric": "single finite number",
    "exact": "text",
    "math": "text",
    "edit": "text",
}


def _kind_of(text: str) -> AnswerKind:
    if _CAPITALS.fullmatch(text):
        return "choice"
    if normalise(text) in ("yes", "no", "true", "false"):
        return "yes_no"
    return "numeric" if _MEASUREMENT.fullmatch(text) and parse_number(text) is not None else "exact"


_CAPITALS = re.compile(r"[(\[]?[A-Z][)\]]?(?:(?: ?[,;/&、，] ?| and )[(\[]?[A-Z][)\]]?)*[.:]?")


def parse_reply(content: str | None, target: Answer) -> str | float | None:
    """`parse_answer` by a target's kind; what a letter stands for is read as that letter."""
    if content is None or target.kind != "choice":
        return parse_answer(content, target.kind)
    several = "," in target.text
    return read_letters(content, target.choices, several, _says_choice) if len(content) <= LONGEST_ANSWER else None


def _may_be_formula(content: str | None, target: Answer) -> bool:
    """Whether an answer may be the true choice, and none of the others, written as another formula."""
    if content is None or not target.choices or "," in target.text:
        return False
    said, choice = _formulas(content, target)
    is_formula = all(0 < len(text) <= _LONGEST_CHOICE and _VALUE.search(text) for text in (said, choice))
    return is_formula and not any(_says_choice(said, other) for other in target.choices)


def _formulas(content: str, target: Answer) -> tuple[str, str]:
    """What computer algebra compares: an answer and the truth, or what is concluded and the true choice."""
    if target.kind != "choice":
        return content, target.text
    text = tidy(content)
    return next((said for said, _ in conclusions(text)), text), target.choices[LETTERS.index(target.text)]


_LONGEST_CHOICE: Final = 300


def _says_choice(said: str, choice: str) -> bool:
    """Whether a text says what a choice says, as far as can be told without algebra."""
    if max(len(said), len(choice)) > _LONGEST_CHOICE or not _VALUE.search(choice):
        return False
    return compare(said, choice, lambda *_: False)


_VALUE = re.compile(r"[\d\\π½¼¾]")


def parse_answer(content: str | None, kind: AnswerKind) -> str | float | None:
    r"""An answer's content, read by its kind; None if that is not possible, or there is none.

    A capital letter for `choice`, "yes" or "no", a number for `numeric`, a normalised string for `exact`. For `math`
    and `edit` it is the text itself, with single spaces. All but these two read the last `\boxed` first, and then the
    text after the last "the answer is".
    """
    if content is None or len(content) > (LONGEST_MATH if kind == "math" else LONGEST_ANSWER):
        return None
    match kind:
        case "choice":
            return read_letters(content)
        case "yes_no":
            return parse_yes_no(content)
        case "numeric":
            return parse_number(content)
        case "exact":
            return normalise(next((sentence(said) for said, _ in conclusions(tidy(content))), content)) or None
        case _:
            return " ".join(content.split()) or None


_YES: Final = r"yes|true|是的?|对的?|正确|有"
_NO: Final = r"no|false|不是的?|否|不对|错误?|没有|不正确"
_YES_OR_NO: Final = rf"(?P<yes>{_YES})|(?P<no>{_NO})"
_WHOLE_YES_NO = re.compile(rf"(?:{_YES_OR_NO})")
_YES_NO_AT_START = re.compile(rf"(?:{_YES_OR_NO})(?=\s*[.,;:!\n–—-](?!\w))")
_YES_NO = re.compile(r"(?<![^\W_])(?:yes|no)(?![^\W_]|['’-]\w)")
_NO_OF_SOMETHING = re.compile(r"\bno (?=[a-z])")
_NO_KNOWLEDGE = re.compile(r"\bno (?:idea|clue|way|information|answer|image|picture|visual|context|response)\b")
_NOT_SO = re.compile(r"(?:\bnot|n't)(?: (?:a|an|the|simply|just|really))? (?:\"?)(?:yes|no)\b")


def parse_yes_no(content: str) -> str | None:
    r"""The "yes" or "no" of an answer; None if it has neither or both. "true" and "是" are yes, "false" and "否" no.

    It is read in the last `\boxed`, after the last "the answer is", as the first word, or as the only one of both.
    """
    if len(content) > LONGEST_ANSWER:
        return None
    text = tidy(content)
    for piece in (*(said for said, _ in conclusions(text)), text):
        said = _yes_no_of(" ".join(piece.casefold().split()))
        if said:
            return said if said in ("yes", "no") else None
    return None


def _yes_no_of(text: str) -> str:
    """What a text says; "both" where that cannot be told, and nothing where it says neither."""
    text = _unquoted(_MARKUP.sub(" ", text).strip())
    if whole := _WHOLE_YES_NO.fullmatch(text):
        return str(whole.lastgroup)
    words = set(_YES_NO.findall(_NO_OF_SOMETHING.sub(" ", text)))
    if start := _YES_NO_AT_START.match(text):
        return str(start.lastgroup) if words <= {start.lastgroup} else "both"
    if _NOT_SO.search(text):
        return "both"
    words |= set(_YES_NO.findall(_NO_KNOWLEDGE.sub(" ", text)))
    return str(words.pop()) if len(words) == 1 else "both" if words else ""


_MARKUP = re.compile(r"\\(?:boxed|fbox|text(?:bf|rm|it)?|math(?:rm|bf)|left|right)(?![A-Za-z])|[*_`${}\"“”\\]")

# Numbers. Possessive quantifiers: what has been taken for digits is not given back, so that 3.5.2 is not 3.5.
_DIGITS: Final = r"(?:(?:[0-9]{1,3}+(?:,[0-9]{3})++|[0-9]++)(?:\.[0-9]++)?+|\.[0-9]++)(?:[eE][+-]?[0-9]++)?+"
_NUMBER = re.compile(
    rf"(?<![\w.,/])([+-]?)({_DIGITS})(?: ?/ ?({_DIGITS}))?+(?!,?[0-9]|\.[0-9]| ?/ ?[0-9])"
    rf"(?= ?(?:{UNIT})| {SPACED_UNIT}|(?! ?[A-Za-z](?![A-Za-z]))(?!\w))"  # 12 cm and 12 dogs, but not 12x, 12², 12 x
)
_BARE_NUMBER = re.compile(rf"([+-]?)({_DIGITS})")
_MEASUREMENT = re.compile(
    rf"[$£€¥₹]? ?[+-]?{_DIGITS}(?: ?/ ?{_DIGITS})?+ ?(?:%|(?:thousand|[mb]illion|trillion)|{UNIT}|{SPACED_UNIT})?"
)
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
_NO_lone_quantity_NUMBER = re.compile(
    r"(?<![A-Za-z])[0-9]|[\\^√π∞|<>≤≥±]|[-+*/] ?#|#(?: ?[+*/×]|\()"  # other digits, and arithmetic
    r"|#!|[-+]\(|[¼-¾⅐-⅞]"  # factorials, signs of brackets, fractions of one sign
    r"|(?i:\b(?:pi|sqrt|root|minus|negative|half|halves|thirds|squared|cubed|log|ln|exp|sin|cos|tan)\b)"
    r"|(?i:\b(?:more|less|fewer|greater|smaller|at least|at most|over|under|up to|not|wrong|incorrect)\b|n['’]t\b)"
    r"|(?i:\b(?:dozen|hundred|thousand|million|billion|trillion)s?\b)"
)


def parse_number(content: str) -> float | None:
    r"""The number in an answer; None where there is none, or several that differ, or one that is not finite.

    The last `\boxed` decides where there is one, then what follows the last "the answer is", else the whole answer.
    "about 12", "12 cm", "$1,234.5$", "-3", "1/2", "\frac{1}{2}", "1e3", "1.5 million" and "x = 12" are numbers. A
    percent sign is read like a unit: "50%" is 50. Expressions such as "2\pi" and number words are not read.
    """
    if bare := _BARE_NUMBER.fullmatch(content[: LONGEST_ANSWER + 1]):
        return _value(bare[1], bare[2], None)  # the same result, sooner: data sets have many
    quantity = read_quantity(content)
    return None if quantity is None else quantity.value


def _asks(text: str) -> bool:
    """Whether a text ends with a question that has words and a number: "Is it 12?"."""
    question = re.split(r"[.!?\n]", text.rstrip('?!*_"). ')[-200:])[-1] if text.rstrip('!*_"). ').endswith("?") else ""
    return any(map(str.isdigit, question)) and re.search("[A-Za-z]{2}", question) is not None


class Quantity(NamedTuple):
    """A number with its unit."""

    value: float
    form: Form | None
    """how it is written, with its unit; None where it was picked out of a sentence without one that can be read"""


@functools.lru_cache(maxsize=4096)
def read_quantity(content: str) -> Quantity | None:
    """The number that an answer states, with its unit; as `parse_number` reads it."""
    if len(content) > LONGEST_ANSWER:
        return None
    text = tidy(content)
    if _asks(text) or _OTHER_DENIAL.search(text):
        return None
    concluded = (sentence(said) for said, _ in conclusions(text))
    text = next((said for said in concluded if any(map(str.isdigit, said))), text)
    text = without_asides(text)
    if found := _stated_quantity(text) or _lone_quantity(text):
        return found
    total = total_of_parts(text) if len(text) <= _LONGEST_QUANTITY else None
    return None if total is None else Quantity(float(total), None)


_OTHER_DENIAL = re.compile(OTHER_DENIAL, re.IGNORECASE)
_LONGEST_QUANTITY: Final = 200
_QUALIFIED = re.compile(
    r"(?i:\b(?:more|less|fewer|greater|smaller|at least|at most|over|under|up to|not|never|wrong|incorrect"
    r"|squared|cubed|dozen|half|halves|thirds)\b|n['’]t\b)|[±≠不非]"
)


def _stated_quantity(text: str) -> Quantity | None:
    """The number that a text is, as a whole or set equal to something."""
    if len(text) > _LONGEST_QUANTITY or _QUALIFIED.search(text):
        return None
    form = read_form(text)
    if form.number is None or form.kind != "number" or (form.equation and not form.name and _LETTER_IN.search(text)):
        return None
    try:
        return Quantity(float(form.number.value), form)
    except OverflowError:
        return None


def whole_quantity(text: str) -> Quantity | None:
    """The number that a text is, perhaps with a unit; None of words that hold one, as "Group 3"."""
    return _stated_quantity(tidy(text))


_LETTER_IN = re.compile(r"(?<!\\)(?<![A-Za-z])[A-Za-z](?![A-Za-z])")


def _lone_quantity(text: str) -> Quantity | None:
    """The only number that a sentence names."""
    for pattern, by in _REWRITTEN:
        text = pattern.sub(by, text)
    text = text.strip("*_ ")
    found = [*_NUMBER.finditer(text)]
    values = {_value(*match.groups()) for match in found}
    value = values.pop() if len(values) == 1 else None
    if value is None or _NO_lone_quantity_NUMBER.search(_NUMBER.sub("#", text)):
        return None
    words = sentence(text[found[-1].start() :][:_LONGEST_QUANTITY]).split()
    tries = (_stated_quantity(" ".join(words[:count]).rstrip(",;:")) for count in (4, 3, 2, 1))
    return next(filter(None, tries), None) or Quantity(value, None)


def _same_quantity(content: str, target: Answer) -> bool:
    """Whether an answer equals the true number within the tolerance, with units converted."""
    answer, truth = read_quantity(content), read_quantity(target.text)
    if answer is None or truth is None:
        return False
    if answer.form and truth.form and answer.form.number and truth.form.number:
        factor = conversion(answer.form.unit, truth.form.unit)
        if factor is None:
            return False
        number = answer.form.number
        number = number._replace(value=number.value * factor, step=number.step and number.step * factor)
        if same_number(number, truth.form.number):
            return True
        answer = answer._replace(value=answer.value * float(factor))
    return abs(answer.value - truth.value) <= target.tolerance + 1e-12 * abs(truth.value)


def _value(sign: str, over: str, under: str | None) -> float | None:
    value = float((sign + over).replace(",", ""))
    if under is not None:
        value /= float(under.replace(",", "")) or math.nan
    return value if math.isfinite(value) else None


_WRAPPED = re.compile(r"\\(?:boxed|fbox|text(?:bf|rm|it)?|mathrm) ?\{(.*)\}|\$(.*)\$")
_ARTICLE = re.compile(r"(?:an?|the) (?=.)")
_QUOTES: Final = str.maketrans(
    dict.fromkeys("‘’‛′`´", "'") | dict.fromkeys("“”„«»「」『』《》", '"') | {"、": ",", "。": "."}
)


def normalise(content: str) -> str:
    """A string for comparison: casefolded, in NFKC, with single spaces, without punctuation and articles around it.

    Signs that may mean something stay: "-3" is not "3", nor "c++" "c". At most 10,000 characters are looked at.
    """
    text = unicodedata.normalize("NFKC", content[:LONGEST_ANSWER]).translate(_QUOTES)
    text = " ".join(text.casefold().split())
    for _ in range(2):  # \boxed{\text{…}}
        if wrapped := _WRAPPED.fullmatch(text):
            text = (wrapped[1] or wrapped[2] or "").strip()
    bare = _unquoted(text)
    if article := _ARTICLE.match(bare):
        bare = _unquoted(bare[article.end() :])
    return bare or text


def _unquoted(text: str) -> str:
    return text.lstrip("\"'*_ ").rstrip("\"'*_.,;:!? ")


_COMMA = re.compile(r" ?, ?")
_DASH = re.compile(r"(?<=\d) ?[-‐-―] ?(?=\d)")
_HALF_DAY = re.compile(r"(?<=\d) ?([ap])\.? ?m\b\.?")  # 10:10 a.m.
_BRACKETS: Final = ("[]", "()", "{}")


def _same_words(answer: str, truth: str) -> bool:
    """Whether two texts are the same but for what `normalise` leaves out; a list may be without its brackets."""
    a, b = (_HALF_DAY.sub(r" \1m", _DASH.sub("-", _COMMA.sub(", ", normalise(text)))) for text in (answer, truth))
    return a == b or (bool(a) and (_unbracketed(a) == b or a == _unbracketed(b)))


def _unbracketed(text: str) -> str:
    is_list = len(text) > 2 and text[0] + text[-1] in _BRACKETS and "," in text
    return text[1:-1].strip() if is_list and not any(bracket in text[1:-1] for bracket in "[](){}") else text


def edit_ratio(a: str, b: str) -> float:
    """1 - Levenshtein distance / characters of the longer one, in [0, 1]; 0 for different texts of over 10,000."""
    if a == b:
        return 1.0
    longest = max(len(a), len(b))
    return 0.0 if longest > LONGEST_ANSWER else 1 - edit_distance(a, b) / longest


def edit_distance(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Levenshtein distance of two texts, or of two lists of words.

    By Myers' bit-parallel algorithm (Journal of the ACM 46, 1999), in Hyyrö's form for whole strings.
    """
    a, b = (a, b) if len(a) >= len(b) else (b, a)
    if not b:
        return len(a)
    places: dict[Hashable, int] = {}
    for i, item in enumerate(a):
        places[item] = places.get(item, 0) | 1 << i
    everywhere = (1 << len(a)) - 1
    up, down, distance = everywhere, 0, len(a)  # bits: where the distance rises and falls along `a`
    for item in b:
        same = places.get(item, 0)
        diagonal = (((same & up) + up) ^ up) | same | down
        rises, falls = down | ~(diagonal | up) & everywhere, up & diagonal
        distance += (rises >> len(a) - 1 & 1) - (falls >> len(a) - 1)
        rises, falls = rises << 1 | 1, falls << 1
        up, down = (falls | ~(diagonal | rises)) & everywhere, rises & diagonal
    return distance
