"""Reads the choices that an answer names, by letter or by their text."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable
from typing import Final, NamedTuple

from vlmenv.envs.rewards.evidence import conclusions, tidy, without_denied

LETTERS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_LETTER_MARK, _CHOICE_MARK = 0xE000, 0xE020  # of A; private characters that stand for what is named
_LETTER: Final = "[\ue000-\ue019]"
_CHOICE: Final = "[\ue020-\ue039]"
_MARK: Final = f"(?:{_LETTER}|{_CHOICE})"
_HEDGE: Final = "?"


@functools.lru_cache(maxsize=4096)
class Offer:
    """Choices that are offered.

    Args:
        choices: The meanings of the letters from A on. If unknown, every letter is offered.
        same: Whether a text says the same as a choice, beyond how both are written.
    """

    def __init__(self, choices: tuple[str, ...] = (), same: Callable[[str, str], bool] | None = None) -> None:
        self._same, self._texts = same, choices
        keys = [key(choice) or f"({i})" for i, choice in enumerate(choices)]
        self._first = {letter: LETTERS[keys.index(written)] for letter, written in zip(LETTERS, keys, strict=False)}
        self.letters = LETTERS[: len(choices)] or LETTERS
        self._written = {written: LETTERS[i] for i, written in reversed([*enumerate(keys)])}
        self._forms = _forms_of(self.letters)

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        return _pattern_of(self._texts, self.letters)

    @functools.cached_property
    def _lists(self) -> dict[int, tuple[str, ...]]:
        return _lists_of(self._texts)

    @functools.cached_property
    def _joined(self) -> re.Pattern[str] | None:
        return _pattern_of_lists(self._lists)

    def letter(self, letter: str) -> str:
        """The first letter that stands for the same choice."""
        return self._first.get(letter, letter)

    def letters_of(self, content: str, several: bool = False) -> str | None:
        """As `read_letters`."""
        text = tidy(content)
        concluded = conclusions(text)
        for piece, _ in concluded:
            if named := self._named(bare(piece), several):
                return _decided(named, several)
        if (last := _LAST_LINE.search(text)) and (label := self._labelled(bare(last[1]))):
            return label
        if self._texts and any(is_boxed or _IS_VALUE.search(piece) for piece, is_boxed in concluded):
            return None  # the answer is none of the choices, whatever was named on the way
        return _decided(self._named(bare(text), several), several)

    def _named(self, piece: str, several: bool) -> set[str]:
        """The letters that a text names; several if it hedges about one; empty if it names none."""
        if whole := self._forms.whole.fullmatch(piece):
            return {self.letter(whole[1].upper())}
        if self._forms.row.fullmatch(piece):
            return {self.letter(letter) for letter in piece.upper() if letter != " "}
        if said := self.said(piece) or self._of_list(_items(piece) or (key(piece),)):
            return {said}
        if label := self._labelled(piece):
            return {label}
        marked = self._marked(piece, several)
        return {mark if mark == _HEDGE else self._of_mark(mark) for mark in _stated(without_denied(marked), several)}

    def said(self, piece: str) -> str:
        """The letter of the choice that equals the whole text; empty if there is none, or several."""
        if letter := self._written.get(key(piece)):
            return letter
        if self._same is None:
            return ""
        said = {self.letter(LETTERS[i]) for i, choice in enumerate(self._texts) if self._same(piece, choice)}
        return said.pop() if len(said) == 1 else ""

    def _labelled(self, piece: str) -> str:
        """The letter of a text that is a letter with its own choice: "B. 12 cm", "B12 cm"."""
        label = self._forms.label.match(piece)
        letter = self.letter(label[1].upper()) if label else ""
        return letter if label and self.said(piece[label.end() :]) == letter else ""

    def _of_list(self, items: tuple[str, ...]) -> str:
        """The letter of the choice with the same items, in any order unless two choices differ in it alone."""
        same = [i for i, listed in self._lists.items() if sorted(listed) == sorted(items)]
        same = same if len(same) < 2 else [i for i in same if self._lists[i] == items]
        return self.letter(LETTERS[same[0]]) if same else ""

    def _mark_list(self, match: re.Match[str]) -> str:
        """The mark of the choice with these items; if there is none, they are none of the letters offered."""
        letter = self._of_list(_items(match[0]))
        return chr(_CHOICE_MARK + LETTERS.index(letter)) if letter else " "

    def _marked(self, piece: str, several: bool) -> str:
        """A text with marks in the place of choices and letters."""
        if self._joined and not several:
            piece = self._joined.sub(self._mark_list, piece)
        if self._pattern:
            piece = self._pattern.sub(_mark_choice, piece)
        piece = self._forms.range.sub(" ", piece)
        if several:
            piece = self._forms.compact.sub(_apart, piece)
        for pattern in self._forms.lettered:
            piece = pattern.sub(_mark_letters, piece)
        return piece

    def _of_mark(self, mark: str) -> str:
        return self.letter(LETTERS[(ord(mark) - _LETTER_MARK) % 32])


def read_letters(
    content: str,
    choices: tuple[str, ...] = (),
    several: bool = False,
    same: Callable[[str, str], bool] | None = None,
) -> str | None:
    r"""The letters that an answer chooses, as capitals in order; None if it chooses none, or is ambiguous.

    The order of evidence is that of human judges. First comes the last `\boxed`, then the text after the last "the
    answer is". Within each, and then within the whole answer, it is the text of a choice, a label at the start, and the
    only named letter or choice.

    Args:
        content: The answer.
        choices: The meanings of the letters from A on. Other letters do not count, nor do letters within a choice's
            text. Of equal choices the first counts.
        several: If true, several may be right. Otherwise an answer that names several has chosen none.
        same: Tells whether a text says the same as a choice that is written otherwise. Default: only as written.
    """
    return Offer(choices, same).letters_of(content, several)


_LETTER_OF_TRUTH = re.compile(r"[(\[]? ?([A-Za-z]) ?[)\]]? ?[.:,;!]?")
_LETTERS_OF_TRUTH = re.compile(r"[(\[]?[A-Z](?:[)\]]?(?: ?[,;/&+] ?| and | ?[与和] ?)[(\[]?[A-Z])+[)\]]?[.:]?")
_LABELLED_TRUTH = re.compile(r"[(\[]?([A-Za-z])[)\].:,]\s*(?=\S)")


def truth_letters(text: str, choices: tuple[str, ...] = ()) -> str | None:
    """The letters of a true answer, as capitals in order; None if it is none.

    A letter, several as in "A, C" or "AC", the text of a choice, or a letter with that text, as in "B. cat". A single
    letter is one of those offered where it may be, and only else the text of a choice.
    """
    offer, text = Offer(choices), tidy(text)
    if whole := _LETTER_OF_TRUTH.fullmatch(text):
        letters = whole[1].upper()
    elif _LETTERS_OF_TRUTH.fullmatch(text):
        letters = "".join(re.findall("[A-Z]", text.replace("and", "")))
    else:
        letters = text if text.isascii() and text.isupper() and text.isalpha() else ""
    said = offer.said(text)
    if said and len(letters) != 1:
        return said
    if (label := _LABELLED_TRUTH.match(text)) and offer.said(text[label.end() :]) == offer.letter(label[1].upper()):
        return offer.letter(label[1].upper())
    named = {offer.letter(letter) for letter in letters}
    if named and len({*letters}) == len(letters) and {*letters} <= {*offer.letters}:
        return "".join(sorted(named))
    return said or None


def _decided(named: set[str], several: bool) -> str | None:
    is_clear = named and _HEDGE not in named and (several or len(named) == 1)
    return "".join(sorted(named)) if is_clear else None


_LAST_LINE = re.compile(
    r"(?:\A|\n)(?!(?i:[^\n]*\b(?:not|wrong|incorrect|except)\b))[^\n]*:[*_ $]*\n(?:\\\[\n)?([^\n]+)\Z"
)
_IS_VALUE = re.compile(r"\d|\\[A-Za-z]")


class _Forms(NamedTuple):
    """Patterns of how the letters offered stand in texts."""

    whole: re.Pattern[str]
    label: re.Pattern[str]
    row: re.Pattern[str]
    range: re.Pattern[str]
    compact: re.Pattern[str]
    lettered: tuple[re.Pattern[str], ...]


@functools.cache
def _forms_of(letters: str) -> _Forms:
    """The patterns for letters from A on; compiling them takes longer than a data set's row should."""
    upper = f"[A-{letters[-1]}]"
    either = f"[A-{letters[-1]}a-{letters[-1].lower()}]"
    pronoun = "I" if "I" in letters else "(?!)"
    return _Forms(
        re.compile(rf"[(\[]? ?({either}) ?[)\]]? ?[.:,;!]?"),
        re.compile(rf"[(\[]?({either})[)\]]?[.:,)]? ?(?:- )?(?=\S)"),
        re.compile(rf"{either}(?: {either})+"),
        re.compile(rf"[(\[]{either} ?[-–] ?{either}[)\]]"),
        re.compile(rf"(?<![\w'.-])(?:{upper}{{2,}})(?!['-]?\w)"),
        tuple(re.compile(form.format(U=upper, E=either, I=pronoun)) for form in _LETTER_FORMS),
    )


# How choices are written.
_SIGNS: Final = (
    ("π", "\\pi "),
    ("∠", "\\angle "),
    ("°", "^\\circ "),
    ("×", "\\times "),
    ("⊥", "\\perp "),
    ("∥", "\\parallel "),
    ("△", "\\triangle "),
    ("∆", "\\triangle "),
    ("≤", "\\le "),
    ("≥", "\\ge "),
    ("≠", "\\ne "),
    ("±", "\\pm "),
    ("÷", "\\div "),
    ("∞", "\\infty "),
    ("α", "\\alpha "),
    ("β", "\\beta "),
    ("θ", "\\theta "),
)
_ROOT = re.compile(r"(?:√|\\?sqrt) ?(?:\(([^()]*)\)|(\d+|[A-Za-z]))")
_COMMAND = re.compile(
    r"\\(?:boxed|fbox|text[a-z]*|math(?:rm|bf|it|sf)|mbox|operatorname) ?(?:\{([^{}]*)\}|(?![A-Za-z]))"
)
_IGNORED = re.compile(r"\\(?:left|right|displaystyle|quad|qquad)(?![A-Za-z])|\\[,;:! ()\[\]]|\\(?=[%$])|[$\"“”*`~]|_")
_FRACTION = re.compile(r"\\frac ?(?:(\d) ?(\d)|\{ ?([\w.\\]+) ?\} ?\{ ?([\w.\\]+) ?\})")
_FRACTION_COMMAND = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_IN_BRACES = re.compile(r"\{[^{}]*\}")
_QUOTES = re.compile(r"^'|(?<![\d°'}])'$|(?<!\w)'(?=[A-Za-z]')|(?<=[A-Za-z])'(?=[,;\])])")
_ARTICLE = re.compile(r"(?:an?|the) (?=\S\S)", re.IGNORECASE)
_TOKEN = re.compile(r"\d+(?:[.,]\d+)*|\\?[^\W\d_]+|[^\w\s]")
_HAN: Final = "\u2e80-\u9fff\uf900-\ufaff"
_INNER: Final = rf"[^\W{_HAN}]"


def bare(text: str) -> str:
    """A tidy text without marks of mathematics, fonts and quotation."""
    for sign, command in _SIGNS:
        text = text.replace(sign, command)
    text = _ROOT.sub(lambda match: f"\\sqrt{{{match[1] or match[2]}}}", text)
    text = _FRACTION_COMMAND.sub(r"\\frac", text)
    text = _FRACTION.sub(lambda match: "{}/{}".format(*filter(None, match.groups())), text)
    for _ in range(2):
        text = _COMMAND.sub(lambda match: f" {match[1] or ''} ", text)
    lines = [" ".join(line.split()) for line in _IGNORED.sub(" ", text).split("\n")]
    text = _QUOTES.sub("", "\n".join(filter(None, lines)).strip())
    return text[1:-1].strip() if _IN_BRACES.fullmatch(text) else text


def key(text: str) -> str:
    """A text for comparison with a choice: its parts, without letter case, article before and punctuation after."""
    return " ".join(_tokens(text)).casefold()


def _tokens(text: str) -> list[str]:
    """The words, numbers and signs of a text but for braces, article and punctuation at the end."""
    text = bare(tidy(text))
    text = _ARTICLE.sub("", text.rstrip(".,;:!? ") or text, count=1)
    tokens = [token for token in _TOKEN.findall(text.replace(":", "/")) if token not in ("{", "}")]
    words = [token for token in tokens if any(map(str.isalnum, token))]
    return words if len(words) == 1 and len(words[0]) == 1 and words[0].isalpha() else tokens  # "(A)", of a picture


def _pattern_of(choices: tuple[str, ...], letters: str) -> re.Pattern[str] | None:
    """A pattern of what is written as a choice, with groups by their numbers; the letters offered are none."""
    forms = {i: tokens for i, choice in enumerate(choices) if (tokens := _tokens(choice))}
    forms = {i: tokens for i, tokens in forms.items() if "".join(tokens).upper() not in letters or len(tokens) > 1}
    longest = sorted(forms, key=lambda i: -len("".join(forms[i])))
    parts = [f"(?P<c{i}>{_form(forms[i])})" for i in longest]
    return re.compile("|".join(parts), re.IGNORECASE) if parts else None


def _form(tokens: list[str]) -> str:
    """A pattern of a choice within a text, but not of a part of a longer word, number or formula."""
    first, last = tokens[0], tokens[-1]
    before = rf"(?<!{_INNER})(?:(?:an?|the) )?" if first[0].isalpha() else ""
    if first[0].isdigit() or first[0] in "-\\√(":
        before = rf"(?<!{_INNER})(?<![.,^/*+\-\\{{×·])(?<![\d)}}a-z] [+\-*/×·] )(?<![+*/×·] )"
    after = rf"(?!{_INNER}|-{_INNER})" if last[-1].isalpha() else ""
    if not {*tokens}.isdisjoint("+-*/^="):  # a formula is none of another
        before = r"(?<![{^_+*/\\-])" + before
        after += r"(?! ?[+*/^_}=])"
    if last[-1].isdigit() or last[-1] in ")}°":
        after = rf"(?!{_INNER}|[.,]?\d|[\^%/]|:\d| ?[+*/×·^] ?[\w\\({{]| - \d|-\d| ?\\(?:times|cdot|pi|sqrt))"
    after += r"(?! [a-z])" if last.casefold() == "no" and len(tokens) == 1 else ""  # "no cat" is not "No"
    if len(tokens) == 1 and len(first) == 1 and first.isalpha() and first.isascii():
        return rf"(?<![\w'.\\-])(?-i:{first.upper()})(?!['.-]?{_INNER})"
    written = [_OVER if token == "/" else re.escape(token) for token in tokens]
    return before + "[ {}]*".join(written) + after


_OVER: Final = "[/:]"

# Choices that list several things: "b and d", "I, II and III", "①③".
_JOIN: Final = r" ?(?:[,;]|\\?&) ?(?:(?:and|和|与|及) ?)?| and |(?<=[\w)]) ?\{ ?and ?\} ?| ?[和与及] ?"
_JOINED = re.compile(_JOIN)
_ONLY = re.compile(r"^only | only[. ]*$", re.IGNORECASE)
_BETWEEN_CIRCLES = re.compile("(?<=[①-⑳]) ?(?=[①-⑳])")
_ORDERED = re.compile(r"[(\[].*[)\]]", re.DOTALL)
_LONGEST_ITEM, _MOST_ITEMS = 30, 8


def _items(text: str) -> tuple[str, ...]:
    """The things that a text lists, in order; none if it is no list, or an ordered one in brackets."""
    text = _ONLY.sub("", bare(tidy(text)).replace("\\{", "{").replace("\\}", "}")).strip(" .;:")
    text = text[1:-1] if _IN_BRACES.fullmatch(text) else text
    parts = _JOINED.split(_BETWEEN_CIRCLES.sub(", ", text))
    if not 2 <= len(parts) <= _MOST_ITEMS or _ORDERED.fullmatch(text) or max(map(len, parts)) > _LONGEST_ITEM:
        return ()
    items = tuple(map(key, parts))
    return items if all(items) else ()


def _lists_of(choices: tuple[str, ...]) -> dict[int, tuple[str, ...]]:
    """The choices' items by their numbers, if at least one choice lists several."""
    lists = {i: _items(choice) or (key(_ONLY.sub("", choice)),) for i, choice in enumerate(choices[: len(LETTERS)])}
    return lists if any(len(items) > 1 for items in lists.values()) else {}


def _pattern_of_lists(lists: dict[int, tuple[str, ...]]) -> re.Pattern[str] | None:
    """A pattern of several items in a row; of one letter or numeral, as longer ones are found as they are written."""
    items = {item for listed in lists.values() if len(listed) > 1 for item in listed if re.fullmatch(r"\w{1,4}", item)}
    if not items:
        return None
    item = "|".join(sorted(map(re.escape, items), key=len, reverse=True))
    return re.compile(
        rf"(?<!{_INNER})(?<!['.\\(\[-])(?:{item})(?:(?:{_JOIN})(?:{item}))+(?!['.-]?{_INNER})", re.IGNORECASE
    )


# How letters stand in texts. U are the capitals that are offered, E they and the small ones.
_SEPARATED: Final = (
    r"[)\]]?(?: ?[,;/&+] ?(?:(?:or|and|和|或) ?)?| ?\.? ?\n| ?\. ?|\.? (?:or|and) | ?[或和与] ?| ?[-–] ?(?=[A-Z]\b)"
    r"| (?:to|through) )(?:(?:option|choice|选项) )?[(\[]?"
)
_AFTER_A_LETTER: Final = (
    r"(?:or|and|is|isn|are|was|because|since|as|but|for|with|seems|looks|matches|fits|cannot|can|could|does|doesn|do|has"
    r"|would|should|must|will|not|rather|instead|over|which|that|only|works|so|to|though|while|if)\b"
)
_ITEM: Final = r"(?:{U}|(?![A-Z]){E}(?=[)\].,;:!?/&+\n]|$| (?:or|and)\b| ?[或和与]))"
_LETTER_FORMS: Final = (
    rf"(?<![\w'.\\-])[(\[]?{_ITEM}(?:{_SEPARATED}{_ITEM}){{{{1,40}}}}(?!['-]?{_INNER})"  # a list
    r"(?! [a-z]{{2}}|\()[)\]]?",
    rf"(?<![\w(\[\\–-])(?:[(\[]{{E}}[)\]]|{{E}}[)\]]|{{U}}[.:](?= ?(?:{_INNER}|{_CHOICE}|[\\$(\[{{{{+-])))",  # labels
    r"(?<![A-Za-z])(?i:(?:answer|option|choice|letter|choose|select|pick)(?: (?:is|would be|must be|should be))?:?)"
    r" [(\[]?"
    rf"(?:{{U}}(?!['-]?{_INNER})|{{E}}(?=[)\].,;:!?]|$))",
    rf"(?<![\w'.\\-])[(\[]?(?:A(?! (?!{_AFTER_A_LETTER})[A-Za-z]{{{{2}}}})|{{I}}(?!['.-]?{_INNER})"
    r"(?= (?:or|and|is)\b|[.!)\]]*$)"
    rf"|(?![AI]){{U}})(?!['.-]?{_INNER}| ?[\^=+*<>_])[)\]]?",
)
_E = re.compile(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])")


def _mark_choice(match: re.Match[str]) -> str:
    return chr(_CHOICE_MARK + int((match.lastgroup or "c0")[1:]))


def _mark_letters(match: re.Match[str]) -> str:
    return _ALONE.sub(lambda letter: chr(_LETTER_MARK + LETTERS.index(letter[0].upper())), match[0])


_ALONE: Final = re.compile(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])")


def _apart(match: re.Match[str]) -> str:
    """ "AC" as "A, C"; other words of capitals stay."""
    letters = match[0]
    return ", ".join(letters) if all(a < b for a, b in itertools.pairwise(letters)) else letters


# What a text with marks states.
_BETWEEN: Final = rf"[)\]]?{_SEPARATED}"
_LIST_AT_START = re.compile(rf"[(\[]?{_LETTER}(?:{_SEPARATED}{_LETTER})+")
_LABEL_AT_START = re.compile(
    rf"[(\[]?({_LETTER})(?:(?P<strong>\s?[)\]][.:,]?|[.:]| ?[-–—](?= )| ?\n)"
    r"|,| (?=because|since|as|for|so|with|due|\()|(?=[.!?]?$))"
)
_LABEL = re.compile(
    rf"(?<!\w)(?:[(\[]({_LETTER})[)\]]|(?<![(\[])({_LETTER})(?:[)\]:]|\.(?= ?(?:{_INNER}|{_MARK})))"
    rf"|(?:^|\n)({_LETTER})(?=\n|$))"
)
_REASON = re.compile(
    rf"({_MARK}[^.;!?\n]{{0,80}}?)(?:\b(?:because|since|given that|due to|as (?:(?:it|the|there)\b|{_MARK}))"
    rf"|因为)[^.;!?\n]*"
)
_HEDGED = re.compile(
    rf"{_MARK}[\s)\]]*(?:,? ?\bor\b|或)[\s(\[]*"
    rf"(?:(?:option |choice )?{_MARK}|(?:something|anything|another|any other|none|maybe|perhaps|not)\b)"
)


def _stated(text: str, several: bool) -> set[str]:
    """The marks in a text that are not negated."""
    text = _REASON.sub(r"\1", text.lstrip(" ,;:.\n"))
    hedge = {_HEDGE} if _HEDGED.search(text) else set()
    if listed := _LIST_AT_START.match(text):
        return {*re.findall(_LETTER, listed[0])} | hedge
    if label := _LABEL_AT_START.match(text):
        return {label[1]} | _beside_label(text[label.end() :], label, several) | hedge
    return {*re.findall(_MARK, text)} | hedge


def _beside_label(rest: str, label: re.Match[str], several: bool) -> set[str]:
    """The marks that count beside a label at the start: other labels, and the choice that it is said to stand for."""
    if not label["strong"]:
        return {*re.findall(_MARK, rest)}
    labels = {next(filter(None, match.groups())) for match in _LABEL.finditer(rest)}
    said = re.match(rf"\s*({_CHOICE})|\(({_LETTER})", rest)
    return labels | ({said[1] or said[2]} if said else set())
