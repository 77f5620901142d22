r"""Reads a stated answer as a mathematical object, if it is one.

An object is a number, an expression, a list, tuple, set or interval of them, a ratio, a relation, or words. Two
numbers side by side ("7 3", "(9)(1)", except a mixed number) are no object. Nor are several relations without a comma
between them, or words within a formula. Such a text equals only the same text.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Final, Literal, NamedTuple

from vlmenv.envs.rewards.normalise import stated
from vlmenv.envs.rewards.numbers import Number, read_number
from vlmenv.envs.rewards.units import Unit, joined_units, plain_signs, read_unit, split_unit

Kind = Literal["number", "expression", "sequence", "matrix", "ratio", "relation", "words"]


class Form(NamedTuple):
    """An answer as it is compared."""

    kind: Kind
    latex: str
    """in the commands that math-verify knows, without its unit; of words and what is no object, the words"""
    number: Number | None = None
    items: tuple[Form, ...] = ()
    """of a sequence or a ratio; of a matrix its rows; of words such as "3:15", those that they have as a ratio"""
    brackets: str = ""
    """of a sequence: `()`, `[]`, `[)`, `(]`, `{}`, or none"""
    name: str = ""
    """what it is set equal to: the x of "x = 3" """
    unit: Unit | None = None
    equation: str = ""
    """all of "x + y = 5", of which the form is the last side"""


DEEPEST: Final = 8
"""Brackets within brackets; the time that parsing takes grows exponentially with them."""
MOST_ITEMS: Final = 50
_CACHED: Final = 2_000


@functools.lru_cache(_CACHED)
def read_form(text: str) -> Form:
    """An answer as it is compared, units and names split off."""
    written = plain_signs(stated(text))
    if _TIME.fullmatch(written):
        ratio = _ratio(written)
        return Form("words", written, items=ratio.items if ratio else ())
    return _read(written)


@functools.lru_cache(_CACHED)
def written_key(text: str) -> str:
    """What is left of a text where neither spaces, case nor styles count: texts with one key say the same.

    The case of variables counts: "e" is not "E".
    """
    latex = _latex(plain_signs(stated(text)))
    is_in_words = re.search("[A-Za-z]{2}", _ANY_COMMAND.sub("", latex)) is not None
    return _key(latex) if is_in_words else _key(latex, fold=False)


_ANY_COMMAND = re.compile(r"\\[A-Za-z]+")


def _key(latex: str, fold: bool = True) -> str:
    text = re.sub(r"(?<!\d) | (?!\d)", "", latex.replace("\\", " "))
    text = text.casefold() if fold else text
    return re.sub(r"(?<=[\^_])\{(\w)\}(?!\w)", r"\1", text)


_TIME = re.compile(r"\d{1,2} ?: ?[0-5]\d(?: ?: ?[0-5]\d)?(?: ?[AaPp]\.? ?[Mm]\.?)?", re.ASCII)
_APPROXIMATE = re.compile(r"(?:\\approx|\\simeq|\\sim|≈|~|∼|=|\\therefore|∴|\\Rightarrow|\\implies|⇒|=>) *")


_POINT_WORD = re.compile(r"^(?:(?:the )?(?:points?|coordinates?)|点|坐标) ?(?=[A-Z]? ?\()", re.IGNORECASE)


def _read(text: str) -> Form:
    while lead := _APPROXIMATE.match(text):
        text = text[lead.end() :]
    text = _POINT_WORD.sub("", joined_units(text))
    body, unit = split_unit(text)
    if (number := read_number(body)) is not None:
        return Form("number", _latex(body), number, unit=unit)
    latex = _latex(text)
    if _depth(latex) > DEEPEST:
        return Form("words", text)
    return _structured(latex) or Form("words", _key(_BEFORE_WORDS.sub("", latex)))


_BEFORE_WORDS = re.compile(r"^(?:(?:on|in|at) )?(?:(?:an?|the) )?(?=[A-Za-z]{3})", re.IGNORECASE)


def _structured(latex: str) -> Form | None:
    """A list, a relation, a tuple, a ratio or an expression; None if it is none of these."""
    for read in (_matrix, _listed, _related, _bracketed, _plus_minus, _ratio, _expression):
        form = read(latex)
        if form is not None:
            return form
    return None


# LaTeX

_COMMANDS: Final = {
    "×": "times", "÷": "div", "·": "cdot", "∞": "infty", "≤": "le", "≥": "ge", "≠": "ne", "≈": "approx", "±": "pm",
    "∓": "mp", "∈": "in", "∪": "cup", "∩": "cap", "∠": "angle", "△": "triangle", "∆": "triangle", "∅": "emptyset",
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "θ": "theta", "λ": "lambda", "μ": "mu",
    "ν": "nu", "ξ": "xi", "π": "pi", "ρ": "rho", "σ": "sigma", "τ": "tau", "φ": "phi", "ω": "omega", "Δ": "Delta",
    "Ω": "Omega", "∼": "sim", "⊥": "perp", "∥": "parallel", "…": "ldots", "∀": "forall", "⇒": "implies",
}  # fmt: skip
_SIGNS: Final = str.maketrans({sign: f"\\{name} " for sign, name in _COMMANDS.items()})
_FUNCTIONS: Final = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|lg|exp|min|max|gcd|lcm|det"
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_REWRITTEN: Final = tuple(
    (re.compile(pattern, re.ASCII), by)
    for pattern, by in (
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:leqslant|leq)(?![A-Za-z])|<=", r"\\le "),
        (r"\\(?:geqslant|geq)(?![A-Za-z])|>=", r"\\ge "),
        (r"\\neq(?![A-Za-z])|!=", r"\\ne "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\(?:ast|bullet)(?![A-Za-z])", r"\\cdot "),
        (r"\\lbrace(?![A-Za-z])", r"\\{"),
        (r"\\rbrace(?![A-Za-z])", r"\\}"),
        (r"\\(?:vert|mid|lvert|rvert)(?![A-Za-z])", "|"),
        (r"\\(?:simeq|doteq|thickapprox)(?![A-Za-z])", r"\\approx "),
        (r"\\(?:varnothing)(?![A-Za-z])", r"\\emptyset "),
        (r"\\(?:rm|bf|it|cal)(?![A-Za-z])", " "),
        (r"\*\*", "^"),
        (r"\*", r"\\cdot "),
        (r"\{ ?, ?\}", ""),
        (rf"(?<![\\A-Za-z])({_FUNCTIONS})(?![A-Za-z])", r"\\\1 "),
        (r"(?<![\\A-Za-z])(?:LCM|Lcm)(?= ?\()", r"\\lcm "),
        (r"(?<![\\A-Za-z])(?:GCD|GCF|HCF|gcf|hcf)(?= ?\()", r"\\gcd "),
        (r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi "),
        (r"(?<![\\A-Za-z])(?:positive )?(?:infinity|inf|oo)(?![A-Za-z])|正?无穷大?", r"\\infty "),
        (r"(?<![\\A-Za-z])sqrt(?![A-Za-z])|√|\\sqrt(?![A-Za-z])", r"\\sqrt "),
        (r"(?<=\d) ?[xX] ?(?=10 ?\^|\d)", r"\\times "),
        (r"(?<![A-Za-z\d.\\])(\d+(?:\.\d+)?)[eE]([+-]?\d{1,3})(?![\dA-Za-z.])", r"\1\\times 10^{\2}"),
        (r"\^ ?([+-]?\d+)", r"^{\1}"),
        (r"_ ?(\d+)(?=\()", r"_{\1}"),
        (r"\\sqrt ?(\[[^\[\]]{1,9}\])? ?(\d+|[A-Za-z])", r"\\sqrt\1{\2}"),
        (r"\\frac ?(\d) ?(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac ?(\d) ?(?=\{)", r"\\frac{\1}"),
        (r"(\\frac ?\{(?:[^{}]|\{[^{}]*\})*\}) ?(\w)", r"\1{\2}"),
        (r"\\overline ?\{ ?([A-Z]{2}) ?\}", r"\1"),
        (r"(?<![\d.A-Za-z}]) ?(\d+) ?\\frac ?\{ ?(\d+) ?\} ?\{ ?(\d+) ?\}", "@mixed"),
        (r"(?<![\d.A-Za-z}/]) ?(\d+) (\d+) ?/ ?(\d+)(?![\d.])", "@mixed"),
        (r"(?<![\d.A-Za-z}/^_ ])(\d+) ?/ ?(\d+) (?=\\?[A-Za-z(])", r"\\frac{\1}{\2} "),
        (r"(?<![\d.])\.(?=\d)", "0."),
        (r"(\d)\.(?!\d|\(\d|\\overline|\\dot)", r"\1"),
    )
)


def _latex(text: str) -> str:
    """A text in the commands that the parser knows, with all groups in brackets of their own."""
    text = text.translate(_SIGNS)
    for pattern, by in _REWRITTEN:
        text = pattern.sub(_mixed if by == "@mixed" else by, text)
    text = _arguments_in_braces(text)
    if _TRIGONOMETRY.search(text):
        text = re.sub(r"(\d+(?:\.\d+)?) ?°", r"(\\frac{\1\\pi}{180})", text)
    return " ".join(_groups_in_brackets(text).split())


def _mixed(match: re.Match[str]) -> str:
    """A mixed number as a sum; what is none stays, as two numbers side by side."""
    whole, over, under = match.groups()
    return rf"({whole}+\frac{{{over}}}{{{under}}})" if int(over) < int(under) else match[0]


_OPENS: Final = re.compile(r"(\^|\\sqrt(?: ?\[[^\[\]]{1,9}\])?) ?\(")


def _arguments_in_braces(text: str) -> str:
    r"""`x^(n+1)` as `x^{n+1}`, `\sqrt(2)` as `\sqrt{2}`."""
    start = 0
    while match := _OPENS.search(text, start):
        start = match.end()
        end = _closing(text, start - 1)
        if end is not None:
            text = f"{text[: match.end() - 1]}{{{text[start:end]}}}{text[end + 1 :]}"
    return text


def _closing(text: str, start: int) -> int | None:
    """Where the bracket at `start` is closed."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return None


_TAKES_BRACES = re.compile(r"(?:[\^_\]]|\\[A-Za-z]+)$")
_SECOND_OF: Final = ("\\frac", "\\binom", "\\begin", "\\sqrt")


def _groups_in_brackets(text: str) -> str:
    """Braces that hold no argument become brackets, so that "7{3}" is seen to be two numbers; `{1,2}` becomes a set."""
    result: list[str] = []
    stack: list[tuple[bool, int]] = []
    seconds = 0
    for piece in re.findall(r"\\[A-Za-z]+|\\.|[^\\]|\\", text):
        if piece == "{":
            before = "".join(result[-3:]).rstrip()
            is_argument = seconds > 0 or _TAKES_BRACES.search(before) is not None
            seconds = max(0, seconds - 1)
            stack.append((is_argument, len(result)))
            result.append("{" if is_argument else "(")
        elif piece == "}" and stack:
            is_argument, start = stack.pop()
            result.append("}" if is_argument else ")")
            if not is_argument and ("," in result[start:] or _IS_CONDITION.search("".join(result[start:]))):
                result[start], result[-1] = "\\{", "\\}"
            if is_argument and "".join(result[max(0, start - 2) : start]).rstrip().endswith(("\\frac", "\\binom")):
                seconds = 1
        else:
            seconds = 0 if piece.strip() else seconds
            result.append(piece)
    return "".join(result)


_IS_CONDITION = re.compile(r"^\(\s*[A-Za-z]\s*(?:\\in\b[^|:]*)?[|:].*(?:[<>=]|\\(?:le|ge|ne|in)(?![A-Za-z]))")


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
        deepest = max(deepest, depth)
    return deepest


# Structure

_WHOLE_MATRIX = re.compile(r"\\begin ?\{pmatrix\}((?:(?!\\begin|\\end).)*)\\end ?\{pmatrix\}", re.DOTALL)


def _matrix(latex: str) -> Form | None:
    """A matrix, as rows of numbers or expressions; all have the same length."""
    found = _WHOLE_MATRIX.fullmatch(latex)
    rows = [[_item(cell.strip()) for cell in row.split("&")] for row in found[1].split("\\\\")] if found else []
    cells = [cell for row in rows for cell in row if cell is not None]
    if not rows or len({len(row) for row in rows}) > 1 or len(cells) < len(rows) * len(rows[0]):
        return None
    items = [Form("sequence", "", items=tuple(filter(None, row)), brackets="[]") for row in rows]
    return Form("matrix", latex, items=tuple(items)) if len(cells) <= MOST_ITEMS else None


_BRACKET = re.compile(r"\\[{}]|[()\[\]{}]")
_OPENING: Final = {"(": 1, "[": 1, "{": 1, "\\{": 1}
_MATRIX = re.compile(r"\\(begin|end) ?\{")


def _split(latex: str, separators: re.Pattern[str]) -> list[str]:
    """The parts between separators that stand in no brackets."""
    parts, depth, start, end = [], 0, 0, 0
    places = sorted(
        [(m.start(), m.end(), True) for m in separators.finditer(latex)]
        + [(m.start(), m.end(), False) for m in _BRACKET.finditer(latex)]
    )
    for place, end, is_separator in places:
        if not is_separator:
            depth += 1 if latex[place:end] in _OPENING else -1
        elif depth == 0 and place >= start:
            parts.append(latex[start:place].strip())
            start = end
    return [*parts, latex[start:].strip()]


_CONJUNCTION = re.compile(r" ?[;,]? ?(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|;|[或和与]")
_COMMA = re.compile(r",")


def _listed(latex: str) -> Form | None:
    """Several answers, by commas, semicolons, "and" or "or"; the name of the first is that of all that have none."""
    if _MATRIX.search(latex):
        return None
    for separators in (_CONJUNCTION, _COMMA):
        parts = _split(latex, separators)
        if len(parts) > 1:
            return _sequence(parts, "", latex)
    return None


def _sequence(parts: list[str], brackets: str, latex: str) -> Form | None:
    if len(parts) > MOST_ITEMS or not all(parts):
        return None
    items: list[Form] = []
    for part in parts:
        item = _item(part)
        if item is None:
            return None
        items += item.items if item.kind == "sequence" and not (brackets or item.brackets or item.name) else [item]
    name = items[0].name
    if name and all(item.name in ("", name) for item in items) and all(item.kind != "relation" for item in items):
        items = [item._replace(name="", equation="") for item in items]
    else:
        name = ""
    return Form("sequence", latex, items=tuple(items), brackets=brackets, name=name)


def _item(latex: str) -> Form | None:
    body, unit = split_unit(latex)
    if (number := read_number(body)) is not None:
        return Form("number", body, number, unit=unit)
    if len(latex) > 1 and _WORDS.fullmatch(latex):
        return Form("words", _key(latex))
    return _structured(latex)


_EQUALS = re.compile(r"(?<![<>!\\:])=(?!=|>)")
_NEARLY = re.compile(r"\\approx(?![A-Za-z])")
_OTHER_RELATION = re.compile(r"<|>|\\(?:le|ge|ne)(?![A-Za-z])")
_IN = re.compile(r"\\in(?![A-Za-z])")
_SETS = re.compile(r"\\(?:cup|cap|setminus|mathbb|emptyset|backslash)(?![A-Za-z])")
_NAME = re.compile(
    r"(?:m ?)?(?:\\(?:angle|triangle|vec|overline|overrightarrow|mathbf|mathbb|widehat|hat|bar|arc|[A-Za-z]+) ?)*"
    r"(?:[A-Za-z'][A-Za-z' ]*|\{ ?[A-Za-z]+ ?\}|\([A-Za-z, ]+\))?(?:_ ?(?:\{[^{}]*\}|\w))?'*(?:\([A-Za-z, ]*\))?"
)
_TWO_RELATIONS = re.compile(r"(?:\d|[)}]) +[A-Za-z]\w*$|\n")


def _related(latex: str) -> Form | None:
    """A value with what it is said to equal, or a relation."""
    if _SETS.search(latex) and not _EQUALS.search(latex) and not _IN.search(latex):
        return Form("relation", latex) if _is_formula(latex) else None
    exact, *nearly = _split(latex, _NEARLY)
    if nearly:
        latex = (
            exact if (exact == "\\pi" or not _NAME.fullmatch(exact)) and "=" not in exact else f"{exact} = {nearly[-1]}"
        )
        latex = exact if "=" in exact else latex
    if len(_split(latex, _OTHER_RELATION)) > 1:
        return Form("relation", latex) if _is_formula(latex) else None
    sides = _split(latex, _IN)
    sides = sides if len(sides) == 2 and _NAME.fullmatch(sides[0]) else _split(latex, _EQUALS)
    if len(sides) == 1:
        return _read_side(latex) if nearly else None
    if _NAME.fullmatch(sides[-1]) and not _NAME.fullmatch(sides[0]):
        sides = sides[::-1]
    if not all(sides) or any(_TWO_RELATIONS.search(side) for side in sides[1:-1]):
        return None
    last, name = _read_side(sides[-1]), _name(sides[0])
    if last is None or not (name or _is_formula(sides[0])):
        return None
    if name and any(_key(side) == name for side in sides[1:]):
        return None  # x = 1 = x, and the like
    return last._replace(name=name, equation=latex)


def _name(side: str) -> str:
    """What a side names, if it is a name; the graph's y for f(x)."""
    name = _key(side) if _NAME.fullmatch(side) else ""
    return "y" if name == "f(x)" else name


def _read_side(latex: str) -> Form | None:
    form = _item(latex.strip())
    return form if form is None or not form.equation else None


_PAIRS: Final = {"(": ")]", "[": ")]", "\\{": ("\\}",), "{": "}"}
_POINT = re.compile(r"[A-Z](?:_ ?\{?\w\}?)?'?(?= ?\()")
_SUCH_THAT = re.compile(r"\|(?![^|]*\|)|:")


def _bracketed(latex: str) -> Form | None:
    """A tuple, interval, or set; brackets around a single value are dropped."""
    body, unit = split_unit(latex)
    point = _POINT.match(body)
    inner = body[point.end() :].strip() if point else body
    opened = _BRACKET.match(inner)
    closed = list(_BRACKET.finditer(inner))[-1:]
    if opened is None or not closed or closed[0].end() != len(inner) or not _is_one_group(inner):
        return None
    content = inner[opened.end() : closed[0].start()].strip()
    brackets = (opened[0] + closed[0][0]).replace("\\", "")
    parts = _split(content, re.compile(r"[,;]"))
    if len(parts) > 1:
        form = _sequence(parts, brackets, inner)
        return form._replace(unit=unit) if form else None
    if point is not None:
        return None
    if brackets == "{}" and len(condition := _split(content, _SUCH_THAT)) == 2:
        content = condition[1]
    form = _read_side(content)
    return form._replace(unit=form.unit or unit) if form and content != latex else None


def _is_one_group(text: str) -> bool:
    """Whether the first bracket is closed by the last; one closes any other, as in [0, 1)."""
    depth = 0
    for match in _BRACKET.finditer(text):
        depth += 1 if match[0] in _OPENING else -1
        if depth == 0:
            return match.end() == len(text)
    return False


_PLUS_MINUS = re.compile(r"\\(?:pm|mp)(?![A-Za-z])")


def _plus_minus(latex: str) -> Form | None:
    body, unit = split_unit(latex)
    parts = _split(body, _PLUS_MINUS)
    if len(parts) == 1 and _PLUS_MINUS.search(body):
        return _both_signs(body, unit)
    if len(parts) != 2:
        return None
    both = [_structured(f"{parts[0]} {sign} {parts[1]}".strip()) for sign in "+-"]
    number = [read_number(sign + parts[1]) for sign in "+-"]
    if not parts[0] and all(number):
        both = [Form("number", sign + parts[1], value) for sign, value in zip("+-", number, strict=True)]
    items = tuple(item for item in both if item is not None)
    return Form("sequence", latex, items=items, unit=unit) if len(items) == 2 else None


def _both_signs(body: str, unit: Unit | None) -> Form | None:
    r"""The two values of a formula with `\pm` within it, as the roots of a quadratic equation."""
    items = []
    for plus, minus in ("+-", "-+"):
        item = _expression(_PLUS_MINUS.sub(lambda sign: plus if sign[0] == "\\pm" else minus, body))  # noqa: B023
        if item is None:
            return None
        items.append(item)
    return Form("sequence", body, items=tuple(items), unit=unit)


def _ratio(latex: str) -> Form | None:
    parts = _split(latex, re.compile(r":| to "))
    if len(parts) < 2 or len(parts) > MOST_ITEMS:
        return None
    items = [_item(part) for part in parts]
    if any(item is None or item.kind not in ("number", "expression") for item in items):
        return None
    return Form("ratio", latex, items=tuple(item for item in items if item is not None))


_NO_EXPRESSION = re.compile(r"[,;<>=]|\\(?:le|ge|ne|in|approx|to)(?![A-Za-z])")


def _expression(latex: str) -> Form | None:
    if _WORDS.fullmatch(latex) and len(latex) > 1:
        return None
    body, unit = split_unit(latex)
    if "°" in body:
        body, unit = body.replace("°", ""), unit or read_unit("°")
    return Form("expression", body, unit=unit) if _is_formula(body) and not _NO_EXPRESSION.search(body) else None


# What is a formula

_WORDS = re.compile(r"[A-Za-z](?:[A-Za-z' ]|(?<=[A-Za-z]{3})-(?=[A-Za-z]{3}))*")
_COMMANDS_OF_FORMULAS: Final = (
    "frac sqrt pi sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp min max gcd lcm det infty"
    " le ge ne in cup cap times cdot div pm mp binom overline vec overrightarrow angle triangle mathbb mathbf emptyset"
    " setminus lfloor rfloor lceil rceil sum prod int lim to begin"
    " end alpha beta gamma delta epsilon varepsilon theta lambda mu"
    " nu xi rho sigma tau phi varphi omega Delta Omega Gamma Sigma Phi hat bar widehat approx imath bmod mod ell"
    " prime"
)
_KNOWN: Final = frozenset(_COMMANDS_OF_FORMULAS.split())
_TOKEN = re.compile(r"\\([A-Za-z]+)|\\[{}%\\|]|\d+(?:\.\d+)?(?!\.)|([A-Za-z]+)|[()\[\]{}^_+/<>=,;!|&-]| ", re.ASCII)
_NUMBER: Final = r"(?<![_.\d])\d+(?:\.\d+)?"
_SINGLE: Final = r"(?:\(|\\\{)(?: ?\()? ?[+-]? ?\d+(?:\.\d+)? ?(?:\) ?)?(?:\)|\\\})"
_FRAC: Final = r"\\frac ?\{ ?-?\d+(?:\.\d+)? ?\} ?\{ ?-?\d+(?:\.\d+)? ?\}"
_POWER: Final = r"\d ?\^ ?(?:\{[^{}]*\}|\w)"
_NEIGHBOURS = re.compile(
    rf"(?:{_NUMBER}) +\d|(?:{_NUMBER}|{_SINGLE}|{_FRAC}|{_POWER}|!) ?(?:{_SINGLE}|{_FRAC})"
    rf"|\+ ?\+|(?:{_SINGLE}|{_FRAC}|{_POWER}|!|\\pi|\\infty|[A-Za-z)\]|]) ?(?<!\\log )(?<!_)\d"
)
_FUNCTION_NAME = re.compile(rf"\\(?:{_FUNCTIONS}|cdot|times|div|pm|mp|le|ge|ne|in|cup|cap|to|bmod|mod)(?![A-Za-z])")
_IN_ORDER: Final = ("abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ")


def _is_formula(latex: str) -> bool:
    """Whether a text is made of what belongs in a formula, and has no two numbers side by side."""
    end, depth, is_matrix = 0, 0, _MATRIX.search(latex) is not None
    for token in _tokens(latex):
        if token is None:
            return False
        end = token.end()
        command, letters = token.groups()
        if command and command not in _KNOWN:
            return False
        if not is_matrix and (token[0] in ("\\\\", "&") or (letters and not _are_variables(letters))):
            return False
        depth += {"{": 1, "}": -1}.get(token[0], 0)
    bare = _FUNCTION_NAME.sub("#", latex).translate(_ONE_KIND_OF_BRACKETS)
    return end > 0 and depth == 0 and (is_matrix or _NEIGHBOURS.search(bare) is None)


_ONE_KIND_OF_BRACKETS: Final = str.maketrans("[]", "()")


def _tokens(text: str) -> Iterator[re.Match[str] | None]:
    place = 0
    while place < len(text):
        token = _TOKEN.match(text, place)
        yield token
        if token is None:
            return
        place = token.end()


def _are_variables(letters: str) -> bool:
    """Whether letters in a row multiply: two at most, or neighbours in the alphabet, such as "abc" and "XYZ"."""
    return len(letters) <= 2 or any(letters in alphabet for alphabet in _IN_ORDER)
