"""Equality of mathematical answers, within bounded time.

Numbers, words, and lists of them are compared here at once. What needs algebra goes to math-verify's parser and
comparison, in child processes: some expressions take for ever to work out, such as `9^{9^{9^9}}`.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Final

from vlmenv.compat.sympy import as_mpf, is_complex, is_noise, require_private_parts
from vlmenv.core.errors import ConfigError
from vlmenv.envs.rewards.formulas import Form, read_form, written_key
from vlmenv.envs.rewards.numbers import Number, is_rounded, is_rounding, same_number
from vlmenv.envs.rewards.units import DEGREES, RADIANS, conversion
from vlmenv.envs.rewards.workers import LOSSES, Workers

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
# Long numbers, huge powers, towers of powers, factorials of thousands, of powers and of large factorials.
_BOMB = re.compile(
    r"\d{60}|\^\s*\{?\s*\d{5}|(?:\d\s*\^\s*\{?\s*){3}|[)}\]]\s*\^\s*\{?\s*\d{3}|\d{5}\s*!"
    r"|(?:\d\d|[89])\s*!\s*[)}\]]\s*!|![)}\]\s]*![)}\]\s]*!|\^\s*\{?\s*(?:\d\d|[5-9])\s*\}?\s*[)}\]]+\s*!"
    r"|\\binom\s*\{[^{}]*(?:\d{4}|\^)",
    re.ASCII,
)

_cache: dict[tuple[str, str], bool] = {}
_workers = Workers(f"{__name__}:make_comparison", TIME_LIMIT)


def math_equal(pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """Whether answers are mathematically equal to the truth.

    `docs/math_answers.md` describes the comparison. Answers of more than 1,000 characters, or with numbers too large to
    compute, equal no truth. A comparison of more than half a second of processor time gives False.

    Args:
        pairs: N pairs of an answer and the truth, as LaTeX with or without delimiters, or as plain text.

    Returns:
        N booleans.

    Raises:
        ConfigError: math-verify is not installed.
    """
    check_installed()
    results = {pair: _at_once(*pair) for pair in dict.fromkeys(pairs)}
    unknown = [pair for pair, result in results.items() if result is None]
    found = dict(zip(unknown, _workers.map(unknown), strict=True)) if unknown else {}
    # Not those that were given up by the clock: a machine that stood still is no reason to call an answer wrong again.
    _remember({pair: result is True for pair, result in found.items() if not isinstance(result, Exception)})
    LOSSES.add(answers=sum(isinstance(found.get(pair), Exception) for pair in pairs))
    results |= {pair: result is True for pair, result in found.items()}
    return [results[pair] is True for pair in pairs]


def _at_once(answer: str, truth: str) -> bool | None:
    """The verdict, where no algebra is needed for it or it is remembered."""
    if len(answer) > LONGEST_MATH or not answer.strip():
        return False
    if (known := _cache.get((answer, truth))) is not None:
        return known
    if _BOMB.search(answer) and not _BOMB.search(truth):
        return False
    try:
        return compare(answer, truth, _needs_algebra)
    except NotImplementedError:
        return None


def _needs_algebra(answer: Form, truth: Form, factor: Fraction) -> bool:
    raise NotImplementedError


def check_installed() -> None:
    """Does nothing if math-verify is installed.

    Raises:
        ConfigError: It is not.
    """
    if not _is_installed():
        raise ConfigError("mathematical answers need math-verify: pip install math-verify")


def start_math() -> None:
    """Starts to load math-verify in another process, so that the first comparison need not wait for it.

    Raises:
        ConfigError: math-verify is not installed.
    """
    check_installed()
    _workers.start()


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("math_verify") is not None


def _remember(found: dict[tuple[str, str], bool]) -> None:
    """Keeps the last results, failures too: a policy gives the same answers again and again."""
    _cache.update(found)
    for pair in list(_cache)[: max(0, len(_cache) - _CACHED)]:
        _cache.pop(pair, None)  # without a lock, which a fork might copy while it is held


Algebra = Callable[[Form, Form, Fraction], bool]
"""Whether two expressions or relations are equal, the first one's value multiplied by a factor."""


def compare(answer: str, truth: str, algebra: Algebra) -> bool:
    """Whether an answer is equal to the truth.

    Args:
        answer: A model's answer.
        truth: The true answer.
        algebra: Decides the comparisons that need algebra.
    """
    return written_key(answer) == written_key(truth) or _same(read_form(answer), read_form(truth), algebra)


def _same(answer: Form, truth: Form, algebra: Algebra) -> bool:
    if answer.name and truth.name and answer.name != truth.name:
        return _same_equation(answer, truth, algebra)
    is_line, is_other_line = (bool(form.equation) and not form.name for form in (answer, truth))
    if is_other_line or (is_line and truth.name and re.search("[A-Za-z]", answer.equation)):
        return bool(answer.equation) and _same_equation(answer, truth, algebra)
    if answer.kind == "words" and answer.items and truth.kind != "words":
        answer = answer._replace(kind="ratio")  # "5:10" for 1:2
    answer, truth = _in_radians(answer, truth), _in_radians(truth, answer)
    factor = conversion(answer.unit, truth.unit)
    if factor is None:
        return False
    match answer.kind, truth.kind:
        case "number", "number":
            return _same_numbers(answer, truth, factor)
        case ("words", "expression") | ("expression", "words"):
            return _same_product(answer, truth, algebra)
        case "words", _:
            return truth.kind == "words" and answer.latex == truth.latex
        case _, "words":
            return False
        case "sequence", "sequence":
            return _same_sequence(answer, truth, algebra)
        case ("ratio", _) | (_, "ratio"):
            return _same_ratio(answer, truth, algebra)
        case ("matrix", "matrix" | "sequence") | ("sequence", "matrix"):
            return _same_matrix(answer, truth, algebra)
        case ("number" | "expression", "sequence" | "relation") | ("sequence" | "relation", "number" | "expression"):
            return False
    return algebra(answer, truth, factor)


def _in_radians(form: Form, other: Form) -> Form:
    """An angle in radians if it is in degrees, and what it is compared with in radians."""
    unit, others = form.unit, other.unit and other.unit.powers
    if unit is None or (unit.powers, others) != (DEGREES, RADIANS) or form.kind not in ("number", "expression"):
        return form
    turned = f"({form.latex}) \\cdot \\frac{{{unit.scale.numerator} \\pi}}{{{180 * unit.scale.denominator}}}"
    return Form("expression", turned, name=form.name)


_LETTERS = re.compile(r"[a-z]{2,3}")


def _same_product(answer: Form, truth: Form, algebra: Algebra) -> bool:
    r"""Whether letters in a row, as "xy", are the same as a written product, as `x \cdot y`."""
    row, product = (answer, truth) if answer.kind == "words" else (truth, answer)
    if not _LETTERS.fullmatch(row.latex) or sorted(re.findall("[A-Za-z]", _COMMAND.sub("", product.latex))) != sorted(
        row.latex
    ):
        return False
    return algebra(Form("expression", " \\cdot ".join(row.latex)), product, Fraction(1))


_COMMAND = re.compile(r"\\[A-Za-z]+")


def _same_equation(answer: Form, truth: Form, algebra: Algebra) -> bool:
    """Of two equations, which may be one line in two forms; "x = 3" is not "y = 3"."""
    if answer.name and truth.name and {answer.kind, truth.kind} != {"expression"}:
        return False
    line, other = (form._replace(kind="relation", latex=form.equation, unit=None) for form in (answer, truth))
    return algebra(line, other, Fraction(1))


def _same_numbers(answer: Form, truth: Form, factor: Fraction) -> bool:
    number, true = answer.number, truth.number
    if number is None or true is None:
        return False
    return same_number(number, true._replace(value=true.value / factor, step=true.step and true.step / factor))


def _same_sequence(answer: Form, truth: Form, algebra: Algebra) -> bool:
    """Lists and sets in any order, tuples and intervals in theirs; a list without brackets may stand for either."""
    if len(answer.items) != len(truth.items) or not _same_brackets(answer.brackets, truth.brackets, len(truth.items)):
        return False
    if "(" in answer.brackets + truth.brackets or "[" in answer.brackets + truth.brackets:
        return all(_same(a, t, algebra) for a, t in zip(answer.items, truth.items, strict=True))
    left = list(answer.items)
    for true in truth.items:
        fitting = [item for item in left if _same(item, true, algebra)]
        if not fitting:
            return False
        left.remove(fitting[0])
    return True


def _same_matrix(answer: Form, truth: Form, algebra: Algebra) -> bool:
    """Matrices with the same cells; one may be written as a list of its rows, `[[1, 2], [3, 4]]`."""
    if len(answer.items) != len(truth.items) or not {answer.brackets, truth.brackets} <= {"", "[]"}:
        return False
    return all(
        {row.brackets, true.brackets} == {"[]"} and _same_sequence(row, true, algebra)
        for row, true in zip(answer.items, truth.items, strict=True)
    )


def _same_brackets(answer: str, truth: str, count: int) -> bool:
    if answer == truth:
        return True
    if "" in (answer, truth):
        return answer + truth in ("()", "{}") or (answer + truth == "[]" and count > 2)
    return count > 2 and {answer, truth} == {"()", "[]"}


def _same_ratio(answer: Form, truth: Form, algebra: Algebra) -> bool:
    """Ratios are equal if they are the same but for a factor; one of two may be written as a fraction."""
    if answer.kind == truth.kind:
        if len(answer.items) != len(truth.items):
            return False
        first, true_first = answer.items[0], truth.items[0]
        return all(
            _same(_product(item, true_first), _product(true, first), algebra)
            for item, true in zip(answer.items[1:], truth.items[1:], strict=True)
        )
    if any(form.kind == "ratio" and len(form.items) != 2 for form in (answer, truth)):
        return False
    return _same(_quotient(answer), _quotient(truth), algebra)


def _product(a: Form, b: Form) -> Form:
    if a.number is not None and b.number is not None:
        return _number(a.number.value * b.number.value)
    return Form("expression", f"({a.latex}) \\cdot ({b.latex})")


def _number(value: Fraction) -> Form:
    return Form("number", f"\\frac{{{value.numerator}}}{{{value.denominator}}}", Number(value))


def _quotient(form: Form) -> Form:
    if form.kind != "ratio":
        return form
    over, under = form.items
    if over.number is not None and under.number is not None and under.number.value:
        return _number(over.number.value / under.number.value)
    return Form("expression", f"\\frac{{{over.latex}}}{{{under.latex}}}")


# In the child processes


def make_comparison() -> Callable[[str, str], bool]:
    """What the child processes do; loads math-verify, which takes a while."""
    require_private_parts()
    algebra = _algebra()

    def decide(answer: str, truth: str) -> bool:
        return compare(answer, truth, algebra)

    for answer, truth in (
        ("(x+1)^2", "x^2+1"), ("\\frac{1}{2}x", "x\\sqrt{2}"), ("2\\pi", "\\sin 30^\\circ"), ("0<x<1", "(0,1)"),
        ("x+y=5", "2x+2y=10"), ("\\log_2 8", "\\binom{4}{2}"),
    ):  # fmt: skip
        decide(answer, truth)  # loads the rest, and fills the parser's tables
    return decide


_DECIMAL = re.compile(r"(?<![\d.])(\d+)\.(\d+)")


def _exact(match: re.Match[str]) -> str:
    return rf"(\frac{{{int(match[1] + match[2])}}}{{1{'0' * len(match[2])}}})"


def _algebra() -> Algebra:
    from latex2sympy2_extended import latex2sympy  # type: ignore[import-untyped]
    from math_verify import verify  # type: ignore[import-untyped]
    from sympy import Expr, MatrixBase, MatrixExpr  # type: ignore[import-untyped]

    @functools.lru_cache(100)
    def parsed(latex: str) -> Any:
        is_real = not is_complex(latex)
        exact = _DECIMAL.sub(_exact, latex)
        return latex2sympy(exact, is_real=is_real, convert_degrees=False, normalization_config=None)

    def same(found: Any, gold: Any, answer: Form, truth: Form) -> bool:
        if isinstance(found, MatrixExpr | MatrixBase) and isinstance(gold, MatrixExpr | MatrixBase):
            found, gold = found.doit(), gold.doit()
            if isinstance(found, MatrixBase) and isinstance(gold, MatrixBase):
                pairs = zip(found.flat(), gold.flat(), strict=False)
                return found.shape == gold.shape and all(same(f, g, _PLAIN, _PLAIN) for f, g in pairs)
        if isinstance(found, Expr) and isinstance(gold, Expr):
            verdict = _same_values(found, gold, answer, truth)
            if verdict is not None:
                return verdict
        return bool(verify(gold, found, float_rounding=12, allow_set_relation_comp=True, timeout_seconds=None))

    def read(form: Form) -> Any:
        if form.kind == "sequence" and form.items and all(item.kind == "relation" for item in form.items):
            return _joined([parsed(item.latex) for item in form.items], form.latex)
        return parsed(form.latex)

    def algebra(answer: Form, truth: Form, factor: Fraction) -> bool:
        found, gold = read(answer), read(truth)
        if factor != 1:
            found = found * factor.numerator / factor.denominator
        return same(found, gold, answer, truth)

    return algebra


def _joined(relations: list[Any], latex: str) -> Any:
    """The numbers for which one of some relations holds ("x < 1 or x > 2"), or all of them ("and")."""
    from sympy import Intersection, Union

    sets = [relation.as_set() for relation in relations]
    words = set(re.findall(r"\b(?:and|or)\b", latex))
    if words not in ({"and"}, {"or"}):
        raise ValueError("a comma joins inequalities in either way")
    return Intersection(*sets) if words == {"and"} else Union(*sets)


_PLAIN: Final = Form("expression", "")
_DIGITS: Final = 40
_POINTS: Final = ((7, 5), (13, 4), (-11, 7), (2, 9), (-5, 13), (29, 3), (-17, 2), (1, 37), (41, 11), (-3, 19))
_LEAST_POINTS: Final = 3


def _same_values(found: Any, gold: Any, answer: Form, truth: Form) -> bool | None:
    """Whether two expressions have the same real values wherever they have any; None where this cannot be told."""
    from sympy import Rational
    from sympy.core.function import AppliedUndef  # type: ignore[import-untyped]

    symbols = sorted(found.free_symbols | gold.free_symbols, key=str)
    if found.has(AppliedUndef) or gold.has(AppliedUndef):
        return None
    if not symbols:
        a, b = _value(found, {}), _value(gold, {})
        return None if a is None or b is None else _close(a, b) or _rounds(a, b, answer, truth)
    agreeing = 0
    for i in range(len(_POINTS)):
        place = {s: Rational(*_POINTS[(i + 3 * k) % len(_POINTS)]) * (k + 2) / 2 for k, s in enumerate(symbols)}
        a, b = _value(found, place), _value(gold, place)
        if a is None or b is None:
            continue
        is_real, other_is_real = (abs(value.imag) <= abs(value) * _TOLERANCE for value in (a, b))
        if is_real != other_is_real or (is_real and not _close(a, b)):
            return False
        agreeing += is_real
    return True if agreeing >= _LEAST_POINTS else None


_TOLERANCE: Final = 1e-25


def _value(expression: Any, place: dict[Any, Any]) -> Any:
    """The value of an expression as mpmath's complex number; None where it has none."""
    from mpmath import mpc  # type: ignore[import-untyped]

    value = expression.evalf(_DIGITS, subs=place) if place else expression.evalf(_DIGITS)
    if not value.is_number or value.is_finite is False or not (value.is_Add or value.is_Mul or value.is_Atom):
        return None
    real, imaginary = value.as_real_imag()
    if not (real.is_Number and imaginary.is_Number and real.is_finite and imaginary.is_finite):
        return None
    return mpc(*(0 if is_noise(part) else as_mpf(part, 140) for part in (real, imaginary)))


def _close(a: Any, b: Any) -> bool:
    return bool(abs(a - b) <= _TOLERANCE * max(abs(a), abs(b)))


def _rounds(a: Any, b: Any, answer: Form, truth: Form) -> bool:
    """Whether one value is the other, rounded to as many digits as count."""
    if truth.number is not None:
        step = truth.number.step if is_rounded(truth.number) else None
    else:
        step = answer.number.step if answer.number is not None and is_rounding(answer.number) else None
    return step is not None and bool(abs(a - b) * 2 * step.denominator <= step.numerator * (1 + 1e-12))
