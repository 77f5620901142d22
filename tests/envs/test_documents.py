"""Relaxed accuracy, ANLS and lists, as terms of `VLM-VQA-v0`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import gymnasium
import pytest
from distances import table_distance
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmenv.core.formats import AnswerFormat
from vlmenv.envs.rewards.answers import read_answers
from vlmenv.envs.rewards.documents import anls_reward, items, list_reward, relaxed_reward, same_relaxed
from vlmenv.envs.rewards.transcripts import cer_reward, plain_text, wer_reward

TAGS = AnswerFormat.TAGS


@pytest.mark.parametrize(
    ("answer", "true", "relaxed", "anls"),
    [
        ("100", "100", 1, 1),
        ("105", "100", 1, 2 / 3),
        ("95", "100", 1, 0),
        ("105.1", "100", 0, 0),
        ("94.9", "100", 0, 0),
        ("About 98 million", "98", 0, 0),  # 98,000,000
        ("The value is 98.", "100", 1, 0),
        ("-100", "100", 0, 3 / 4),
        ("0", "0", 1, 1),
        ("0.01", "0", 0, 0),
        ("2,010", "2000", 1, 3 / 5),  # a year too, as published
        ("50%", "50%", 1, 1),
        ("52", "50%", 1, 0),
        ("France", "france", 1, 1),
        ("Franca", "France", 0, 5 / 6),
        ("The answer is: France.", "France", 1, 0),
        ("It is France.", "France", 1, 0),
        ("It is not France.", "France", 0, 0),
        ("The answer is France or Spain", "France", 0, 0),
        ("Product 20", "Product 20", 1, 1),
        ("Product 20", "Product 21", 0, 9 / 10),  # words, although a number is among them
        ("25", "Male, 25", 0, 0),
        ("2.4 million", "2.5 million", 1, 10 / 11),
        ("[1,3]", "[1, 3]", 1, 5 / 6),
        ("18–24", "18-24", 1, 4 / 5),
        ("Spain", "France", 0, 0),
        ("the  red\ncat", "the red cat", 1, 1),
        ("ab", "abcd", 0, 0),  # similarity 0.5 earns nothing
        ("abc", "abcd", 0, 0.75),
        ("", "x", 0, 0),
    ],
)
def test_relaxed_accuracy_and_anls_by_hand(answer: str, true: str, relaxed: float, anls: float) -> None:
    target, text = read_answers([true]), TAGS.write(answer)
    assert relaxed_reward(text, target) == relaxed
    assert anls_reward(text, target) == pytest.approx(anls)


def test_the_nearest_of_several_truths_counts() -> None:
    target = read_answers(["New York", "NYC", "NY"])
    assert anls_reward(TAGS.write("nyc"), target) == 1
    assert anls_reward(TAGS.write("New Yorc"), target) == 7 / 8
    assert relaxed_reward(TAGS.write("nyc"), target) == 1


def test_choices_and_yes_no_are_not_relaxed() -> None:
    assert relaxed_reward(TAGS.write("(B)"), read_answers(["B"])) == 1
    assert relaxed_reward(TAGS.write("Yes, it is."), read_answers(["yes"])) == 1
    assert relaxed_reward(TAGS.write("A"), read_answers(["B"])) == 0


@pytest.mark.parametrize(
    ("answer", "true", "f1"),
    [
        ("Spain, France", "France; Spain", 1),
        ('["Spain", "France"]', "Spain, France", 1),
        ("spain and france", "Spain, France", 1),
        ("Spain", "Spain, France", 2 / 3),
        ("1. Spain\n2. France", "Spain, France", 1),
        ("- 10\n- 20", "10, 20", 1),
        ("-10\n-20", "-10; -20", 1),
        ("['Spain', 'France',]", "Spain, France", 1),
        ('```json\n["Spain", "France"]\n```', "Spain, France", 1),
        ('{"answer": ["Spain", "France"]}', "Spain, France", 1),
        ("[Spain, France]", "Spain, France", 1),
        ("(1,204, 20)", "1,204; 20", 1),
        ("\\boxed{Spain, France}", "Spain, France", 1),
        ("The answer is Spain and France.", "Spain, France", 1),
        ("Spain，France", "Spain, France", 1),
        ("Spain or France", "Spain, France", 0),
        ("Spain, Spain", "Spain, France", 1 / 2),
        ("Spain, France, Italy", "Spain, France", 4 / 5),
        ("10, 21, 1,204", "1,204; 20; 10", 1),  # 21 is within 5 %
        ("10 and 30", "[10, 20]", 1 / 2),
        ("", "Spain, France", 0),
        (", ,", "Spain, France", 0),
        ("Spain, " * 2000, "Spain, France", 0),  # too long
    ],
)
def test_lists_by_hand(answer: str, true: str, f1: float) -> None:
    assert list_reward(TAGS.write(answer), read_answers([true], "exact")) == pytest.approx(f1)


def test_items() -> None:
    assert items("a, b and c\nd") == ["a", "b", "c", "d"]
    assert items("a, b; c and d") == ["a, b", "c and d"]
    assert items("[1, 2.5, \"x\"]") == ["1", "2.5", "x"]  # fmt: skip
    assert items("sand, band") == ["sand", "band"]


@settings(max_examples=80, deadline=1000)
@given(st.text(), st.sampled_from(["100", "France", "a, b"]))
def test_no_text_raises(text: str, true: str) -> None:
    target = read_answers([true])
    for content in (text, TAGS.write(text)):
        for term in (relaxed_reward, anls_reward, list_reward):
            assert 0 <= term(content, target) <= 1


ROWS: list[dict[str, Any]] = [
    {"question": "?", "answer": "100", "accu_reward_method": "relaxed"},
    {"question": "?", "answer": ["New York", "NYC"], "accu_reward_method": "anls"},
    {"question": "?", "answer": [10, 20], "accu_reward_method": "list"},
    {"question": "?", "answer": "100"},
]


def test_rows_choose_their_term() -> None:
    env: Any = gymnasium.make("VLM-VQA-v0", dataset=ROWS).unwrapped
    answers = ["103", "New Yorc", "20, 11", "103"]
    scores = [env.score(TAGS.write(answer), env.source.get(index)) for index, answer in enumerate(answers)]
    assert [score.terms for score in scores] == [
        {"relaxed": 1, "format": 1},
        {"anls": 7 / 8, "format": 1},
        {"list": 0.5, "format": 1},
        {"accuracy": 0, "format": 1},
    ]
    measured = [
        env.measure(TAGS.write(answer), env.target(env.source.get(index)), score.terms)["accuracy"]
        for index, (answer, score) in enumerate(zip(answers, scores, strict=True))
    ]
    assert measured == [1, 7 / 8, 0.5, 0]
    for index in range(4):
        sample = env.source.get(index)
        assert env.score(env.write_answer(sample), sample).reward == pytest.approx(1.1)


def test_terms_in_use_are_metrics() -> None:
    env: Any = gymnasium.make("VLM-VQA-v0", dataset=ROWS[3:], rewards={"relaxed": 0.5, "anls": 0.5}).unwrapped
    score = env.score(TAGS.write("103"), env.source.get(0))
    assert score.terms == {"relaxed": 1, "anls": pytest.approx(2 / 3)}
    measured = env.measure(TAGS.write("103"), env.target(env.source.get(0)), score.terms)
    assert (measured["relaxed"], measured["anls"], measured["accuracy"]) == (1, pytest.approx(2 / 3), 0)


def published_relaxed(answer: str, true: str) -> bool:
    """ChartQA's relaxed correctness in exact numbers: within 5 % if both texts are numbers, else equal texts."""

    def number(text: str) -> Fraction | None:
        try:
            return Fraction(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            return None

    answered, wanted = number(answer), number(true)
    if answered is not None and wanted:
        return abs(answered - wanted) / abs(wanted) <= Fraction(5, 100)
    return answer.lower() == true.lower()


def random_value(rng: random.Random, near: int) -> str:
    """A number near another with a sign or a noun, or words, as charts have them."""
    words = ["Group A", "Group B", "Tea", "tea", "Green Tea", "2010-2014", "2011-2014"]
    end = rng.choice(["", "", "", "%", " years", " months", " km", " kg", " dogs", " cats"])
    places = rng.randint(0, 2) if end in ("", "%") else 0
    number = f"{near * rng.uniform(0.9, 1.1):.{places}f}{end}"
    return rng.choice(words) if rng.random() < 0.2 else number


@pytest.mark.parametrize("seed", range(5))
def test_relaxed_accuracy_is_that_of_chartqa(seed: int) -> None:
    """But by design, a number without a noun may be answered with one, and a percent sign does not count."""
    rng, seen = random.Random(seed), {True: 0, False: 0}
    for _ in range(400):
        near = rng.choice([-1, 1, 1]) * rng.randint(1, 60)
        answer, true = random_value(rng, near), random_value(rng, near)
        expected_answer, expected_true = answer, true.removesuffix("%")
        if expected_true.lstrip("-")[:1].isdigit() and " " not in expected_true and "-" not in expected_true[1:]:
            is_percent, parts = true.endswith("%"), answer.split(" ")
            if not is_percent and len(parts) == 2 and parts[0][-1].isdigit():
                expected_answer = parts[0]
            expected_answer = expected_answer.removesuffix("%")
        found = published_relaxed(expected_answer, expected_true)
        assert same_relaxed(answer, true) == found, (answer, true)
        seen[found] += 1
    assert min(seen.values()) > 40


def published_anls(answer: str, truths: Sequence[str]) -> float:
    """DocVQA's equation: 1 - NL where the normalised distance NL is below 0.5, else 0; the greatest over the truths."""

    def plain(text: str) -> str:
        return " ".join(text.lower().split())

    pairs = [(plain(answer), plain(true)) for true in truths]
    distances = [Fraction(table_distance(one, true), max(len(one), len(true))) for one, true in pairs]
    return float(max(1 - distance if distance < Fraction(1, 2) else Fraction(0) for distance in distances))


def random_text(rng: random.Random, letters: str) -> str:
    return "x" + "".join(rng.choices(letters, k=rng.randint(1, 9)))


@pytest.mark.parametrize("seed", range(3))
def test_anls_is_that_of_docvqa(seed: int) -> None:
    rng, seen = random.Random(seed), []
    for _ in range(1000):
        truths = [random_text(rng, "aAb ") for _ in range(rng.randint(1, 3))]
        answer = random_text(rng, "aBb ")
        found = anls_reward(TAGS.write(answer), read_answers(truths, "exact"))
        assert found == pytest.approx(published_anls(answer, truths), abs=1e-12), (answer, truths)
        seen.append(found)
    assert min(seen.count(0), seen.count(1)) > 10
    assert len({*seen}) > 8


def error_rates(rng: random.Random) -> tuple[str, str, float, float]:
    """An answer and a truth with their error rates: 1 - what they earn."""
    answer, true = (plain_text(random_text(rng, "ab cab ")) for _ in range(2))
    return answer, true, 1 - cer_reward("", true, answer), 1 - wer_reward("", true, answer)


def test_error_rates_of_characters_and_words() -> None:
    rng = random.Random(2)
    for _ in range(2000):
        answer, true, cer, wer = error_rates(rng)
        assert cer == pytest.approx(min(1, table_distance(answer, true) / len(true)))
        assert wer == pytest.approx(min(1, table_distance(answer.split(), true.split()) / len(true.split())))


def test_error_rates_are_those_of_jiwer() -> None:
    jiwer = pytest.importorskip("jiwer")
    rng = random.Random(3)
    for _ in range(300):
        answer, true, cer, wer = error_rates(rng)
        assert cer == pytest.approx(min(1, jiwer.cer(true, answer)))
        assert wer == pytest.approx(min(1, jiwer.wer(true, answer)))
