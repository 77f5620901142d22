"""Rewriting rules of published benchmarks, for the odd rows that their files have."""

from __future__ import annotations

from typing import Any

import pytest

from vlmenv.envs.data.benchmarks import math_vision, mathverse
from vlmenv.envs.math_reasoning import MathEnv


def verse(question: str, answer: Any, kind: str = "multi-choice") -> dict[str, Any]:
    row = {"sample_index": "1", "image": "a.png", "question": question, "query_cot": f"Think.\nQuestion: {question}"}
    return mathverse(row | {"answer": answer, "question_type": kind, "problem_version": "Text Lite"})


LISTED = "Which?\nChoice:\nA. 090^\\circ T\nB. 180^\\circ T\nC. True"


@pytest.mark.parametrize(
    ("answer", "truth"), [("B", "B"), ("180^\\circ T", "B"), ("True", "C"), ("A\nC", "A, C"), ("A C", "A, C")]
)
def test_choices_of_mathverse_are_letters_or_written_out(answer: str, truth: str) -> None:
    read = verse(LISTED, answer)
    sample, _ = MathEnv().reading().sample(read, 0)
    assert (sample.target.text, sample.target.kind) == (truth, "choice")
    assert sample.target.choices == ("090^\\circ T", "180^\\circ T", "True")
    assert sample.question == f"Think.\nQuestion: {LISTED}"


@pytest.mark.parametrize("question", ["", "Which?", "A: a car\nA: another", "B. no first"])
def test_choices_that_stand_nowhere_are_unknown(question: str) -> None:
    assert verse(question, "B") == verse(question, "B") | {"answer": "B", "accu_reward_method": "choice"}
    assert "choices" not in verse(question, "B")
    assert verse("A. 1\nB. 2", "D").get("choices") is None  # the row is wrong, and the letter counts
    assert verse(LISTED, "5", "free-form")["accu_reward_method"] == "math"


def test_options_of_math_vision_may_be_parts_of_its_image() -> None:
    row = {"id": "1", "question": "Which?\n<image1>", "options": ["<image2>", "<image3>"], "answer": "B"}
    read = math_vision(row | {"image": "a.png", "subject": "algebra"})
    sample, images = MathEnv().reading().sample(read, 0)
    assert sample.question == "Which?\nChoices:\n(A) image 2\n(B) image 3"
    assert (len(images), sample.target.choices) == (1, ("image 2", "image 3"))
