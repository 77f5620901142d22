"""Forms in which right answers are written, against math-verify's defaults; run as a script, this writes the page."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
from conftest import shared

from vlmenv.envs.rewards.math import math_equal

PAGE = Path(__file__).parents[2] / "docs" / "math_answers.md"

TRUTHS: Final = {
    "whole numbers": ["5", "-2", "160", "1000", "12345"],
    "decimals and fractions": ["4.8", "0.25", "\\frac{1}{2}", "7/3", "-\\frac{3}{4}", "2\\frac{1}{2}"],
    "powers of ten": ["3\\times10^8", "1.6\\times 10^{-19}", "6.02\\times10^{23}"],
    "roots and π": ["9\\pi", "2\\sqrt{3}", "5 \\sqrt { 3 }", "\\frac { 2 \\sqrt { 2 } } { 5 }", "1+\\sqrt{5}"],
    "expressions": ["x^2-1", "\\frac{x+1}{2}", "2^{n+1}", "\\sqrt{1/n}", "3+2i"],
    "units": ["5 cm", "60°", "60^\\circ", "2\\sqrt{3} m", "12\\pi\\text{ cm}^2", "6.18 m", "\\frac{5}{2} cm", "28\\%"],
    "pairs and sets": ["(3,4)", "(-1,\\frac{1}{2})", "\\{1,2,3\\}", "x=1,y=2"],
    "intervals and ratios": ["[0,1)", "(-\\infty,2]", "x>3", "5:3"],
}

Form = Callable[[str], str]


def full_width(text: str) -> str:
    return re.sub(r"[0-9(),=]", lambda match: chr(ord(match[0]) + 0xFEE0), text)


FORMS: Final[dict[str, Form]] = {
    "as it is": lambda t: t,
    "$…$": lambda t: f"${t}$",
    "\\(…\\)": lambda t: f"\\({t}\\)",
    "\\[…\\]": lambda t: f"\\[\n{t}\n\\]",
    "\\boxed{…}": lambda t: f"\\boxed{{{t}}}",
    "$\\boxed{…}$": lambda t: f"$\\boxed{{{t}}}$",
    "The answer is $…$.": lambda t: f"The answer is ${t}$.",
    "The answer is ….": lambda t: f"The answer is {t}.",
    "So it is \\boxed{…}.": lambda t: f"So it is $\\boxed{{{t}}}$.",
    "**…**": lambda t: f"**{t}**",
    "Final answer: …": lambda t: f"Final answer: {t}",
    "答案是…": lambda t: f"答案是{t}",
    "所以答案为：$…$。": lambda t: f"所以答案为：${t}$。",
    "full width": full_width,
}
UNITS: Final[dict[str, Form]] = {
    "… cm": lambda t: f"{t} cm",
    "…\\text{ cm}": lambda t: f"{t}\\text{{ cm}}",
    "\\boxed{…\\text{ cm}}": lambda t: f"\\boxed{{{t}\\text{{ cm}}}}",
    "$…\\,\\mathrm{cm}^2$": lambda t: f"${t}\\,\\mathrm{{cm}}^2$",
    "…厘米": lambda t: f"{t}厘米",
    "x = …": lambda t: f"x = {t}",
    "$x=…$": lambda t: f"$x={t}$",
    "\\approx …": lambda t: f"\\approx {t}",
}
"""Of values without a unit."""
VALUES: Final = ("whole numbers", "decimals and fractions", "powers of ten", "roots and π")

OTHERS: Final = [  # a truth, answers that say the same, and some that do not
    (
        "5",
        ["5.0", "５", "x = 5", "AB = 5", "5 N·m", "共5个"],
        ["6", "-5", "5 or 6", "\\boxed{5} or \\boxed{6}", "not 5"],
    ),
    ("10", ["7+3", "2\\cdot5", "\\sqrt{100}"], ["7 3", "9 1", "7\n3", "(9)(1)", "2(5)", "7{3}", "1, 9", "1+", "ten"]),
    ("5 kg", ["5", "5000 g", "5\\text{ kg}", "5公斤"], ["5 g", "5 cm", "5 kg/m"]),
    ("90 km/h", ["25 m/s", "90"], ["25 km/h"]),
    ("1/3", ["2/6", "0.333333"], ["0.33", "33.3\\%"]),
    ("3.14", ["\\pi", "3.1416", "157/50"], ["3.15", "3.1", "3"]),
    ("4.8", ["24/5", "4.80"], ["4.83", "5"]),
    ("1.6\\times10^{-19}", ["1.6e-19", "1.6×10⁻¹⁹", "1.6*10^-19", "16 \\cdot 10^{-20}"], ["1.7e-19", "0", "1.6e-18"]),
    ("2^{-99}", ["\\frac{1}{2^{99}}"], ["2^{-98}", "0"]),
    ("\\frac{3}{2}", ["1½", "1 1/2", "1\\frac{1}{2}", "1.5", "150%"], ["1 2/1", "11/2"]),
    ("1/2", ["\\sin 30^\\circ", "\\cos 60°", "½", "50%"], ["\\sin 30", "2"]),
    ("x^2-1", ["(x-1)(x+1)", "x² − 1"], ["x^2+1", "(x-1)^2", "x-1"]),
    ("\\sqrt{1/n}", ["\\frac{1}{\\sqrt n}", "n^{-1/2}"], ["\\sqrt{n}"]),
    ("(1,2)", ["1, 2", "（1，2）", "P(1, 2)"], ["{1,2}", "(2,1)", "[1,2]", "(1,2,3)", "1"]),
    ("\\{1,2\\}", ["2, 1", "x=1 or x=2", "1和2"], ["1", "1,2,3", "(1,2)"]),
    ("\\pm 2", ["2, -2", "-2 or 2"], ["2", "-2"]),
    ("[0,1)", ["0 \\le x < 1", "x \\in [0,1)"], ["(0,1)", "0<x<1", "0,1"]),
    ("(-\\infty,1)\\cup(2,\\infty)", ["x<1 or x>2"], ["x<1", "1<x<2"]),
    ("y=5-x", ["x+y=5", "5-x", "2x+2y=10"], ["y=5+x", "5"]),
    ("3", ["x=3", "x ≈ 3"], ["x=1 x=2 x=3", "x=1, x=2, x=3", "3x", "0<x<9"]),
    ("2:4", ["1:2", "1/2"], ["2:1", "1:2:3"]),
    ("3:15", ["3:15"], ["1:5", "3.25"]),
    ("IV", ["IV", "\\text{IV}"], ["VI", "4"]),
    ("no solution", ["No solution.", "\\text{no solution}"], ["no", "solution", "0"]),
]


def cells(truths: Sequence[str], forms: dict[str, Form]) -> list[tuple[str, str, str]]:
    """Truth, form and answer for each pair of these."""
    return [(truth, name, write(truth)) for truth in truths for name, write in forms.items()]


def matrix() -> list[tuple[str, str, str]]:
    plain = [truth for truths in TRUTHS.values() for truth in truths]
    return cells(plain, FORMS) + cells([truth for kind in VALUES for truth in TRUTHS[kind]], UNITS)


@functools.cache
def defaults_find(answer: str, truth: str) -> bool:
    """Whether math-verify finds them equal if it is called as its documentation shows."""
    from math_verify import parse, verify  # type: ignore[import-untyped]

    gold, found = (parse(text, parsing_timeout=None) for text in (f"${truth}$", answer))
    return bool(verify(gold, found, timeout_seconds=None))


def lost(found: Sequence[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    equal = math_equal([(answer, truth) for truth, _, answer in found])
    return [cell for cell, is_equal in zip(found, equal, strict=True) if not is_equal]


@pytest.mark.slow
def test_every_form_of_every_truth_is_right() -> None:
    assert lost(matrix()) == []


def test_no_published_truth_is_lost_in_any_form() -> None:
    truths: set[str] = set()
    for file in sorted(shared("data/visual_math").glob("*/samples.jsonl")):
        for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            truths.add(row.get("answer_value") or row["conversations"][1]["value"])
    values = sorted(truth for truth in truths if any(character.isdigit() for character in truth))
    assert len(values) > 15
    assert lost(cells(values, FORMS | UNITS)) == []


@pytest.mark.parametrize(("truth", "right", "wrong"), OTHERS, ids=[truth for truth, *_ in OTHERS])
def test_what_says_the_same_is_right_and_all_else_wrong(truth: str, right: list[str], wrong: list[str]) -> None:
    equal = math_equal([(answer, truth) for answer in right + wrong])
    assert [answer for answer, is_equal in zip(right, equal, strict=False) if not is_equal] == []
    assert [answer for answer, is_equal in zip(wrong, equal[len(right) :], strict=True) if is_equal] == []


def row(*parts: Any) -> str:
    return "| " + " | ".join(str(part).replace("|", "\\|").replace("\n", "⏎") for part in parts) + " |"


def code(texts: Sequence[str]) -> str:
    return ", ".join(f"`{text}`" for text in texts)


HOW: Final = """\
# How mathematical answers are compared

The true answer and the model's are read by the same steps.
[tests/envs/test_forms_of_answers.py](../tests/envs/test_forms_of_answers.py) writes and checks the tables below.

1. **Characters.** Full-width and mathematical letters, digits of all scripts, superscripts, `½`, `−` and `º` become
   plain ones.
2. **Stated answer.** The last `\\boxed`, otherwise the text after the last "the answer is", "=", "答案是" or the like.
   Boxes that follow each other are a list, and so is "\\boxed{3} or 4": neither states 3. What is denied
   ("not \\boxed{3}", "\\boxed{3} is wrong") is not stated.
3. **Units** are split off: SI units with their prefixes, common others, currencies, Chinese ones, and counted things
   ("people"). A unit that one side lacks is not compared. Two units are converted: `5000 g` is `5 kg`, `90 km/h` is
   `25 m/s`, `180°` is `π rad`. A quantity may have several, the largest first: `3 h 30 min` is `3.5 h`, and
   `30°15'` is `30.25°`. `'` and `"` after a number are parts of a degree, or of a foot or an hour beside such a unit.
   Units of different quantities are not equal. A percent sign on one side alone may be left out, or count as 1/100.
4. **Numbers** are compared exactly, to the precision that the truth states. A truth of three or more significant digits
   with decimals (two, in scientific notation) equals every number that rounds to it. A fraction, a root or a multiple
   of π equals a decimal that rounds it to six or more significant digits. `0.1\\overline{6}` and `0.1(6)` are `1/6`.
   If the truth is not whole, `3,5` is 3.5.
5. **Lists and sets** are equal in any order, tuples and intervals only in the same order. A list without brackets may
   stand for a set or a tuple; `{1,2}` is not `(1,2)`. `±2` is `2, -2`. A list with the truth and other values is
   wrong. A formula with `±` within it has two values.
   Matrices are equal cell by cell, in any brackets; `[[1, 2], [3, 4]]` is one too. A determinant is none.
6. **Relations.** `x = 3` is 3, but not `y = 3`. Equations and inequalities are compared as such: `0 ≤ x < 1` is
   `[0,1)`. `2:5` is `4:10`, but the truth `4:10` may be a time, and equals itself alone.
7. **Algebra** for all else: math-verify's parser reads both sides. Two expressions are equal if they have the same real
   values at ten fixed places. If these do not decide, math-verify's own comparison does.

A text is not a formula if it has two numbers or brackets of numbers side by side without an operator (except `1 1/2`).
Nor is a text with words among the signs, several relations without a comma between them, or letters that are not
variables, such as `IV`. These texts equal only the same text. Numbers that merely stand side by side are never added or
multiplied.

A comparison may take half a second of processor time, so a busy machine changes no verdict. An answer of over 1,000
characters, of brackets more than 8 deep, or with numbers too large to compute equals no truth. A process that the
system ends is replaced, and its answer is compared again up to twice. If that fails too, the answer scores 0. A warning
counts it, and it is not cached as wrong.
"""


def page() -> str:
    parts = [HOW]
    lines = [
        row("form of the answer", *(f"{name}: here / math-verify" for name in TRUTHS)),
        "|---" * (len(TRUTHS) + 1) + "|",
    ]
    for name in [*FORMS, *UNITS]:
        found = []
        for kind, truths in TRUTHS.items():
            if name in UNITS and kind not in VALUES:
                found.append("")
                continue
            answers = [((FORMS | UNITS)[name](truth), truth) for truth in truths]
            theirs = sum(defaults_find(*pair) for pair in answers)
            found.append(f"{sum(math_equal(answers))} / {theirs} of {len(truths)}")
        lines.append(row(f"`{name}`", *found))
    parts.append(
        "## Forms\n\nNumbers of right answers in each form that are found right, here and by math-verify 0.9.0 with "
        "its defaults.\n\n" + "\n".join(lines) + "\n"
    )
    truths = "\n".join(f"- {name}: {code(listed)}" for name, listed in TRUTHS.items())
    parts.append(f"The truths:\n\n{truths}\n")
    lines = [row("truth", "right", "wrong"), "|---|---|---|"]
    lines += [row(f"`{truth}`", code(right), code(wrong)) for truth, right, wrong in OTHERS]
    parts.append("## What is equal\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


@pytest.mark.slow
def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), f"run python {Path(__file__).name} to write it anew"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
