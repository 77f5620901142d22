"""Relaxed accuracy, ANLS and lists, as terms of `VLM-VQA-v0`."""

from __future__ import annotations

from typing import Any

import gymnasium
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmenv.core.formats import AnswerFormat
from vlmenv.envs.rewards.answers import read_answers
from vlmenv.envs.rewards.documents import anls_reward, items, list_reward, relaxed_reward

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
