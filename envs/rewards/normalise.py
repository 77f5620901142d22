r"""Normalises answers; the same for true answers and for a model's.

`fold` writes Unicode forms in plain characters, `boxed` finds the last `\boxed`, and `undelimited` removes marks of
mathematics. `stated` applies all of these and removes lead-ins: "So the answer is $５$." states "5".
"""

from __future__ import annotations

import re
import unicodedata
from typing import Final

from vlmenv.envs.rewards.evidence import COPULA_AT_END, JOINS, OTHER_LEAD_IN, denied, last_boxes
from vlmenv.envs.rewards.statements import states_another, without_asides
from vlmenv.envs.rewards.units import is_unit

_SUPERSCRIPTS: Final = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ", "0123456789+-=()ni", strict=True))
_SUBSCRIPTS: Final = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋", "0123456789+-", strict=True))
_SUPERSCRIPT = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_SUBSCRIPT = re.compile(f"[{''.join(_SUBSCRIPTS)}]+")
_FRACTION = re.compile(r"([\d^_√/]?) *([¼-¾⅐-⅞])( ?[\^!])?", re.ASCII)
# Before NFKC, which would make º an o.
_SIGNS: Final = str.maketrans(
    dict.fromkeys("−–‐‑‒﹣－", "-")
    | dict.fromkeys("º˚", "°")
    | dict.fromkeys("’‘′ʹ`´", "'")
    | dict.fromkeys("“”„«»", '"')
    | dict.fromkeys("∶꞉", ":")
    | dict.fromkeys("⋅∙•・", "·")
    | dict.fromkeys("∕⁄", "/")
    | dict.fromkeys("、，", ",")
    | dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", "")
    | {"。": ".", "￥": "¥", "〔": "(", "〕": ")", "【": "[", "】": "]", "⩽": "≤", "⩾": "≥", "≦": "≤", "≧": "≥"}
)


def fold(text: str) -> str:
    """A text in plain characters: full-width and mathematical letters, digits of all scripts, signs and quotes.

    Superscripts become `^{…}` and subscripts `_{…}`, fractions of one sign `a/b`, with a space after a whole number.
    """
    if text.isascii():
        return text
    text = _SUPERSCRIPT.sub(lambda match: f"^{{{''.join(map(_SUPERSCRIPTS.__getitem__, match[0]))}}}", text)
    text = _SUBSCRIPT.sub(lambda match: f"_{{{''.join(map(_SUBSCRIPTS.__getitem__, match[0]))}}}", text)
    text = unicodedata.normalize("NFKC", _FRACTION.sub(_written_out, text.translate(_SIGNS)))
    return "".join(map(_digit, text.translate(_SIGNS)))


def _written_out(match: re.Match[str]) -> str:
    parts = unicodedata.normalize("NFKC", match[2]).replace("⁄", "/")
    before, after = match[1], match[3] or ""
    if before in ("^", "_", "√"):
        return f"{before}{{{parts}}}{after}"
    if before == "/" or (after and not before):
        return f"{before}({parts}){after}"
    return f"{before} {parts}{after}" if before else parts


def _digit(character: str) -> str:
    if character.isascii() or not character.isdecimal():
        return character
    return str(unicodedata.decimal(character))


_MORE = re.compile(rf"(?:[ $]|\\[)\]])*+{JOINS}(?:[ $]|{JOINS})*+(?=[\\\d(\[{{+-])")
_EQUALS_AT_END = re.compile(r"(?:=|\\approx|≈)[\s${]*$")
_DEEPEST: Final = 4
"""Boxes within boxes that are opened."""


def boxed(text: str) -> str | None:
    r"""The content of the last `\boxed` or `\fbox`; None if there is none, or it is denied ("not \boxed{3}").

    Joined boxes ("\boxed{3} or \boxed{4}", also without a word between) are one list: "3, 4". So is a box with values
    joined to it by "or", "and" or a comma.
    """
    whole = _outermost(text)
    for _ in range(_DEEPEST):
        if whole is None or (inner := _outermost(whole)) is None:
            break
        whole = inner
    return whole


def _outermost(text: str) -> str | None:
    boxes = last_boxes(text)
    if not boxes:
        return None
    before, after = text[: boxes[0].start], text[boxes[-1].end :]
    if denied("" if _EQUALS_AT_END.search(before[-20:]) else before.rstrip("$ "), after.lstrip("$ ")):
        return None
    parts = [box.content for box in boxes]
    if more := _MORE.match(after):
        parts.append(undelimited(after[more.end() :]))
    elif is_unit(tail := _bare(undelimited(after))):
        parts[-1] += f" {tail}"
    return " ".join(", ".join(dict.fromkeys(part.strip() for part in parts)).split())


_CURRENCY = re.compile(r"(?<![\\$])\$(?= ?[\d.])")
_DELIMITER = re.compile(
    r"(?<!\\)\$|\\[()\[\]]|\\(?:begin|end)\{(?:equation|align(?:ed)?|split|displaymath|math|gather)\*?\}"
)
_ALIGNED = re.compile(r"\\begin\{(?:align(?:ed)?|split)\*?\}")
_SPACING = re.compile(
    r"(?<!\\)\\(?:displaystyle|textstyle|limits|quad|qquad|enspace|thinspace|!|,|;|:|>| |left(?![A-Za-z])"
    r"|right(?![A-Za-z])"
    r"|[bB]ig+[lr]?(?![A-Za-z]))|~"
)


def undelimited(text: str) -> str:
    r"""A text without `$`, `\(`, `\[` and other marks of mathematics, and with single spaces; `\$` stays.

    A single `$` before a number is a currency's, and becomes `\$`.
    """
    if "matrix}" in text or "{array}" in text:
        text = _plain_matrices(text)
    if _ALIGNED.search(text):
        text = text.replace("&", " ").replace("\\\\", " ")
    if len(re.findall(r"(?<!\\)\$", text)) % 2:
        text = _CURRENCY.sub(r"\\$", text, count=1)
    return " ".join(_SPACING.sub(" ", _DELIMITER.sub(" ", text)).split())


_ENVIRONMENT: Final = r"\{ ?(?:[pbB]|small)?matrix\*? ?\}|\{ ?array ?\} ?(?:\[\w\] ?)?\{[^{}]{0,40}\}"
_MATRIX_BEGINS = re.compile(rf"(?:\\left ?)?(?:[(\[]|\\[{{\[(])?\s*\\begin ?(?:{_ENVIRONMENT})")
_MATRIX_ENDS = re.compile(
    r"(?:\s|\\\\|\\cr)*\\end ?\{ ?(?:array|(?:[pbB]|small)?matrix\*?) ?\}\s*(?:(?:\\right ?)?(?:[)\]]|\\[}\])]))?"
)
_ROW_ENDS = re.compile(r"\\\\(?: ?\[ ?-?[\d.]+ ?(?:pt|em|ex|mm|cm) ?\])?|\\cr(?![A-Za-z])")


def _plain_matrices(text: str) -> str:
    r"""A text with `\begin{pmatrix}` for the other environments of matrices, within brackets or not."""
    text = _MATRIX_ENDS.sub(lambda _: r"\end{pmatrix}", _MATRIX_BEGINS.sub(lambda _: r"\begin{pmatrix}", text))
    return _ROW_ENDS.sub(lambda _: r"\\ ", text)


_AFTER_ALL: Final = re.compile(
    r"(?<![ ,])[ ,]*+\b(?:is|are|as) (?:the|my|our) (?:\w+ )?(?:answer|result|solution|value|choice)s?[ .!]*$",
    re.IGNORECASE,
)
_MINUS = re.compile(
    r"\b(?:minus|negative) (?=\d|\\frac|\\sqrt|\.\d|infinity|\\infty|∞)(?<!\d minus )(?<!\d negative )", re.IGNORECASE
)
_LEAD_IN = re.compile(
    r"^.*(?:\b(?:is|are|was|be|equals?(?: to)?|gives?|gets?|have|has|obtain|finds?|yields?|becomes|approximately|about"
    r"|roughly|around|therefore|thus|hence|so|then|exactly|answer|there are|there is|total of|totals|measures"
    r"|results? in|takes|needs|costs|requires|contains|weighs|lasts|it's|that's"
    r"|(?:shows?|showed|reads?|reach(?:es|ed)?|counts?|see|value of)(?= \d)"
    r"|(?:comes?|amounts?|evaluates?|simplifies|simplify|reduces?|leads?|rounds?|adds? up|works? out"
    r"|grows?|grew|rises?|rose|falls?|fell|drop(?:s|ped)?)"
    r" to)\b[:,]?"
    r"|(?<=[a-z)][a-z)])\*{0,2}:\*{0,2})"
    r" *(?=[^\s)\]}])",
    re.IGNORECASE,
)
_CHINESE_LEAD_IN = re.compile(
    r"^.*(?:(?<![不非])(?:是|为|為)|等于|等於|答案|答|得到?|共有?|总共|一共|有|约|大约|所以|因此|故选?|则|即|填|选择?|选项|(?<=[\u4e00-\u9fff]):)[:,]?"
    r" *(?=[-+$\\\d(\[{√π∠A-Za-z.≈=])"
)
_CHINESE_ANSWER = re.compile(r"^.*答案(?:应该?|就)?(?:是|为|:)+ *(?=[\u4e00-\u9fff])")
_OTHER_LEAD_IN = re.compile(rf"^.*{OTHER_LEAD_IN} *(?=\S)")
_NEGATIVE = re.compile(r"负(?= ?[\d.\\∞无])")
_HAS_CHINESE = re.compile(r"[\u4e00-\u9fff]")
_NEGATION = re.compile(
    r"\b(?:not|never|neither|nor|cannot|wrong|incorrect|except|unlikely)\b|n't\b|[不非没]", re.IGNORECASE
)
_ALTERNATIVE = re.compile(r"[\d})]\W{0,5}\bor\b|\beither\b|[\d})]\W{0,5}或", re.IGNORECASE)
_CLAUSE = re.compile(r"[.;!?,]+(?:\s|$)")
_MARKUP: Final = "*_`'\" "


def without_lead_in(text: str) -> str:
    """What follows the last "is", "answer:", "so", "答案是" or the like; all of a text without one.

    A text is returned unchanged if it is negated ("is not", "it cannot be that …"), names an alternative by "or", or
    states another number before, without a conclusion ("5 people, and it has 2 dogs"). It then states nothing definite.
    """
    text = COPULA_AT_END.sub("", _NEGATIVE.sub("-", _MINUS.sub("-", _AFTER_ALL.sub("", text))))
    text = _after(_OTHER_LEAD_IN, text)
    for pattern in (_CHINESE_ANSWER, _CHINESE_LEAD_IN, _LEAD_IN) if _HAS_CHINESE.search(text) else (_LEAD_IN,):
        text = _after(pattern, text)
    return text


def _after(lead_in: re.Pattern[str], text: str) -> str:
    match = lead_in.match(text)
    if match is None:
        return text
    clause = _CLAUSE.split(match[0].rstrip(" :,"))[-1]
    said = text[match.end() :]
    if _NEGATION.search(clause) or _ALTERNATIVE.search(match[0]) or states_another(match[0], said):
        return text
    return said


def stated(text: str) -> str:
    r"""What an answer states, in plain characters and without what surrounds it.

    The last `\boxed` where there is one, and else what follows the last lead-in ("the answer is", "答案是"); without
    delimiters, Markdown, quotes, and punctuation at the end.
    """
    text = primes(in_plain_words(fold(text)))
    box = boxed(text)
    if box is None and _EXCLAMATION.search(text):
        text = text.rstrip("! ")
    return _bare(without_lead_in(without_asides(_bare(undelimited(text if box is None else box)))))


_EXCLAMATION = re.compile(r"[A-Za-z]{2} .*! *$", re.DOTALL)  # and no factorial
_MARKED = re.compile(r"^#{1,6} |</?[bi]>|(?<![\w)}])\*\*(?=[^*]*\*\*)|(?<=[^* ])\*\*(?![\w({])")


def _bare(text: str) -> str:
    text = _without_quotes(_MARKED.sub("", text))
    return _without_quotes(text.rstrip(".,;? ")) if not text.endswith("...") else text


_ENDS_IN_PRIME = re.compile(r"[^'\"]*(?:(?<![A-Za-z]{2})[A-Za-z]|[)}])'+[.,;? ]*")


def _without_quotes(text: str) -> str:
    return text.strip("*_` " if _ENDS_IN_PRIME.fullmatch(text) else _MARKUP)


_PRIME_COMMAND = re.compile(r" ?\^ ?(?:\{ ?((?:(?:\\prime|') ?)+)\}|(\\prime(?![A-Za-z])))")
_PRIMES = re.compile(r"(?<![\w.\\^{])((?:\d+\.)?\d+)(\$? ?)(''|\"|'(?!\d{3}(?!\d)|[A-Za-z]))(?!')")
_QUOTE_BEFORE = re.compile(r"(?:^|[\s(:=])['\"]+[^'\"]*$")


def primes(text: str) -> str:
    """A text with `′` for the primes of minutes or feet after a number, and `″` for those of seconds or inches.

    Primes of functions and points stay `'`, as do quotes around a number, and marks between thousands.
    """
    text = _PRIME_COMMAND.sub(
        lambda match: "'" * ((match[1] or match[2]).count("\\prime") or match[1].count("'")), text
    )
    return _PRIMES.sub(_prime, text) if "'" in text or '"' in text else text


def _prime(match: re.Match[str]) -> str:
    if _QUOTE_BEFORE.search(match.string[: match.start()]):
        return match[0]
    return f"{match[1]}{'′' if match[3] == chr(39) else '″'}{match[2].rstrip()}"


_IN_WORDS = re.compile(
    r"\\(?:text(?:normal|rm|bf|it)?|math(?:rm|bf|it|sf)|mbox|operatorname|hbox|unit|si)(?![A-Za-z])"
    r" *\{((?:[^{}]|\{[^{}]*\})*)\}"
)


def in_plain_words(text: str) -> str:
    r"""A text with what stands in `\text{…}`, `\mathrm{…}` and their kind as it is."""
    for _ in range(2):
        text = _IN_WORDS.sub(r" \1 ", text)
    return text
