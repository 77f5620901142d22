"""Choices and accepted answers as rows hold them."""

from __future__ import annotations

import json
from typing import Any

import gymnasium
import pytest

import vlmenv  # noqa: F401
from vlmenv.core.errors import VLMEnvError
from vlmenv.envs.data.choices import read_choices


@pytest.mark.parametrize(
    "found",
    [
        ["red", "blue"],
        ("red", "blue"),
        {"A": "red", "B": "blue"},
        {"B": "blue", "A": "red"},
        {"a": "red", "b": "blue"},
        {"A": "red", "B": "blue", "C": None, "D": ""},
        {"label": ["A", "B"], "text": ["red", "blue"]},
        '["red", "blue"]',
        "['red', 'blue']",
        '{"A": "red", "B": "blue"}',
        "{'A': 'red', 'B': 'blue'}",
        "A. red\nB. blue",
        "(A) red\n(B) blue",
        ["A. red", "B. blue"],
        ["(A) red", "(B) blue"],
        ["A：red", "B：blue"],
        [" red ", "blue\n"],
        [["red", "blue"]],
    ],
)
def test_choices_are_read_however_they_are_written(found: Any) -> None:
    assert read_choices(found) == ("red", "blue")


@pytest.mark.parametrize("found", [None, [], (), {}, "", "[]", "{}"])
def test_no_choices(found: Any) -> None:
    assert read_choices(found) == ()


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ("red, blue", "options is 'red, blue', which is neither a list nor a mapping: give a list"),
        (5, "options is 5"),
        (True, "options is True"),
        ({"x": "red"}, r"options has the keys \['x'\], which are not the letters from A on"),
        ({"A": "red", "C": "blue"}, "not the letters from A on"),
        ({"1": "red", "2": "blue"}, "not the letters from A on"),
        ([None, "red"], "holds None, which is neither text nor number"),
        ([["red"], ["blue"]], "neither text nor number"),
        (["red", " "], "holds an empty choice"),
        (["x"] * 27, "27 choices; there are letters for 26"),
        ({"label": ["A"], "text": ["red", "blue"]}, "1 labels for 2 texts"),
        ("[1, 2", "neither a list nor a mapping"),
        ("['red' 'blue']", "lists texts without commas"),
    ],
)
def test_what_is_no_choices_is_refused(found: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_choices(found, "options")


def row(**columns: Any) -> dict[str, Any]:
    return {"question": "Which?", "images": []} | columns


def scored(data: dict[str, Any], *contents: str, env: str = "VLM-VQA-v0") -> list[float]:
    made = gymnasium.make(env, dataset=[data])
    scores = []
    for content in contents:
        made.reset(seed=0)
        scores.append(made.step(f"<think>t</think><answer>{content}</answer>")[4]["rewards"]["accuracy"])
    return scores


@pytest.mark.parametrize("column", ["choices", "options"])
@pytest.mark.parametrize("choices", [["red", "blue"], {"A": "red", "B": "blue"}, json.dumps(["red", "blue"])])
@pytest.mark.parametrize("answer", ["B", "b", "(B)", "blue", "Blue.", "B. blue", ["B"], ["blue"]])
def test_choices_of_a_row_are_used(column: str, choices: Any, answer: Any) -> None:
    data = row(answer=answer, **{column: choices})
    assert scored(data, "B", "blue", "The answer is blue.", "A", "red", "C") == [1, 1, 1, 0, 0, 0]


def test_lists_of_accepted_answers() -> None:
    assert scored(row(answer=["red", "crimson", "red"]), "red", "Crimson", "blue", "red, crimson") == [1, 1, 0, 0]
    assert scored(row(answers=["5", "five"]), "5", "five", "6") == [1, 1, 0]
    assert scored(row(answer=["red"]), "red", "blue") == [1, 0]
    assert scored(row(answer=[5]), "5", "6") == [1, 0]
    assert scored(row(answers='["red", "crimson"]'), "red", "Crimson", "blue") == [1, 1, 0]
    assert scored(row(answers="['red', \"crimson's\"]"), "red", "crimson's", "blue") == [1, 1, 0]
    assert scored(row(answer="[1, 2]"), "[1, 2]", "1") == [1, 0]
    assert scored(row(answer=["1/2"]), "0.5", "2", env="VLM-Math-v0") == [1, 0]
    assert scored(row(answer=["red", "crimson"], choices=["crimson", "blue", "red"]), "A", "C", "B") == [1, 1, 0]


@pytest.mark.parametrize(
    ("columns", "env", "message"),
    [
        ({"answer": [3, 4, 5]}, "VLM-VQA-v0", r"all or one may be meant: write the text '3, 4, 5' where all are, and"),
        (
            {"answer": ["A", "C"]},
            "VLM-VQA-v0",
            "write the text 'A, C' where all are, and the list with accu_reward_method 'exact' where one is enough",
        ),
        ({"answer": ["a", "c"], "choices": ["red", "blue", "pink"]}, "VLM-VQA-v0", "all or one may be meant"),
        ({"answer": ["a", "c"], "accu_reward_method": "mcq"}, "VLM-VQA-v0", "all or one may be meant"),
        ({"answer": ["A", "C"], "accu_reward_method": "relaxed"}, "VLM-VQA-v0", "all or one may be meant"),
        ({"answer": ["2", "-2"]}, "VLM-Math-v0", "all or one may be meant: write one text, as '2, -2' where all are"),
        ({"answers": "['red' 'crimson']"}, "VLM-VQA-v0", "lists texts without commas, as NumPy prints them"),
        ({"answers": ["red", ""]}, "VLM-VQA-v0", "lists an empty text"),
        ({"answer": "C", "choices": ["red", "blue"]}, "VLM-VQA-v0", "neither one of the letters A to B nor one of the"),
        ({"answer": 1, "choices": ["red", "blue"]}, "VLM-VQA-v0", "the answer is '1', which is neither one of"),
        ({"answer": "pink", "options": ["red", "blue"]}, "VLM-VQA-v0", "A: 'red', B: 'blue'"),
        (
            {"answer": "red", "choices": "red or blue"},
            "VLM-VQA-v0",
            "'choices' or 'options' or 'candidates' is 'red or blue'",
        ),
        (
            {"answer": "red", "choices": ["red", "blue"], "accu_reward_method": "exact"},
            "VLM-VQA-v0",
            "the row has choices, which answers of kind 'exact' do not have",
        ),
    ],
)
def test_what_is_ambiguous_or_unused_is_refused(columns: dict[str, Any], env: str, message: str) -> None:
    with pytest.raises(VLMEnvError, match=message):
        gymnasium.make(env, dataset=[row(**columns)])
