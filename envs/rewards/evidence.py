r"""Finds the conclusion of an answer: the last `\boxed`, then the text after the last "the answer is"."""

from __future__ import annotations

import itertools
import re
import unicodedata
from typing import Final, NamedTuple

MARK: Final = "\ue0ff"
"""A private character that stands for a thing named, where only its surroundings matter."""

_FIRST, _LAST = "\ue000", MARK
MARKS: Final = rf"[{_FIRST}-{_LAST}]"
"""A pattern of the characters that stand for things named."""

_PLAIN: Final[dict[int, int | str | None]] = {
    **{code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)},  # full-width forms
    **{code: code - 0x24B6 + ord("A") for code in range(0x24B6, 0x24D0)},  # letters in circles
    **{code: code - 0x24D0 + ord("a") for code in range(0x24D0, 0x24EA)},
    **dict.fromkeys(range(0xE000, 0xE100), " "),  # what stands for things named, here
    0x2212: "-",
    0x3000: " ",
    0xA0: " ",
    0x3001: ",",
    0x3002: ".",
    0x3010: "[",
    0x3011: "]",
    0x2019: "'",
    **dict.fromkeys((0x200B, 0x200C, 0x200D, 0xFEFF), None),
}
_HAN: Final = "\u2e80-\u2fff\u3005-\u9fff\uf900-\ufaff"
_SEAM = re.compile(rf"(?<=[{_HAN}])(?=[A-Za-z0-9$\\(])|(?<=[A-Za-z0-9$)}}])(?=[{_HAN}])|(?<=[0-9])(?=[\uac00-\ud7af])")
_TAG = re.compile(
    r"</?(?:b|i|u|s|p|em|strong|span|div|br|hr|font|center|code|pre|mark|small|big|h[1-6]|li|ul|ol)"
    r"(?: [^<>]{0,100})?/?>",
    re.IGNORECASE,
)
_EMPHASIS = re.compile(r"(?<![\w)])\*\*|\*\*(?![\w(])|__|`|#{2,}")
_SPACE = re.compile(r"[^\S\n]+")
_LINES = re.compile(r" ?\n[\s]*")


def tidy(content: str) -> str:
    """A text in plain signs, without tags of HTML and Markdown's emphasis; spaces are single, lines are kept.

    Between Chinese characters and letters or digits a space is put.
    """
    text = _EMPHASIS.sub(" ", _TAG.sub(" ", _ACCENTED.sub(_composed, content.translate(_PLAIN))))
    return _LINES.sub("\n", _SPACE.sub(" ", _SEAM.sub(" ", text))).strip()


_ACCENTED = re.compile(r"[^\W\d_][\u0300-\u036f]+")


def _composed(match: re.Match[str]) -> str:
    """A letter with its accents as one letter, so that no word ends before an accent; or two, if there is none."""
    letter = unicodedata.normalize("NFC", match[0][:2])
    return letter if len(letter) == 1 else f"{match[0][0]}ː"


_EXPLANATION = re.compile(
    r"^[ \t*_#>-]{0,9}(?:explanations?|reason(?:s|ing)?|rationale|justification|note|breakdown|confidence"
    r"|解释|理由|说明|解析)[*_ ]{0,5}[:：]",
    re.IGNORECASE | re.MULTILINE,
)
_ANSWERS = re.compile(r"\\boxed|\banswers?\b|答案", re.IGNORECASE)
_COURTESY = re.compile(
    r"(?:\n|(?<=[.!$}]) )\s{0,9}(?:I hope|(?:please )?let me know|if you (?:have|need|want|would)|feel free"
    r"|hope (?:this|that)|thank)\b[^\d\n]*\Z",
    re.IGNORECASE,
)
_IN_TAGS = re.compile(r"\s*<([a-z_]{1,20})>([^<>]*)</\1>\s*", re.IGNORECASE)


def unframed(text: str) -> str:
    """An answer without what stands around it: a pair of tags, a line of courtesy at the end, an explanation.

    The explanation begins on a line with "Explanation:", "Confidence:" or the like. It stays if an answer stands after
    that.
    """
    text = _COURTESY.sub("", text)
    tagged = _IN_TAGS.fullmatch(text)
    text = tagged[2] if tagged else text
    found = _EXPLANATION.search(text) if "\n" in text else None
    before = text[: found.start()] if found else ""
    return before if found and before.strip() and not _ANSWERS.search(text, found.end()) else text


class Conclusion(NamedTuple):
    """What a text concludes."""

    text: str
    is_boxed: bool


def conclusions(text: str) -> list[Conclusion]:
    r"""The conclusions of a tidy text, the strongest first: the last `\boxed`, the text after the last "the answer is".

    A box goes before an "answer is" that comes before it. What is denied, as in "not \boxed{A}" or "\boxed{A} is
    wrong", is left out. Boxes that stand side by side, as in "\boxed{A} or \boxed{B}", come as one.
    """
    boxes = last_boxes(text)
    boxed = _boxed(text, boxes)
    led_in = _led_in(text, boxes[-1].end if boxed else 0)
    return [Conclusion(*found) for found in ((boxed, True), (led_in, False)) if found[0]]


def sentence(text: str) -> str:
    """The first sentence of a text."""
    return _SENTENCE_END.split(text, maxsplit=1)[0].strip()


_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")


class Box(NamedTuple):
    r"""A `\boxed{…}` in a text."""

    start: int
    end: int
    content: str


_COMMAND: Final = r"(?:\\(?:boxed|fbox)(?![A-Za-z])|\x08oxed)\s*"
_BRACE = re.compile(
    rf"(?P<box>{_COMMAND}\{{)|{_COMMAND}(?P<bare>(?!\{{)[^\s$,;{{}}]+(?:\{{[^{{}}]*\}}){{0,2}})"
    r"|\\[{}]|(?P<open>\{)|(?P<close>\})"
)
JOINS: Final = r"(?:[,;/|&+]|\\text\s*\{\s*(?:or|and)\s*\}|\bor\b|\band\b|或|和|与)"
"""A pattern of what joins several answers."""
_BETWEEN = re.compile(rf"(?:[\s$.]|\\[()\[\]]|{JOINS})*+")
_OR = re.compile(r"\bor\b|或")
_ALSO_AFTER = re.compile(
    r"[\s$]*(?:(?:or|或|/) ?[^.;!?\n]{1,80}|(?:,|and|&|和|与) ?\(?[A-Za-z0-9.]{1,9}\)?(?=[\s.,;!?]|$))"
)
_ALSO_BEFORE = re.compile(r"(?<![^\s(])\(?(?:[A-Za-z]|[0-9.]{1,20})\)?[\s$]*(?:or|and|或|和|,|/)[\s$]*$")


def find_boxes(text: str) -> list[Box]:
    r"""The outermost `\boxed{…}` in a text; an unclosed one ends with its line. The braces may be missing."""
    boxes: list[Box] = []
    opened: list[re.Match[str]] = []
    outer: re.Match[str] | None = None
    for brace in _BRACE.finditer(text):
        if brace["bare"] and outer is None:
            boxes.append(Box(brace.start(), brace.end(), brace["bare"]))
        elif brace["box"] or brace["open"]:
            opened.append(brace)
            outer = brace if outer is None and brace["box"] else outer
        elif brace["close"] and opened and opened.pop() is outer and outer is not None:
            boxes.append(Box(outer.start(), brace.end(), text[outer.end() : brace.start()]))
            outer = None
    if outer is not None:
        end = (text + "\n").index("\n", outer.end())
        boxes.append(Box(outer.start(), end, text[outer.end() : end]))
    return boxes


def last_boxes(text: str) -> list[Box]:
    r"""The last `\boxed{…}`, with those before it that are joined to it, as in "\boxed{3} or \boxed{4}"."""
    boxes = find_boxes(text)
    first = max(0, len(boxes) - 1)
    while first and _BETWEEN.fullmatch(text, boxes[first - 1].end, boxes[first].start):
        first -= 1
    return boxes[first:]


def _boxed(text: str, boxes: list[Box]) -> str:
    if not boxes:
        return ""
    parts = dict.fromkeys(box.content.strip() for box in boxes)
    is_or = _OR.search(text[boxes[0].end : boxes[-1].start]) if len(parts) > 1 else None
    before, after = text[: boxes[0].start], text[boxes[-1].end :]
    if denied(before.rstrip("$ "), after.lstrip("$ ")):
        return ""
    also_before, also_after = _ALSO_BEFORE.search(before[-30:]), _ALSO_AFTER.match(after)
    around = [match[0] if match else "" for match in (also_before, also_after)]
    return f"{around[0]}{(' or ' if is_or else ', ').join(parts)}{around[1]}".strip()


OTHER_LEAD_IN: Final = (
    r"(?i:\b(?:respuesta|resposta|antwort|ergebnis|réponse|risposta|ответ)"
    r"(?: (?:correct[ae]?|corret[ta]{1,2}|finale?))?"
    r"(?: (?:es|é|ist|lautet|est|è)(?= )(?: ?:)?| ?:)|(?:答え|正解) ?[は:]|(?:정답|답) ?[은:])"
)
"""A pattern of "the answer is" in Spanish, Portuguese, German, French, Italian, Russian, Japanese and Korean."""
OTHER_DENIAL: Final = r"(?:\b(?:nicht|keine?|no (?:es|son|hay)|pas|não|non è|не)\b|ではな|じゃな|아니)"
"""A pattern of "not" in these languages."""
COPULA_AT_END = re.compile(r"(?<=\S) ?(?:です|だ|입니다|이다)(?=[.!。\s]*$)")
_LEAD_IN = re.compile(
    r"\b(?i:answers?|ans\.?"
    r"|(?:correct|right|best|closest|nearest|final|chosen|most (?:\w+ )?\w+) (?:\w+ )?(?:option|choice)s?)"
    r"(?:,[^.,:;\n]{1,60},| (?i:among|from)\b[^.:;\n]{0,60}?"
    r"| (?i:to|of|for|here|that|which)\b[^.,:;\n]{0,60}?)?"
    r"(?: ?(?:(?i:is|are|would be|should be|must be|will be)\b(?: (?i:that|thus|therefore)\b)? ?:?|[:=])|(?=\n))"
    r"|\b(?i:correspond(?:s|ing)|match(?:es|ing)|(?:choose|select|pick|go(?:ing)? with))(?: to| with)?"
    r"(?= (?i:option|choice)\b)"
    r"|\b(?i:is|are) (?i:option|choice):(?=\s)"
    r"|\b(?i:but|actually|so|hence|therefore|thus),? (?i:it|this|that)(?: ?['’]s| (?i:is|must be|has to be))"
    r"(?= [(\[]?[A-Z][)\]]?(?:[.,;!]|\n|\Z))"
    r"|(?:答案|结果|答)(?:应该|应当|应|就)?(?:(?:是|为|选)? ?:|(?:是|为|选)(?=\s*[^\s.]))"
    r"|(?:故|应|应该|本题|因此|所以|我|正确)选(?!项)择?(?:项)?(?:是|为)?:?"
    rf"|{OTHER_LEAD_IN}"
)
_AGAINST_LEAD_IN = re.compile(r"(?i:\b(?:not|wrong|incorrect|false|never|cannot)\b|n['’]t\b|错误|不)[^.,;:!?\n]*\Z")


def _led_in(text: str, start: int) -> str:
    last = ""
    for match in _LEAD_IN.finditer(text, start):
        if not _AGAINST_LEAD_IN.search(text[max(0, match.start() - 60) : match.start()]):
            last = _first_lines(text[match.end() :].lstrip()) or last
    return COPULA_AT_END.sub("", _within(last))


def _within(text: str) -> str:
    r"""A text up to a brace that was opened before it, as in "\text{Answer: I}"."""
    depth = 0
    for place, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth < 0:
            return text[:place].rstrip()
    return text


_LISTED_LINE = re.compile(r"[^\n]{1,12}|[(\[]?[A-Za-z0-9][)\].:] ?[^\n]*")


def _first_lines(text: str) -> str:
    """The first line of a text, and those after it that may be of a list with it."""
    first, *rest = text.split("\n")
    listed = itertools.takewhile(_LISTED_LINE.fullmatch, rest)
    return "\n".join([first, *listed])


# What is denied. The patterns are tried on texts in which marks stand for what is named.
_ALIKE: Final = rf"{MARKS}(?:(?:\s?,\s?{MARKS}){{0,25}}\s?,?\s?(?:\b(?:or|nor|and)\b|或|和|与)\s?{MARKS})?"
_BREAK: Final = rf"{MARKS}|\b(?:but|so|therefore|hence|because|since)\b|但|所以|因此|而是"
_CLAUSE: Final = rf"(?:(?!{_BREAK})[^.,;:!?\n]){{0,80}}?"
# "could not have been used is A" names A, other than "I do not think it is A".
_PHRASE: Final = rf"(?:(?!{_BREAK}|\b(?:is|are|was|were)\b|是)[^.,;:!?\n]){{0,60}}?"
_DENIED_BEFORE = re.compile(
    r"(?i:(?:(?:\bnot|n['’]t) (?:think|believe|say|mean|feel|agree|claim|see how|true|the case|likely"
    r"|possible|correct|right)\b"
    rf"|\b(?:doubt|unlikely|impossible)\b){_CLAUSE}{_ALIKE}"
    r"|(?:\b(?:not|never|neither|nor|cannot|except|excluding|excludes?|rejects?|eliminates?|dismiss|unlike"
    r"|rather than|instead of|other than|as opposed to|(?:any|every|all)(?:thing|one)? (?:but|except)"
    r"|rul(?:e|es|ed|ing) out)\b|n['’]t\b"
    rf"|{OTHER_DENIAL}|不(?:是|选|为|能|会|可能|应该?)(?:是|选)?|并非|排除|除了)"
    rf"{_PHRASE}{_ALIKE}"
    rf"|(?:\b(?:wrong|incorrect)\b|错误)[^.,;!?\n]{{0,30}}?{_ALIKE})"
)
_DENIED_AFTER = re.compile(
    rf"{_ALIKE}[\s$)\]}}'\"]*"
    r"(?i:(?:\((?:is )?|, ?|[-–—] ?)?(?:(?:is|are|was|were|seems?|looks?|must be|would be|has to be|clearly|definitely"
    r"|certainly|obviously|simply|just|also|both|all)\s){0,3}(?:wrong|incorrect|false|impossible|invalid|excluded|eliminated"
    r"|rejected|ruled out|out of the question|untrue)\b"
    r"|(?:is|are|was|were)(?: (?:definitely|clearly|certainly|obviously|simply))?(?:n['’]t| not| never)"
    r"(?: (?:the|a|an))?(?: (?:definitely|necessarily|quite))?"
    r"(?: (?:right|correct|true|it|possible|valid|acceptable|what|answers?|choices?|options?|best|one)\b|[.,;!]|$)"
    r"|(?:cannot|can not|can['’]t|could not|couldn['’]t|won['’]t|must not|mustn['’]t|should not|shouldn['’]t|would not"
    r"|wouldn['’]t)\b"
    r"|(?:does|do|did)(?: not|n['’]t) (?:fit|match|work|hold|apply|satisfy|make sense|qualify|seem right|look right)"
    r"|(?:can|must|should|could|may|has to|is to) be (?:ruled out|excluded|eliminated|rejected|discarded|dismissed)"
    r"|\? ?(?:no\b|not\b|wrong\b|nope\b))"
    rf"|{_ALIKE}[\s$)\]}}'\"]*(?:选项|项|答案)?\s*(?:是|为)?(?:不对|不正确|错|不符|排除|不成立|不可能|不是|不选|不合)"
    rf"|{_ALIKE} ?(?:では|じゃ|[이가] )?(?:な[いく]|아니)"
)


def without_denied(text: str) -> str:
    """A text with marks, without negated ones: "not A", "A is wrong"."""
    return _DENIED_AFTER.sub(" ", _DENIED_BEFORE.sub(" ", text))


def denied(before: str, after: str) -> bool:
    """Whether the text between two others negates them."""
    return MARK not in without_denied(f"{before[-100:]} {MARK} {after[:100]}")
