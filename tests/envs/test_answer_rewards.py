from __future__ import annotations

import random
import time

# ruff: noqa: E501 (tables of cases)
import numpy as np
import pytest
from growth import growth
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmenv.core.answers import Answer, AnswerKind
from vlmenv.core.errors import ConfigError
from vlmenv.core.formats import AnswerFormat
from vlmenv.envs.rewards import answers
from vlmenv.envs.rewards import math as mathematics
from vlmenv.envs.rewards.answers import (
    accuracy_reward,
    accuracy_term,
    edit_ratio,
    normalise,
    parse_answer,
    parse_number,
    parse_yes_no,
    read_answer,
)
from vlmenv.envs.rewards.letters import read_letters

KINDS: list[AnswerKind] = ["choice", "yes_no", "numeric", "exact", "math", "edit"]
TRUTHS: dict[AnswerKind, Answer] = {
    "choice": Answer("B", "choice"),
    "yes_no": Answer("yes", "yes_no"),
    "numeric": Answer("12", "numeric"),
    "exact": Answer("red car", "exact"),
    "math": Answer("\\frac{1}{2}", "math"),
    "edit": Answer("a red car", "edit"),
}


def answered(content: str) -> str:
    return f"<think>t</think><answer>{content}</answer>"


def cases(table: str) -> list[str]:
    return [case for line in table.strip().splitlines() for case in line.split(" | ")]


B = r"""
B | b | (B) | (b) | [B] | b. | B! | B) | B) cat | b) cat | (B) cat | B. cat | B.cat | B: cat | B, cat | B - cat
B – cat | B cat | The answer is B. | the answer is b | The answer is (b). | The answer is: **B** | Answer: B
Final answer: (B) 12 cm | ans. B | The correct answer is option B: a cat | The correct option is B) cat | Option B
option b | option_B | Choice (B) | I choose B | **B** | *B* | `B` | "B" | 'B' | “B” | ‘B’ | $B$ | \boxed{B}
$\boxed{B}$ | \boxed{\text{B}} | \text{(B)} | \textbf{B) cat} | \mathbf{B} | B. Vitamin C | B) Vitamin C.
B) between C and D | B. A cat | B) f(x) = 3 | It is B, not C | The answer is B, not C. | It isn't A, it is B
Neither A nor C but B | not A but B | I think it is B | A is wrong, B is right | B because A is too small | I'd say B | I'm sure: B | Therefore, B | B is correct
B, B, B | B and only B | （B） | Ｂ | Ｂ． | 1) B | Plan B | B, because I see a cat | B? Yes, B.
"""

NO_CHOICE = r"""
12 | none | A cat | A Cat | a cat | A cat and a dog | The answer is a cat | I think a dog | I see a cat
I am not sure | AB | ABC | BB | A or B | A and B | A, B | A/B | A & B | A B | A; B | (A) or (B) | A. or B.
A) cat B) dog | A. cat B. dog | Option A or B | options A and B | A, B, or C | Both A and C
choose between A and B: B | Answer is B or C | not B | It is not B. | It's not A or B | A: cat, B: dog | U.S. | B.C. | X-ray | T-shirt | D'Artagnan | B2 | 2B | é | ß | É | Я
the cat (a mammal)
"""

TWELVE = r"""
12 | 12.0 | 12. | +12 | 00012 | 12 cm | 12cm | 12 m | 12m | 12 cm² | 12 cm^2 | 12 feet^2 | 12\text{ cm}^2
12\,\mathrm{cm} | $12$ | $$12$$ | \(12\) | \[12\] | \boxed{12} | $\boxed{12}$ | **12** | \text{12} | `12` | (12)
[12] | １２ | about 12 | x = 12 | x=12 | ~12 | The answer is 12. | 12 dogs | 12 dogs and 12 cats | 12 = 12.0 | Room 12
$12 | \$12 | 12 € | 12% | 12 \% | 12 percent | 12° | 12^\circ | 12 °C | 12 km/h | area = 12 cm^2
I count 12 apples! | 1.2e1 | 1.2 \times 10^{1}
"""

HALF = r"""
0.5 | .5 | 1/2 | 1 / 2 | \frac{1}{2} | \dfrac{1}{2} | \frac12 | 1/2 = 0.5
"""

MINUS_THREE = r"""
-3 | −3 | －３ | -3.0 | x=-3 | -$3 | $-3$ | \boxed{-3} | -3 m | -6/2
"""

NO_NUMBER = r"""
twelve | nan | inf | -inf | NaN | 1e400 | -1e999 | 1/0 | 0/0 | 12 or 13 | 12, 13 | 12,13 | 12 13 | 1.2.3
1,2345 | 1,23 | 12:30 | 12/05/2020 | 3-4 | 3 - 4 | --3 | 2x | 2 x | 2y | 2i | 12a | a12 | 5th | 3D | 0x10
1_000 | 2\pi | 2π | 2 pi | \pi | 2\sqrt{3} | \sqrt{2} | √2
2*3 | 2+3 | x+3 | 3+x | 3(x+1) | 3 dozen | 2 and a half | 5 squared
square root of 16 | (3, 4) | ±3 | x > 3 | x^2=9 | - | . | , | 1/2/3 | 3 dogs and 4 cats | e5 | 1e | 12 a day
$ | \frac{1}{x}
"""

ODD = ["", "\ud800", "\x00"]


@pytest.mark.parametrize("content", [*cases(B), " B ", "B\n", "```\nB\n```"])
def test_these_choose_b(content: str) -> None:
    assert read_letters(content) == "B"
    assert accuracy_reward(answered(content), Answer("B", "choice")) == 1
    assert accuracy_reward(answered(content), Answer("C", "choice")) == 0


@pytest.mark.parametrize("content", [*cases(NO_CHOICE), *ODD, "A) cat\nB) dog", "A\nB", "A\n\nB"])
def test_these_choose_nothing(content: str) -> None:
    assert read_letters(content) is None


@pytest.mark.parametrize(
    ("content", "letter"),
    [
        ("A", "A"),
        ("a", "A"),
        ("A.", "A"),
        ("A) A cat", "A"),
        ("(A) A cat", "A"),
        ("A. I think so", "A"),
        ("The answer is A", "A"),
        ("The answer is a.", "A"),
        ("The answer is A cat", "A"),
        ("It's A.", "A"),
        ("A is correct", "A"),
        ("A because it is red", "A"),
        ("A, because it is red", "A"),
        ("I", "I"),
        ("(I)", "I"),
        ("The answer is I.", "I"),
        ("I think the answer is I", "I"),
        ("z", "Z"),
    ],
)
def test_articles_and_pronouns_may_be_letters_after_all(content: str, letter: str) -> None:
    assert read_letters(content) == letter


@pytest.mark.parametrize(
    ("content", "number"),
    [
        *[(case, 12) for case in cases(TWELVE)],
        *[(case, 0.5) for case in cases(HALF)],
        *[(case, -3) for case in cases(MINUS_THREE)],
        (" 12\n", 12),
        ("-\\frac{1}{2}", -0.5),
        ("1,234.5", 1234.5),
        ("$1,234", 1234),
        ("1{,}234", 1234),
        ("3,000,000", 3e6),
        ("50%", 50),
        ("1e3", 1000),
        ("1E-3", 0.001),
        ("3.2×10^5", 3.2e5),
        ("1e308", 1e308),
        ("0/5", 0),
        ("-0", 0),
        ("½", 0.5),
        ("1½", 1.5),
        ("1 1/2", 1.5),
        ("1\\frac{1}{2}", 1.5),
        ("1 000", 1000),
        ("10^3", 1000),
        ("2^{10}", 1024),
        ("10²", 100),
        ("1.5 million", 1.5e6),
        ("2 + 3 = 5", 5),
        ("- 3", -3),
        ("١٢", 12),
    ],
)
def test_numbers_by_hand(content: str, number: float) -> None:
    assert parse_number(content) == pytest.approx(number, rel=1e-15)


@pytest.mark.parametrize(
    "content",
    [*cases(NO_NUMBER), *ODD, "9" * 400],
)
def test_these_are_no_number(content: str) -> None:
    assert parse_number(content) is None


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("yes", "yes"),
        ("No.", "no"),
        ("YES!", "yes"),
        ("I know: yes", "yes"),
        ("**Yes**", "yes"),
        ("_no_", "no"),
        ("\\text{yes}", "yes"),
        ("Ｙｅｓ", "yes"),
        ("yes, yes", "yes"),
        ("yes: no-one is there", "yes"),
        ("Yes, there is no dog", "yes"),
        ("yes/no", None),
        ("yes or no", None),
        ("I don't know", None),
        ("nothing", None),
        ("eyes", None),
        ("noes", None),
        ("yes2", None),
        ("", None),
        ("true", "yes"),
        ("\ud800", None),
    ],
)
def test_yes_and_no_by_hand(content: str, word: str | None) -> None:
    assert parse_yes_no(content) == word


@pytest.mark.parametrize(
    ("content", "normal"),
    [
        ("The cat.", "cat"),
        ("  A   Red\nCar ", "red car"),
        ("an apple", "apple"),
        ("“the ‘Cat’”!", "cat"),
        ("**cat**", "cat"),
        ("\\boxed{\\text{The cat}}", "cat"),
        ("$x$", "x"),
        ("ﬁsh", "fish"),
        ("ｃａｔ", "cat"),
        ("x" * 10_001, "x" * 10_000),
        ("Straße", "strasse"),
        ("-3", "-3"),
        (".5", ".5"),
        ("c++", "c++"),
        ("50%", "50%"),
        ("theatre", "theatre"),
        ("f(x)", "f(x)"),
        ("the", "the"),
        ("?", "?"),
        ("", ""),
        (" \n", ""),
        ("\ud800", "\ud800"),
        ("\x00", "\x00"),
    ],
)
def test_normalised_by_hand(content: str, normal: str) -> None:
    assert normalise(content) == normal


def naive_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


@pytest.mark.parametrize(
    ("a", "b", "ratio"),
    [
        ("kitten", "sitting", 1 - 3 / 7),
        ("12 cm", "13 cm", 0.8),
        ("abc", "abc", 1.0),
        ("", "", 1.0),
        ("", "abc", 0.0),
        ("abc", "", 0.0),
        ("a", "b", 0.0),
        ("\ud800", "\ud800a", 0.5),
        ("a" * 10_001, "a" * 10_001, 1.0),
        ("a" * 10_001, "a" * 10_000, 0.0),
        ("a" * 10_000, "a" * 9_999, 0.9999),
    ],
)
def test_edit_ratio_by_hand(a: str, b: str, ratio: float) -> None:
    assert edit_ratio(a, b) == pytest.approx(ratio)
    assert edit_ratio(b, a) == pytest.approx(ratio)


@given(st.text("abc", max_size=12), st.text("abc", max_size=12))
def test_edit_ratio_of_short_texts_is_by_the_textbook(a: str, b: str) -> None:
    assert edit_ratio(a, b) == pytest.approx(1 - naive_distance(a, b) / max(len(a), len(b), 1))


def test_edit_ratio_of_long_texts_is_by_the_textbook() -> None:
    rng = np.random.default_rng(0)
    for length in (63, 64, 65, 150):
        for _ in range(5):
            a, b = ("".join(rng.choice(list("abcd"), size=length + extra)) for extra in rng.integers(0, 20, size=2))
            assert edit_ratio(a, b) == pytest.approx(1 - naive_distance(a, b) / max(len(a), len(b)))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("B", Answer("B", "choice")),
        ("(C)", Answer("C", "choice")),
        ("D.", Answer("D", "choice")),
        ("I", Answer("I", "choice")),
        ("Yes", Answer("yes", "yes_no")),
        ("no.", Answer("no", "yes_no")),
        (" 12 ", Answer("12", "numeric")),
        ("12 cm", Answer("12 cm", "numeric")),
        ("-1,234.5", Answer("-1,234.5", "numeric")),
        ("1/2", Answer("1/2", "numeric")),
        ("50%", Answer("50%", "numeric")),
        ("$5", Answer("$5", "numeric")),
        ("b", Answer("b", "exact")),
        ("A cat", Answer("A cat", "exact")),
        ("red car", Answer("red car", "exact")),
        ("iPhone 12", Answer("iPhone 12", "exact")),
        ("12 Monkeys", Answer("12 Monkeys", "exact")),
        ("1/0", Answer("1/0", "exact")),
        ("3 and 4", Answer("3 and 4", "exact")),
        ("?", Answer("?", "exact")),
    ],
)
def test_the_kind_of_a_truth_shows_in_it(text: str, answer: Answer) -> None:
    assert read_answer(text) == answer
    assert accuracy_reward(answered(text), read_answer(text)) == 1


@pytest.mark.parametrize(
    ("text", "kind", "stored"),
    [
        ("b)", "choice", "B"),
        ("(b)", "choice", "B"),
        ("NO", "yes_no", "no"),
        ("about 12", "numeric", "about 12"),
        ("12", "exact", "12"),
        ("B", "exact", "B"),
        ("9\\pi", "math", "9\\pi"),
        ("The  Cat", "edit", "The Cat"),
    ],
)
def test_the_kind_of_a_truth_may_be_given(text: str, kind: AnswerKind, stored: str) -> None:
    assert read_answer(f" {text}\n", kind) == Answer(stored, kind)
    assert read_answer(text, kind, 0.5).tolerance == (0.5 if kind == "numeric" else 0)


@pytest.mark.parametrize(
    ("text", "kind", "tolerance", "message"),
    [
        ("", None, 0, "is empty"),
        (" \n", "exact", 0, "is empty"),
        ("B) cat", "choice", 0, "'B\\) cat', which is no single letter"),
        ("12", "choice", 0, "no single letter"),
        ("É", "choice", 0, "no single letter"),
        ("maybe", "yes_no", 0, "'maybe', which is no yes or no"),
        ("many", "numeric", 0, "'many', which is no single finite number"),
        ("1e400", "numeric", 0, "no single finite number"),
        ("3 or 4", "numeric", 0, "no single finite number"),
        ("a" * 10_001, "exact", 0, "10001 characters; one of kind 'exact' may have 10000"),
        ("a" * 10_001, None, 0, "10001 characters"),
        ("1+" * 501, "math", 0, "1002 characters; one of kind 'math' may have 1000"),
        ("12", "numeric", -1, "tolerance is -1"),
        ("12", "numeric", float("nan"), "tolerance is nan"),
        ("12", "numeric", float("inf"), "tolerance is inf"),
        ("12", "numbers", 0, "unknown kind of answer 'numbers'. Did you mean 'numeric'"),
    ],
)
def test_a_truth_that_cannot_be_read_is_an_error(
    text: str, kind: AnswerKind | None, tolerance: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_answer(text, kind, tolerance)


def test_a_missing_package_is_told_when_the_truth_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mathematics, "_is_installed", lambda: False)
    assert read_answer("12").kind == "numeric"
    with pytest.raises(ConfigError, match="pip install math-verify"):
        read_answer("9\\pi", "math")
    with pytest.raises(ConfigError, match="pip install math-verify"):
        accuracy_reward(answered("1"), TRUTHS["math"])


@pytest.mark.parametrize(
    ("content", "target", "score"),
    [
        ("12 cm", Answer("12", "numeric"), 1),
        ("13 cm", Answer("12 cm", "numeric"), 0),
        ("12.4", Answer("12", "numeric", 0.5), 1),
        ("12.5", Answer("12", "numeric", 0.5), 1),
        ("12.51", Answer("12", "numeric", 0.5), 0),
        ("1.1", Answer("1", "numeric", 0.1), 1),  # 1.1 - 1 is a little more than 0.1
        ("0.1", Answer("0.3", "numeric", 0.2), 1),
        ("10000000001", Answer("10000000000", "numeric"), 0),
        ("1e308", Answer("-1e308", "numeric", 1), 0),
        ("nan", Answer("12", "numeric", 1e9), 0),
        ("yes", Answer("yes", "yes_no"), 1),
        ("I know: yes", Answer("yes", "yes_no"), 1),
        ("I know", Answer("no", "yes_no"), 0),
        ("A Red Car.", Answer("the red car", "exact"), 1),
        ("red cars", Answer("red car", "exact"), 0),
        ("", Answer("red car", "exact"), 0),
        ("a red cat", Answer("a red car", "edit"), 8 / 9),
        ("A red car", Answer("a red car", "edit"), 8 / 9),
        ("a  red\ncar", Answer("a red car", "edit"), 1),
        ("", Answer("a red car", "edit"), 0),
        ("\\frac{2}{4}", Answer("0.5", "math"), 1),
        ("\\boxed{9\\pi} cm", Answer("9\\pi", "math"), 1),
        ("12 dogs", Answer("12", "math"), 1),
        ("1e3", Answer("1000", "math"), 1),
        ("12:30", Answer("12:30", "math"), 1),
        ("9007199254740993", Answer("9007199254740992", "math"), 0),
        ("12", Answer("13", "math"), 0),
        ("", Answer("13", "math"), 0),
        ("(b)", Answer("(B)", "choice"), 1),  # a truth that was not read by read_answer
    ],
)
def test_accuracy_by_hand(content: str, target: Answer, score: float) -> None:
    assert accuracy_reward(answered(content), target) == pytest.approx(score)
    sections = AnswerFormat.SECTIONS.write(" ".join(content.split()))
    assert accuracy_reward(sections, target, AnswerFormat.SECTIONS) == pytest.approx(score)
    assert accuracy_reward(content, target) == 0


def test_a_batch_is_scored_as_one_by_one_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def recorded(pairs: list[tuple[str, str]]) -> list[bool]:
        calls.append(pairs)
        return mathematics.math_equal(pairs)

    monkeypatch.setattr(answers, "math_equal", recorded)
    contents = ["B", "yes", "12", "red car", "2\\pi/2", "a red cat", "\\pi/2", "C", "\\pi", "pi", ""]
    maths = Answer("\\pi", "math")
    targets = [*(TRUTHS[kind] if kind != "math" else maths for kind in KINDS), maths, TRUTHS["choice"], *[maths] * 4]
    texts = [answered(content) for content in contents] + ["no answer"]
    scores = accuracy_term.batch(texts, targets, [()] * len(texts), AnswerFormat.TAGS)
    assert scores == pytest.approx([1, 1, 1, 1, 1, 8 / 9, 0, 0, 1, 1, 0, 0])
    assert calls == [[(content, "\\pi") for content in ("2\\pi/2", "\\pi/2", "pi")]]
    assert scores == [accuracy_reward(text, target) for text, target in zip(texts, targets, strict=True)]
    assert accuracy_term.batch([], [], [], AnswerFormat.TAGS) == []
    assert accuracy_term.name == "accuracy"


def test_a_truth_of_the_wrong_kind_is_no_silent_zero() -> None:
    for kind, text in (("choice", "cat"), ("yes_no", "maybe"), ("numeric", "many"), ("exact", ""), ("math", " ")):
        with pytest.raises(ValueError, match=f"none of kind '{kind}'"):
            accuracy_reward(answered("12"), Answer(text, kind))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "content", "shown"),
    [
        ("choice", "(b) cat", "B"),
        ("yes_no", "Yes!", "yes"),
        ("numeric", "12 cm", 12.0),
        ("exact", "The Cat.", "cat"),
        ("math", " 9 \\pi\n", "9 \\pi"),
        ("edit", " The\nCat. ", "The Cat."),
        ("choice", "cat", None),
        ("numeric", "cat", None),
        ("exact", " ", None),
        ("math", "", None),
        ("math", "1" * 1001, None),
        ("edit", "1" * 10_001, None),
    ],
)
def test_what_is_shown_of_an_answer(kind: AnswerKind, content: str, shown: str | float | None) -> None:
    assert parse_answer(content, kind) == shown
    assert parse_answer(None, kind) is None


PIECES = r"A | B | I | a | ( | ) | . | , | : | or | and | not | answer is | 12 | - | / | 1e | \frac | { | } | \boxed{"
FRAGMENTS = st.sampled_from([*cases(PIECES), *"$%^2²'*_π \n\ud800\x00", "cm", "yes", "no", "the "])


@pytest.mark.slow
@given(st.text(st.characters()) | st.lists(FRAGMENTS).map("".join))
@settings(max_examples=300)
def test_any_text_is_read(content: str) -> None:
    for kind in KINDS:
        parse_answer(content, kind)
        if kind != "math":
            assert 0 <= accuracy_reward(answered(content), TRUTHS[kind]) <= 1
    letter, number = read_letters(content), parse_number(content)
    assert letter is None or letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    assert number is None or abs(number) < float("inf")
    normalise(content)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_number_is_read_as_written(value: float) -> None:
    assert parse_number(repr(value)) == value
    assert parse_number(f"{value:.3f}") == float(f"{value:.3f}")
    assert parse_number(f"{value:,.0f}") == float(f"{value:.0f}")


@given(st.integers(-1000, 1000), st.integers(-1000, 1000))
def test_two_numbers_are_one_only_if_equal(a: int, b: int) -> None:
    assert parse_number(f"{a} or {b}") == (a if a == b else None)


UNITS = [
    "{",
    "\\frac{",
    "(",
    "B ",
    "A or ",
    "not A or ",
    "12,",
    "1.",
    "1/",
    "yes ",
    " ",
    "$",
    "\\boxed{",
    "answer is ",
    "A, ",
    "not A, A ",
]


@pytest.mark.parametrize("unit", UNITS)
def test_reading_takes_time_in_proportion_to_the_text(unit: str) -> None:
    assert accuracy_reward(answered(unit * (10**7 // len(unit))), TRUTHS["choice"]) == 0

    def read(length: int) -> None:
        answers.read_quantity.cache_clear()
        for kind in KINDS:
            parse_answer(unit * (length // len(unit)), kind)

    assert growth(read, 600) < 32


def test_the_distance_of_long_texts_is_counted_in_whole_numbers() -> None:
    """Many times faster than cell by cell."""
    rng = random.Random(0)
    a, b = ("".join(rng.choices("abcdefgh ", k=800)) for _ in range(2))
    started = time.thread_time()
    assert edit_ratio(a, b) == pytest.approx(1 - naive_distance(a, b) / 800)
    slow = time.thread_time() - started
    started = time.thread_time()
    edit_ratio(a, b)
    assert time.thread_time() - started < slow / 10
