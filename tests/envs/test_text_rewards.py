from __future__ import annotations

import math

import pytest
from growth import growth
from hypothesis import given
from hypothesis import strategies as st

from vlmenv.core.answers import Caption
from vlmenv.core.formats import AnswerFormat
from vlmenv.envs.rewards.text import cosine_length, count_words, format_reward, keywords_reward, length_reward


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        (" \n\t", 0),
        ("a red car", 3),
        ("It's red.", 5),
        ("[1,2,3,4]", 9),
        ("<answer>B</answer>", 8),
        ("Größe 12", 2),
        ("\ud800\x00", 2),
        ("a" * 300_001, 37_500),
        ("strawberry", 2),
        ("." * 300_001, 300_000),
    ],
)
def test_words_by_hand(text: str, count: int) -> None:
    assert count_words(text) == count


@pytest.mark.parametrize(
    ("tokens", "expected"), [(0, 1.0), (1, 1.0), (512, 1.0), (513, 512 / 513), (1024, 0.5), (5120, 0.1)]
)
def test_length_reward_by_hand(tokens: int, expected: float) -> None:
    assert length_reward("any", None, lambda text: tokens) == pytest.approx(expected)
    assert length_reward("x " * tokens, None) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("correct", "tokens", "expected"),
    [
        (1.0, 0, 1.0),
        (1.0, 25, 1 - (1 - math.sqrt(0.5)) / 4),
        (1.0, 50, 0.75),
        (1.0, 100, 0.5),
        (1.0, 101, 0.5),
        (1.0, 200, 0.5),  # where a cosine that is not clamped is back at its top
        (1.0, 10**9, 0.5),
        (0.0, 0, 0.0),
        (0.0, 50, -0.25),
        (0.0, 100, -0.5),
        (0.0, 200, -0.5),
        (0.5, 0, 0.5),
        (0.5, 50, 0.25),
        (0.5, 100, 0.0),
        (0.25, 100, -0.25),
        (1.0, -5, 1.0),
    ],
)
def test_cosine_length_by_hand(correct: float, tokens: int, expected: float) -> None:
    assert cosine_length(correct, tokens, 100) == pytest.approx(expected)


@given(st.floats(0, 1), st.integers(0, 10**6), st.integers(0, 10**6), st.integers(1, 10**6))
def test_longer_is_never_better(correct: float, a: int, b: int, most: int) -> None:
    shorter, longer = sorted((a, b))
    assert -0.5 <= cosine_length(correct, longer, most) <= cosine_length(correct, shorter, most) <= 1


@pytest.mark.parametrize(
    ("text", "keywords", "share"),
    [
        ("A red car by the lake", ("red", "car"), 1.0),
        ("A RED car", ("Red", "lake"), 0.5),
        ("A red car", ("lake",), 0.0),
        ("A red car", (), 0.0),
        ("A red car", ("", " "), 0.0),
        ("A red car", ("red", "RED", " red "), 1.0),
        ("concatenate cats", ("cat",), 0.0),
        ("concatenate: cat", ("cat",), 1.0),
        ("the cat's tail", ("cat",), 1.0),
        ("a cat-like dog", ("cat",), 1.0),
        ("snake_case", ("snake",), 1.0),
        ("cat2", ("cat",), 0.0),
        ("a traffic\n  light", ("traffic light",), 1.0),
        ("a traffic light", ("traffic  light", "light traffic"), 0.5),
        ("C++ and C#", ("c++", "c#", "c"), 1.0),
        ("12.5 km", ("12.5", "2.5"), 0.5),
        ("die Straße", ("strasse",), 1.0),
        ("die Grösse", ("größe", "gros"), 0.5),
        ("cafe\u0301 noir", ("café", "cafe"), 0.5),
        ("Москва река", ("москва", "моск"), 0.5),
        ("một con mèo", ("mèo", "m", "m\u1ed9"), 1 / 3),
        ("一只猫坐着", ("猫", "狗"), 0.5),
        ("고양이가 있다", ("고양이",), 1.0),
        ("แมวนั่ง", ("แมว",), 1.0),
        ("the .* car", (".*", "("), 0.5),
        ("\ud800 \x00", ("\ud800", "\x00"), 1.0),
        ("x" * 300_001 + " car", ("car",), 0.0),
    ],
)
def test_keywords_by_hand(text: str, keywords: tuple[str, ...], share: float) -> None:
    assert keywords_reward(text, Caption(keywords)) == pytest.approx(share)


@given(st.text(st.characters()), st.lists(st.text(st.characters(), max_size=3), max_size=3))
def test_rewards_of_any_text_are_within_their_range(text: str, keywords: list[str]) -> None:
    assert 0 <= keywords_reward(text, Caption(tuple(keywords))) <= 1
    assert 0 < length_reward(text, None) <= 1
    assert count_words(text) >= len(text.split())
    assert keywords_reward(text, Caption((text,))) == float(bool(text.strip()))


def test_format_by_hand() -> None:
    for answer_format in AnswerFormat:
        right = answer_format.write("B", "I see a cat.")
        assert format_reward(right, None, answer_format) == 1
        assert format_reward(f"\n {right}\n", None, answer_format) == 1
        assert format_reward("B", None, answer_format) == 0
        assert format_reward(f"Well: {right}", None, answer_format) == 0
        assert format_reward(right, None) == float(answer_format is AnswerFormat.TAGS)


@pytest.mark.parametrize("unit", ["[", "cat ", "cat", "a", ".a", " ", "\ud800", "ﷺ", "é"])
def test_scoring_takes_time_in_proportion_to_the_text(unit: str) -> None:
    keywords = Caption(("cat", "dog", "aaaaaaaaab", "é", "red car"))

    def score(length: int) -> None:
        text = unit * (length // len(unit))
        length_reward(text, None)
        keywords_reward(text, keywords)
        format_reward(text, None)

    assert growth(score, 4_000) < 24


def test_texts_beyond_the_longest_are_not_looked_at() -> None:
    assert count_words("a " * 10**7) == count_words("a " * 150_000)
    assert keywords_reward("a " * 10**7 + "cat", Caption(("cat",))) == 0
