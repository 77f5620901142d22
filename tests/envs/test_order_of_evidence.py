# ruff: noqa: E501 (tables of cases)
"""Answers as models and people write them, with what a careful reader makes of them: right, or not."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmenv.core.answers import Answer
from vlmenv.core.formats import AnswerFormat
from vlmenv.envs.rewards.answers import accuracy_reward, read_answer, read_answers

COLOURS = ("red", "blue", "green", "yellow")
SOLUTIONS = ("neither", "Solution A", "Solution B")
LENGTHS = ("12 cm", "13 cm", "12 km", "1.3 cm")
FORMULAS = (r"$2 \pi$", r"$\frac{3}{2}$", r"$\sqrt{2}: 1$", r"$2\sqrt{3}$")
ANIMALS = ("a cat", "a black cat", "no cat", "none of the above")
CHINESE = ("红色", "蓝色", "深红色", "以上都不对")


def score(content: str, truth: Answer) -> float:
    return accuracy_reward(AnswerFormat.TAGS.write(content, "t"), truth)


def lines(table: str) -> list[str]:
    return [case for line in table.strip().splitlines() for case in line.split(" | ")]


A_IS_CHOSEN = r"""
A | a | (A) | [A] | {A} | A. | A) | A） | （A） | 【A】 | Ａ | Ⓐ | A、 | A。 | **A** | __A__ | `A` | "A" | “A” | <b>A</b> | $A$
$\boxed{A}$ | \boxed{A} | \boxed{(A)} | \boxed{\text{A}} | \boxed{\text{(A)}} | \boxed{\mathrm{A}} | \boxed{A.} | \boxed{A: red}
\fbox{A} | \(\boxed{A}\) | \[\boxed{A}\] | $$\boxed{\textbf{(A)}}$$ | \boxed{\textbf{(A)}\ \text{red}} | \textbf{A} | \mathbf{(A)}
A. red | A) red | (A) red | A: red | A - red | A, red | A – red | A red | Option A | option (a) | Choice A | choice A: red
The answer is A | The answer is A. | the answer is: A | The answer is (A). | The answer is: **A** | Answer: A | ANSWER: A | Ans: A
Final answer: A | The final answer is $\boxed{A}$. | The correct answer is A, because the car is red. | The correct option is A.
So the answer is A | Therefore, the answer is A. | Hence A | My answer is A. | I choose A | I pick option A | I would select (A).
I think it is A | It's A. | It must be A | It is A, not B | A, not B | A rather than B | A instead of B | not B but A
Not B, A | B is wrong, so A | B is wrong, so \boxed{A} | B is incorrect. A is correct. | B isn't right; A is. | It can't be B, so it is A
It is neither B nor C but A | Neither B, C nor D: A | B can be ruled out. The answer is A | B and C are wrong. A | Since B is wrong, A.
B doesn't fit, so the answer is A. | I first thought of B, but the answer is A. | At first B. The answer is A | A is right
A is the correct answer | A is correct because it shows red | A because B is too dark | A, since C shows green | The answer is A as B is blue
Options B and C are wrong, therefore \boxed{A} | The answer is not B but A | The answer is not B. The answer is A.
\boxed{B}? No, that is wrong. \boxed{A} | First \boxed{B}, but no, it has to be \boxed{A} | The answer is B... wait, the answer is A
答案是A | 答案：A | 答案为A。 | 答案:（A） | 正确答案是A | 正确答案是：A。 | 所以答案是A | 因此，答案为A | 故选A | 故选：A | 故选（A）。 | 应选A
选A | 选择A | 我选A | 选项A | A选项 | A项正确 | 本题选A | 所以选A。 | 最终答案：A | 不是B，是A | B错误，所以选A | 排除B，选A | B不对，答案是A
red | Red | RED. | "red" | $\text{red}$ | \boxed{red} | \boxed{\text{red}} | The answer is red. | It is red. | The car is red. | the red
It's red, not blue | not blue but red | red, because the car is red | The answer is \boxed{\text{red}} | Blue is wrong. It is red.
"""
NOT_A = r"""
B | (B) | b | E | \boxed{B} | 答案是B | The answer is B. | blue | A or B | A or b | a or b | A and B | A, B | A/B | A & B | A; B | A B
A, b, c, d | A, B, C, D | A,B,C,D | A. B. C. D. | A B C D | a b c d | ABCD | AB | (A)(B)(C)(D) | (A), (B), (C), (D) | A、B、C、D | A或B | A和B
A. red B. blue C. green D. yellow | (A) red (B) blue (C) green (D) yellow | A: red, B: blue, C: green, D: yellow
red, blue, green, yellow | red or blue | red and blue | red/blue | either red or blue | Either A or B | Both A and B | A or B or C or D
not A | Not A. | It is not A | It isn't A. | It cannot be A | It can't be A. | It could not be A | The answer is not A | The answer isn't A.
A is wrong | A is wrong. | A is incorrect | A is not correct | A is not right. | A isn't the answer | A is not the answer. | A cannot be right
A can be ruled out | A is excluded | A is impossible. | A doesn't fit | I do not think it is A | I don't think the answer is A
It is anything but B and not A | Neither A nor B | neither A nor B nor C | everything except A | B rather than A | B instead of A
Answer: not A | \boxed{\text{not A}} | not \boxed{A} | \boxed{A} is wrong | \boxed{A or B} | \boxed{A} or \boxed{B} | \boxed{A}, \boxed{B}
\boxed{A}\boxed{B} | \boxed{A, B, C, D} | \boxed{ABCD} | \boxed{A} or B | A or \boxed{B} | A, but the answer is B | The answer is A or B
The answer is A. The answer is B. | \boxed{A} \boxed{B} \boxed{C} \boxed{D} | A is right, so \boxed{B} | \boxed{B}, that is red
The answer is A, B, C or D | The answer is A / B / C / D. | The answer is A. B. C. D. | The answer could be A or B
Which colour? A. red B. blue C. green D. yellow | What colour is the car? (A) red (B) blue (C) green (D) yellow
A. blue | A) blue | (A) blue | not red | It is not red. | it isn't red | Neither red nor blue | reddish | infrared | The answer is not red
不是A | 不选A | A不对 | A错误 | A是错的 | 排除A | 答案不是A | A或B都可以 | 选A或B | 答案是A、B、C、D | 不可能是A
I don't know | none | | . | ? | all of them | All | any | the first | 1 | Answer | \boxed{} | the answer is unclear | maybe
"""


@pytest.mark.parametrize("content", [*lines(A_IS_CHOSEN), "A\nred", "A\n\nBecause it is red", "Because it is red:\nA"])
def test_these_choose_the_first(content: str) -> None:
    assert score(content, read_answer("A", "choice", choices=COLOURS)) == 1
    assert score(content, read_answer("red", choices=COLOURS)) == 1
    assert score(content, read_answer("B", "choice", choices=COLOURS)) == 0


@pytest.mark.parametrize("content", [*lines(NOT_A), "A\nB\nC\nD", "A. red\nB. blue\nC. green\nD. yellow", "A\nB"])
def test_these_do_not_choose_the_first(content: str) -> None:
    assert score(content, read_answer("A", "choice", choices=COLOURS)) == 0


NAMED_BY_LETTER = [case for case in lines(A_IS_CHOSEN) if "A" in case.replace("ANS", "") and case != "A red"]


@pytest.mark.parametrize("content", NAMED_BY_LETTER)
def test_letters_need_no_choices(content: str) -> None:
    assert score(content, Answer("A", "choice")) == 1


@pytest.mark.parametrize("content", [case for case in lines(NOT_A) if case not in ("A. blue", "A) blue", "(A) blue")])
def test_without_choices_the_same_do_not_choose(content: str) -> None:
    assert score(content, Answer("A", "choice")) == 0


@pytest.mark.parametrize(
    ("content", "choices", "letter"),
    [
        ("Solution A", SOLUTIONS, "B"),
        ("Solution B", SOLUTIONS, "C"),
        ("solution a", SOLUTIONS, "B"),
        ("The answer is Solution A.", SOLUTIONS, "B"),
        ("Solution A has the higher concentration", SOLUTIONS, "B"),
        ("\\boxed{\\text{Solution A}}", SOLUTIONS, "B"),
        ("B. Solution A", SOLUTIONS, "B"),
        ("(B) Solution A", SOLUTIONS, "B"),
        ("(C) Solution B", SOLUTIONS, "C"),
        ("A. neither", SOLUTIONS, "A"),
        ("neither", SOLUTIONS, "A"),
        ("neither of them", SOLUTIONS, "A"),
        ("D", SOLUTIONS, None),
        ("Solution A or Solution B", SOLUTIONS, None),
        ("Solution A, not Solution B", SOLUTIONS, "B"),
        ("C. Solution A", SOLUTIONS, None),
        ("12 cm", LENGTHS, "A"),
        ("12 km", LENGTHS, "C"),
        ("120 mm", LENGTHS, "A"),
        ("12", LENGTHS, None),
        ("13", LENGTHS, "B"),
        ("12.0 cm", LENGTHS, "A"),
        ("12 m", LENGTHS, None),
        ("1.3", LENGTHS, "D"),
        ("The length is 13 cm.", LENGTHS, "B"),
        ("It is 1.3 cm long", LENGTHS, "D"),
        ("\\boxed{12\\text{ cm}}", LENGTHS, "A"),
        ("\\boxed{14 cm}", LENGTHS, None),
        ("I measure 13 cm first, but \\boxed{14}", LENGTHS, None),
        ("The answer is 14 cm", LENGTHS, None),
        ("2\\pi", FORMULAS, "A"),
        ("2π", FORMULAS, "A"),
        ("$2\\pi$.", FORMULAS, "A"),
        ("The area is \\boxed{2 \\pi}.", FORMULAS, "A"),
        ("3/2", FORMULAS, "B"),
        ("1.5", FORMULAS, "B"),
        ("\\dfrac{3}{2}", FORMULAS, "B"),
        ("\\frac32", FORMULAS, "B"),
        ("√2:1", FORMULAS, "C"),
        ("\\sqrt{2} : 1", FORMULAS, "C"),
        ("2√3", FORMULAS, "D"),
        ("2\\sqrt3", FORMULAS, "D"),
        ("\\boxed{2\\sqrt{2}}", FORMULAS, None),
        ("\\pi", FORMULAS, None),
        ("2", FORMULAS, None),
        ("3", FORMULAS, None),
        ("a cat", ANIMALS, "A"),
        ("cat", ANIMALS, "A"),
        ("a black cat", ANIMALS, "B"),
        ("There is a black cat", ANIMALS, "B"),
        ("no cat", ANIMALS, "C"),
        ("None of the above", ANIMALS, "D"),
        ("D. None of the above", ANIMALS, "D"),
        ("A black cat", ANIMALS, "B"),
        ("红色", CHINESE, "A"),
        ("红色。", CHINESE, "A"),
        ("答案是红色", CHINESE, "A"),
        ("深红色", CHINESE, "C"),
        ("是蓝色的", CHINESE, "B"),
        ("不是红色，是蓝色", CHINESE, "B"),
        ("红色或蓝色", CHINESE, None),
        ("红色、蓝色、深红色", CHINESE, None),
        ("C. 深红色", CHINESE, "C"),
        ("D、以上都不对", CHINESE, "D"),
        ("Q", ("P", "Q", "R", "S", "none"), "B"),
        ("point Q", ("P", "Q", "R", "S", "none"), "B"),
        ("The answer is R.", ("P", "Q", "R", "S", "none"), "C"),
        ("II", ("I", "II", "III"), "B"),
        ("I", ("II", "I"), "B"),
        ("Yes", ("Yes", "No"), "A"),
        ("No.", ("Yes", "No"), "B"),
        ("Yes, there is no cat", ("Yes", "No"), "A"),
        ("B. No", ("Yes", "No"), "B"),
        ("Yes or no", ("Yes", "No"), None),
        ("True", ("True", "False"), "A"),
        ("The statement is false.", ("True", "False"), "B"),
        ("-3", ("3", "-3"), "B"),
        ("3", ("3", "-3"), "A"),
        ("x = -3", ("3", "-3"), "B"),
        ("5", ("5%", "50%"), "A"),
        ("50 percent", ("5%", "50%"), "B"),
        ("0.5", ("1/2", "1/4"), "A"),
        ("1,000", ("100", "1000"), "B"),
        ("30 degrees", ("30°", "60°"), "A"),
        ("60", ("$30^{\\circ}$", "$60^{\\circ}$"), "B"),
        ("(4, 3)", ("(3, 4)", "(4, 3)"), "B"),
        ("x > 3", ("x < 3", "x > 3"), "B"),
        ("7:30", ("7:30", "19:30"), "A"),
        ("three", ("two", "three"), "B"),
        ("It turns clockwise", ("clockwise", "counterclockwise"), "A"),
        ("counterclockwise", ("clockwise", "counterclockwise"), "B"),
        ("the United States", ("United States", "Canada"), "A"),
        ("<image2>", ("<image1>", "<image2>"), "B"),
        ("(B)", ("<image1>", "<image2>"), "B"),
        ("b", ("(A)", "(B)"), "B"),
        ("(D)\n\nSquare C has 3 sides", ("A)", "B)", "C)", "D)"), "D"),
        ("The shape that cannot be folded is (D).", ("A", "B", "C", "D"), "D"),
        ("It is 12 + 18 = 30", ("12", "18", "30"), "C"),
        ("$12+18=\\boxed{30}$", ("12", "18", "30"), "C"),
        ("The total is \\boxed{45}.The answer is: (C)", ("12", "18", "30"), "C"),
        ("\\boxed{5\\sqrt{5}-10}", ("1", "$5(\\sqrt{5}-2)$"), "B"),
        ("$\\boxed{\\frac{B^2}{4}}$", ("$\\frac{1}{4}$", "$\\frac{1}{5}$"), None),
        ("the letters A to K are not given", ("F", "K"), None),
        ("None of the choices (A-E) can be deduced", ("2", "3", "4"), None),
        ("\\boxed{\\frac{a+b}{2}}", ("$2(a+b)$", "$a+b$"), None),
        ("96", ("$3^6$", "$3 \\cdot 2^{5}$"), "B"),
    ],
)
def test_choices_go_before_letters(content: str, choices: tuple[str, ...], letter: str | None) -> None:
    for truth in "ABCDE"[: len(choices)]:
        expected = letter is not None and truth == letter
        assert score(content, read_answer(truth, "choice", choices=choices)) == expected, truth


@pytest.mark.parametrize("content", ["18", "C", "D", "(d)", "D. 18", "C) 18", "\\boxed{18}", "The answer is C."])
def test_equal_choices_are_one(content: str) -> None:
    for truth in ("C", "D", "18"):
        assert score(content, read_answer(truth, "choice", choices=("9", "12", "18", "18"))) == 1
        assert score(content, read_answer(truth, "choice", choices=("9", "12", "$18$", "18"))) == 1
    assert score(content, read_answer("B", "choice", choices=("9", "12", "18", "18"))) == 0


SETS = r"""
A, C | C, A | A,C | A and C | C and A | A & C | A/C | A、C | A；C | AC | A C | (A), (C) | (A)(C) | [A, C] | {A, C} | a, c
\boxed{A, C} | \boxed{AC} | \boxed{A}, \boxed{C} | \boxed{A} and \boxed{C} | The answer is A and C. | The answers are A and C | Answer: A, C
A and C, not B | A and C are correct | 答案是A、C | 答案：AC | 选AC | 故选A和C | A. red, C. green | A) red C) green | red and green | green, red
B is wrong, so A and C
"""
OTHER_SETS = r"""
A | C | B | A, B | A, B, C | A, B, C, D | ABCD | ABC | A or C | either A or C | A, D | none | red | red, blue | red or green | not A and C
neither A nor C | \boxed{A} | \boxed{A} or \boxed{C} | 答案是A | A或C | A和B | A and C are wrong
"""


@pytest.mark.parametrize("truth", ["A, C", "A,C", "AC", "C, A", "A and C", "(A), (C)", "A、C", "CA"])
def test_several_letters_are_a_set(truth: str) -> None:
    target = read_answer(truth, "choice", choices=COLOURS)
    assert target == Answer("A, C", "choice", choices=COLOURS)
    assert [case for case in [*lines(SETS), "A. red\nC. green", "A\nC"] if score(case, target) != 1] == []
    assert [case for case in lines(OTHER_SETS) if score(case, target) != 0] == []


def test_several_letters_without_choices() -> None:
    target = read_answer("A, C")
    assert target == Answer("A, C", "choice")
    assert [case for case in lines(SETS) if "A" in case and score(case, target) != 1] == []
    assert [case for case in lines(OTHER_SETS) if score(case, target) != 0] == []


YES = r"""
yes | Yes. | YES! | **Yes** | \boxed{yes} | \boxed{\text{Yes}} | $\boxed{\text{Yes}}$ | Yes, it is. | Yes, there is no cat. | Yes: no dog is there
Yes - it is. | The answer is yes. | The answer is: Yes | Answer: yes | I know: yes | so yes | I think yes | Not sure at first. The answer is yes
There is no doubt: \boxed{yes} | No cat is there, so the answer is yes | true | True. | 是 | 是的 | 是。 | 答案是“是” | 答案：是 | 对 | 有
Is it red? Yes. | yes, yes | "yes" | <b>Yes</b> | Ｙｅｓ | Yes\n
"""
NOT_YES = r"""
no | No. | yes or no | yes/no | yes and no | Yes, no | no, yes | Yes. No. | \boxed{no} | \boxed{yes} or \boxed{no} | \boxed{yes/no} | not yes
The answer is not yes | The answer is no. | yes, but the answer is no | Yes! Answer: no | The answer is yes or no | maybe | I don't know | eyes
yesterday | | 否 | 不是 | 不对 | 答案是否 | 没有 | it isn't a yes | yes, but \boxed{no} | false | neither yes nor no | unknown
"""


@pytest.mark.parametrize("content", lines(YES))
def test_these_say_yes(content: str) -> None:
    assert score(content, Answer("yes", "yes_no")) == 1
    assert score(content, Answer("no", "yes_no")) == 0


@pytest.mark.parametrize("content", lines(NOT_YES))
def test_these_do_not_say_yes(content: str) -> None:
    assert score(content, Answer("yes", "yes_no")) == 0


TWELVE = r"""
12 | 12. | 12.0 | １２ | $12$ | \boxed{12} | $5+7=\boxed{12}$ | There are 3 rows of 4, so \boxed{12} | \boxed{12\text{ dogs}} | \boxed{x = 12}
The answer is 12. | The answer is: 12 | 3 and 9, so the answer is 12. | Answer: 12 dogs | 5 + 7 = 12 | 12 dogs | 12 cm | about 12 | x = 12 | ≈12
答案是12 | 答案：12个 | 共12个 | 12个 | 有12只狗 | 12。 | I count 12 apples! | 24/2 | \frac{24}{2} | 1.2e1 | $12.00
First \boxed{11}, then corrected: \boxed{12} | I see 12 of them
"""
NOT_TWELVE = r"""
13 | 1 2 | 12 13 | 11, 12, 13 | 12 or 13 | 10 11 12 13 | 1 2 3 4 5 6 7 8 9 10 11 12 | \boxed{12} or \boxed{13} | \boxed{12, 13} | \boxed{13}
12, but the answer is 13 | 12 so \boxed{13} | The answer is 12 or 13 | between 12 and 13 | not 12 | It is not 12 | more than 12 | at least 12 | 12-13
-12 | 12.5 | 120 | 1.2 | 12:30 | 12x | 6 6 | 7 5 | 7⏎5 | (6)(2) | twelve or so | | 12 dogs and 13 cats | 11 or 12 | ±12 | 12 or more
"""


@pytest.mark.parametrize("content", lines(TWELVE))
def test_these_say_twelve(content: str) -> None:
    assert score(content, Answer("12", "numeric")) == 1


@pytest.mark.parametrize("content", lines(NOT_TWELVE))
def test_these_do_not_say_twelve(content: str) -> None:
    assert score(content.replace("⏎", "\n"), Answer("12", "numeric")) == 0


@pytest.mark.parametrize(
    ("content", "truth", "right"),
    [
        ("5 m", "5 km", False),
        ("5000 m", "5 km", True),
        ("5", "5 km", True),
        ("It is 5 m long.", "5 km", False),
        ("It is 5 km long.", "5 km", True),
        ("300 g", "300 kg", False),
        ("300 kg", "300", True),
        ("5°F", "5°C", False),
        ("1,234.50 dollars", "$1234.5", True),
        ("50 percent", "50%", True),
        ("red", "red", True),
        ("The answer is red.", "red", True),
        ("\\boxed{\\text{red}}", "red", True),
        ("答案是红色。", "红色", True),
        ("“红色”", "红色", True),
        ("《红楼梦》", "红楼梦", True),
        ("blue. The answer is red", "red", True),
        ("red. The answer is blue", "red", False),
        ("red or blue", "red", False),
        ("red, blue", "red", False),
        ("not red", "red", False),
        ("The answer is not red", "red", False),
        ("don’t walk", "don't walk", True),
        ("3,4,5", "[3, 4, 5]", True),
        ("[3,4,5]", "3, 4, 5", True),
        ("[0, 1)", "(0, 1]", False),
        ("true", "True", True),
        ("No", "false", True),
    ],
)
def test_units_and_words(content: str, truth: str, right: bool) -> None:
    assert score(content, read_answer(truth)) == right


def test_any_accepted_answer_is_right() -> None:
    target = read_answers(["red", "crimson", "red"])
    assert [score(content, target) for content in ("red", "Crimson.", "The answer is crimson", "blue")] == [1, 1, 1, 0]
    assert [score(content, target) for content in ("red, crimson", "red or crimson", "red crimson", "")] == [0] * 4
    mixed = read_answers(["5", "five"])
    assert [score(content, mixed) for content in ("5", "five", "5.0", "Five.", "6", "five six")] == [1, 1, 1, 1, 0, 0]
    near = read_answers(["a red car", "red car"], "edit")
    assert score("red car", near) == 1


# What would earn a reward without an answer.


@pytest.mark.slow
@given(st.permutations("ABCD"), st.sampled_from([" ", ", ", "\n", ". ", " or ", "/", ""]), st.sampled_from("ABCD"))
@settings(max_examples=200)
def test_naming_all_letters_is_no_answer(letters: list[str], between: str, truth: str) -> None:
    for content in (between.join(letters), between.join(f"({letter})" for letter in letters)):
        for written in (content, f"The answer is {content}", f"\\boxed{{{content}}}", content.lower()):
            assert score(written, Answer(truth, "choice")) == 0
            assert score(written, read_answer(truth, "choice", choices=COLOURS)) == 0


@given(st.permutations(COLOURS), st.sampled_from([" ", ", ", "\n", " or ", " and ", "/"]), st.sampled_from("ABCD"))
@settings(max_examples=100)
def test_naming_all_choices_is_no_answer(colours: list[str], between: str, truth: str) -> None:
    content = between.join(colours)
    for written in (content, f"The answer is {content}", f"\\boxed{{{content}}}"):
        assert score(written, read_answer(truth, "choice", choices=COLOURS)) == 0
        assert score(written, read_answer(colours[0])) == 0


@given(
    st.lists(st.integers(0, 30), min_size=2, max_size=8, unique=True), st.sampled_from([" ", ", ", "\n", " or ", "/"])
)
@settings(max_examples=200)
def test_naming_several_numbers_is_no_answer(numbers: list[int], between: str) -> None:
    content = between.join(map(str, numbers))
    for written in (content, f"The answer is {content}", f"\\boxed{{{content}}}"):
        if between == "/" and len(numbers) == 2:
            continue  # a fraction
        assert all(score(written, Answer(str(number), "numeric")) == 0 for number in numbers)


def test_both_yes_and_no_are_no_answer() -> None:
    for first, second in itertools.permutations(("yes", "no")):
        for between in (" ", ", ", "/", " or ", " and ", "\n", ". "):
            for written in (f"{first}{between}{second}", f"The answer is {first}{between}{second}"):
                assert score(written, Answer("yes", "yes_no")) == 0, written
                assert score(written, Answer("no", "yes_no")) == 0, written


HOSTILE = [
    *"()[]{}$^_%°#`|&~\n\ud800\x00\ue000\ue0ff🙂ﷺ２ß或，。：",
    *[
        r"\frac{",
        r"\boxed{",
        r"\text{",
        r"answer is",
        r"The answer is",
        r"答案是",
        r"选",
        r"not",
        r"n't",
        r"or",
        r"and",
        r"because",
        r"wrong",
        r"B",
        r"C",
        r"b)",
    ],
    *["12", "1e9", "9^{9^{9^9}}", "-/", "no", "false", "没有", "blue", "green", "<b>", "</b>", "**", "is", "cm"],
]


@pytest.mark.slow
@given(st.lists(st.sampled_from(HOSTILE), max_size=40).map(" ".join))
@settings(max_examples=300)
def test_no_hostile_answer_scores_without_the_right_content(content: str) -> None:
    truths = [
        Answer("D", "choice"),
        read_answer("A", choices=COLOURS),
        Answer("yes", "yes_no"),
        Answer("17", "numeric"),
    ]
    truths += [Answer("red car", "exact"), read_answers(["crimson", "scarlet"])]
    assert [score(content, truth) for truth in truths] == [0] * len(truths)
