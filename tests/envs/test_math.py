from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from typing import Any

import gymnasium
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmenv.core.answers import Answer
from vlmenv.core.errors import ConfigError
from vlmenv.envs.rewards import math as module
from vlmenv.envs.rewards.answers import accuracy_reward
from vlmenv.envs.rewards.math import math_equal, start_math
from vlmenv.envs.rewards.workers import Losses

EQUAL = [  # answer, truth
    ("11", "11"),
    ("$11$", "11"),
    ("11", "$11$"),
    ("11.", "11"),
    ("$11.$", "11"),
    ("**11**", "11"),
    ("1,234", "1234"),
    ("-3", "−3"),
    ("1/2", "0.5"),
    ("0.5", "\\frac{1}{2}"),
    ("7/3", "\\frac{7}{3}"),
    ("\\frac73", "7/3"),
    ("0.333333", "1/3"),
    ("1 1/2", "\\frac{3}{2}"),
    ("1\\frac{1}{2}", "3/2"),
    ("2^{10}", "1024"),
    ("3\\times10^3", "3000"),
    ("9\\pi", "9\\pi"),
    ("9π", "9\\pi"),
    ("9 pi", "9\\pi"),
    ("9$\\pi$", "9\\pi"),
    ("\\[9\\pi\\]", "9\\pi"),
    ("\\boxed{9\\pi}", "9\\pi"),
    ("$\\boxed{9\\pi}$", "9\\pi"),
    ("\\boxed{\\boxed{9\\pi}}", "9\\pi"),
    ("The answer is 9\\pi.", "9\\pi"),
    ("The area is $9\\pi$.", "9\\pi"),
    ("The area of $ABC$ is 9\\pi", "9\\pi"),
    ("9\\pi cm", "9\\pi"),
    ("9\\pi\\text{ cm}^2", "9\\pi"),
    ("9\\pi", "9\\pi\\,\\mathrm{cm}"),
    ("2\\sqrt{3} m", "2\\sqrt{3}"),
    ("12 cm", "12"),
    ("12", "12 cm"),
    ("12 s", "12"),
    ("60^\\circ", "60°"),
    ("60", "60^\\circ"),
    ("12%", "12"),
    ("12\\%", "0.12"),
    ("50%", "1/2"),
    ("$5", "5"),
    ("\\$5", "5"),
    ("√2", "\\sqrt{2}"),
    ("√12", "2\\sqrt{3}"),
    ("√½", "\\frac{\\sqrt{2}}{2}"),
    ("¾²", "9/16"),
    ("1½ cm", "15 mm"),
    ("sqrt(2)", "\\sqrt2"),
    ("x=3", "3"),
    ("3", "x=3"),
    ("x = 3", "$x=3$"),
    ("$x$ = 3", "3"),
    ("2x+y=3", "3"),  # but not the other way round
    ("x=3 or x=4", "x=4, x=3"),
    ("(3, 4)", "3,4"),
    ("3,4", "(3,4)"),
    ("\\{1,2\\}", "\\{2,1\\}"),
    ("3<x", "x>3"),
    ("x²", "x^2"),
    ("(x-1)(x+1)", "x^2-1"),
    ("x^2+2x+1", "(x+1)^2"),
    ("\\text{east}", "east"),
    ("No solution", "\\text{no solution}"),
]
UNEQUAL = [
    ("13", "12"),
    ("13 cm", "12 cm"),
    ("9", "9\\pi"),
    ("9\\pi", "9"),
    ("9\\pi)", "9"),
    ("$9\\pi)$", "9"),
    ("x = 9\\pi)", "9"),
    ("The answer is $9\\pi)$", "9"),
    ("$9\\pi", "9"),
    ("1 1/2", "1"),
    ("5t", "5"),
    ("5", "5t"),
    ("5s", "5"),
    ("0.3333", "1/3"),
    ("3 or 4", "3"),
    ("$3$ or $4$", "3"),
    ("\\boxed{3} or \\boxed{4}", "3"),
    ("\\boxed{3}\\boxed{4}", "3"),
    ("3", "3 or 4"),
    ("3,4", "3"),
    ("12 13", "12"),
    ("I get 3 then 4", "3"),
    ("(4,3)", "(3,4)"),
    ("y=3", "x=3"),
    ("3", "2x+y=3"),
    ("x=4", "x=3"),
    ("act", "cat"),
    ("dog", "cat"),
    ("x>4", "x>3"),
    ("", "3"),
    (" ", "3"),
    ("$$", "3"),
    ("\\boxed{}", "3"),
    ("\x00", "3"),
    ("\ud800", "3"),
    ("nan", "3"),
    ("1e308", "3"),
    ("1/0", "3"),
    ("10^½", "5"),
    ("1/½", "1/2"),
    ("¾²", "3/16"),
    ("\\infty", "3"),
    ("3" * 1001, "3" * 1001),
]
BOMBS = [
    "9^{9^{9^9}}",
    "9^9^9^9",
    "9 ^ { 9 ^ { 9 ^ 9 } }",
    "10^{10000000}",
    "9" * 990,
    "\\frac{" * 10_000,
    "[" * 10**7,
    "(" * 900,
    "(" * 10**7,
    "\\boxed{" * 10**6,
    "((9!)!)!",
    "{((9!)!)!}",
    "(12!)!",
    "9! ! !",
    "(9^{9})!",
    "(10^{99})!",
    "\\binom{10^6}{500000}",
]
NO_BOMBS = [("(3!)!", "720"), ("(2^{3})!", "40320"), ("\\binom{10}{3}", "120"), ("6!", "720"), ("((9!)!)!", "((9!)!)!")]
SLOW_BOMBS = ["9^{9^9}", "(x+y+z)^{60}"]


@pytest.fixture(autouse=True, scope="module")
def started() -> None:
    start_math()


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], bool]:
    cache: dict[tuple[str, str], bool] = {}
    monkeypatch.setattr(module, "_cache", cache)
    return cache


class Recorder:
    """Stands in for the workers, and says that all is equal."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def map(self, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        self.asked += [(arguments[i][0], arguments[i][1]) for i in range(len(arguments))]
        return [True] * len(arguments)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch, no_cache: dict[tuple[str, str], bool]) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(module, "_workers", recorder)
    return recorder


def test_equality_by_hand() -> None:
    found = math_equal(EQUAL + UNEQUAL)
    assert [pair for pair, is_equal in zip(EQUAL, found, strict=False) if not is_equal] == []
    assert [pair for pair, is_equal in zip(UNEQUAL, found[len(EQUAL) :], strict=True) if is_equal] == []


def test_small_factorials_are_no_bombs() -> None:
    assert math_equal(NO_BOMBS) == [True] * len(NO_BOMBS)


def test_bombs_are_not_even_tried(recorder: Recorder) -> None:
    assert math_equal([(bomb, "12") for bomb in BOMBS]) == [False] * len(BOMBS)
    assert recorder.asked == []
    assert not module._cache  # which would be a lot to keep
    assert math_equal([("2^{2^3}", "256"), ("x^2+x^3", "x^3+x^2+0")]) == [True] * 2
    assert len(recorder.asked) == 2


def test_accuracy_takes_any_text() -> None:
    for bomb in [*BOMBS, "\ud800", "\x00", "\\boxed{" * 1000 + "}" * 1000]:
        assert accuracy_reward(f"<think></think><answer>{bomb}</answer>", Answer("12", "math")) == 0


def test_each_pair_is_asked_once(recorder: Recorder) -> None:
    a, b, c = "x+1", "2x", "x-y"
    assert math_equal([(a, b), (a, c), (a, b)]) == [True] * 3
    assert math_equal([(a, c), (b, c), (c, a)]) == [True] * 3
    assert recorder.asked == [(a, b), (a, c), (b, c), (c, a)]
    assert math_equal([]) == []


def test_numbers_and_words_are_compared_without_a_process(recorder: Recorder) -> None:
    pairs = [
        ("5.0", "5"),
        ("6", "5"),
        ("\\boxed{50\\text{ mm}}", "5 cm"),
        ("7 3", "10"),
        ("west", "east"),
        ("1,2", "(1,2)"),
    ]
    assert math_equal(pairs) == [True, False, True, False, False, True]
    assert recorder.asked == []


def test_no_more_than_so_many_results_are_kept(
    recorder: Recorder, no_cache: dict[tuple[str, str], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CACHED", 3)
    assert math_equal([(f"x+{i}", "y") for i in range(10)]) == [True] * 10
    assert list(no_cache) == [(f"x+{i}", "y") for i in range(7, 10)]


def test_it_works_beside_the_main_thread() -> None:
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.extend(math_equal([("\\frac{4}{8}", "0.5"), ("1", "2\\pi")])))
    thread.start()
    thread.join(20)
    assert results == [True, False]


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str], no_cache: dict[tuple[str, str], bool]) -> None:
    math_equal([("\\foo{", "12"), ("\\frac{4}{8}", "0.5")])
    assert capfd.readouterr() == ("", "")


def test_without_the_package_there_is_an_error_and_no_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    module._is_installed.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    try:
        for needs_it in (start_math, lambda: math_equal([("1", "1")])):
            with pytest.raises(ConfigError, match="pip install math-verify"):
                needs_it()
    finally:
        module._is_installed.cache_clear()


@given(
    st.lists(
        st.tuples(st.text(st.characters(), max_size=30), st.text("0123456789x+-*/^{}()$\\, =π", max_size=12)),
        max_size=3,
    )
)
@settings(max_examples=20, deadline=None)
def test_any_texts_are_compared(pairs: list[tuple[str, str]]) -> None:
    assert all(type(is_equal) is bool for is_equal in math_equal(pairs + [(b, a) for a, b in pairs]))


def test_bombs_that_are_tried_take_bounded_time(no_cache: dict[tuple[str, str], bool]) -> None:
    pairs = [(bomb, "12") for bomb in SLOW_BOMBS]
    assert math_equal([*pairs, ("\\frac{24}{2}", "12")]) == [False, False, True]
    assert {pair: no_cache.get(pair) for pair in pairs} == dict.fromkeys(pairs, False)  # remembered


def test_a_comparison_that_was_given_up_by_the_clock_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that stood still for a moment must not call a right answer wrong for ever."""
    pair = ("x+y+17", "y+x+17")

    class Stalled:
        def map(self, pairs: list[tuple[str, str]]) -> list[object]:
            return [TimeoutError()] * len(pairs)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_workers", Stalled())
        losses = Losses()
        patch.setattr(module, "LOSSES", losses)
        with pytest.warns(RuntimeWarning, match="some answers score 0 without having been compared"):
            assert math_equal([pair, pair, ("2", "2")]) == [False, False, True]
        with warnings.catch_warnings(action="error"):  # it is told once
            assert math_equal([pair]) == [False]
        assert losses.answers == 3
    assert math_equal([pair]) == [True]


@pytest.mark.slow
def test_a_comparison_whose_process_the_system_ends_is_made_again(no_cache: dict[tuple[str, str], bool]) -> None:
    math_equal([("x+y+18", "y+x+18")])  # starts a process
    before = module._workers.lost
    for worker in list(module._workers._all):
        worker.process.kill()
        worker.process.wait()
    assert math_equal([("x+y+19", "y+x+19")]) == [True]
    assert module._workers.lost == before  # it was idle, and has been replaced


def nested(opening: str, closing: str, inner: str = "1") -> str:
    return opening * 18 + inner + closing * 18


def test_nesting_is_bounded_before_parsing(recorder: Recorder) -> None:
    pairs = [
        ("(", ")"),
        ("[", "]"),
        ("{", "}"),
        ("\\{", "\\}"),
        ("\\sqrt{", "}"),
        ("x^{", "}"),
        ("\\left(", "\\right)"),
    ]
    assert not any(math_equal([(nested(*pair, "1+x"), "x+1") for pair in pairs]))
    assert recorder.asked == []


TRUE_NUMBERS = st.integers(2, 400)
SEPARATORS = st.sampled_from(
    [" ", "\n", "\t", "\\ ", "\\,", "\\quad ", "~", "\\\\", "$ $", ", ", "; ", " and ", " or ", "|", "｜", "、"]
)
WRAPS = st.sampled_from(
    ["{}", "({})", "[{}]", "{{{}}}", "\\{{{}\\}}", "${}$", "\\boxed{{{}}}", "\\text{{{}}}", "|{}|", "\\left({}\\right)"]
)


@pytest.mark.slow
@given(TRUE_NUMBERS, st.lists(TRUE_NUMBERS, min_size=1, max_size=3), SEPARATORS, WRAPS, WRAPS, WRAPS)
@settings(max_examples=150, deadline=None)
def test_numbers_side_by_side_are_no_sum_and_no_product(
    truth: int, addends: list[int], separator: str, first: str, second: str, whole: str
) -> None:
    """Any numbers that add up to the truth, or multiply to it, however they are set beside each other."""
    rest = truth - sum(addends)
    factors = [k for k in range(2, truth) if truth % k == 0]
    for parts in ([*addends, rest], *([k, truth // k] for k in factors[:2])):
        if any(part == truth or part <= 0 for part in parts) or int("".join(map(str, parts))) == truth:
            continue
        wraps = [first, second, first, second]
        answer = separator.join(wrap.format(part) for wrap, part in zip(wraps, parts, strict=False))
        if "boxed" in first + second and "\\boxed{" in answer and str(truth) in (str(part) for part in parts):
            continue
        assert math_equal([(answer, str(truth)), (whole.format(answer), str(truth))]) == [False, False]


PIECES = [
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    "\\frac",
    "\\sqrt",
    "^",
    "_",
    "/",
    "=",
    "<",
    ",",
    ";",
    ":",
    " ",
    "$",
    "\\boxed{",
    "x",
    "y",
]
PIECES += [
    "\\pi",
    "\\sin",
    "°",
    "cm",
    "\\text{",
    "3",
    "8",
    "1e9",
    "!",
    "|",
    "or",
    "is",
    "答案是",
    "\\pm",
    "\\infty",
    "%",
    "²",
    "√",
    "\n",
]


@given(
    st.lists(st.sampled_from(PIECES), max_size=40).map("".join),
    st.sampled_from(["7142", "(571,2)", "5171 kg", "x>7151"]),
)
@settings(max_examples=150, deadline=None)
def test_no_text_without_the_truth_scores(answer: str, truth: str) -> None:
    assert math_equal([(answer, truth)]) == [False]


@pytest.mark.parametrize("truth", ["10", "12", "17", "30", "144"])
def test_no_hack_of_the_built_in_task_scores(truth: str) -> None:
    n = int(truth)
    hacks = [f"{a}\n{b}\n{n - a - b}" for a in (1, 2, 3) for b in (1, 2)]
    hacks += [
        f"{n - 1} 1",
        f"({n - 1})(1)",
        f"{n - 1}(1)",
        f"{n},{n + 1}",
        f"{n} or {n + 1}",
        f"{{{n}, {n + 1}}}",
        f"({n}, {n})",
    ]
    hacks += [
        f"\\pm {n}",
        f"x={n - 1} x={n}",
        f"[0,{2 * n}]",
        f"{n}\\cup {n + 1}",
        "0<x<1000",
        f"\\boxed{{{n}}} or \\boxed{{1}}",
    ]
    hacks += [
        ", ".join(map(str, range(200))),
        " ".join(map(str, range(200))),
        f"{n} {n}",
        f"either {n} or 1",
        f"not {n}",
    ]
    env = gymnasium.make("VLM-Math-v0", dataset=[{"question": "q", "answer": truth, "images": []}])
    for hack in hacks:
        env.reset(seed=0)
        info = env.step(f"<think>t</think><answer>{hack}</answer>")[4]
        assert info["rewards"]["accuracy"] == 0, hack
