from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmenv.core.answers import NONE, Target, parse_box, write_box
from vlmenv.core.formats import AnswerFormat, extract_answer, is_think_answer

pieces = st.sampled_from(
    [
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "[",
        "]",
        "1",
        "2.5",
        ",",
        " ",
        "-",
        "None",
        "```json",
        "{",
        "}",
        "é",
        "\ud800",
    ]
)
texts = st.one_of(st.text(st.characters()), st.lists(pieces, max_size=40).map("".join))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[1, 2, 3, 4]", (1, 2, 3, 4)),
        ("[1,2,3,4,]", (1, 2, 3, 4)),
        ("[1.5, 2.25, 3., +4]", (1.5, 2.25, 3, 4)),
        ("the box is [10, 20, 30, 40] there", (10, 20, 30, 40)),
        ('```json\n{"bbox_2d": [1, 2, 3, 4], "label": "cat"}\n```', (1, 2, 3, 4)),
        ('[{"bbox_2d": [1, 2, 3, 4]},]', (1, 2, 3, 4)),
        ("[[1, 2, 3, 4]]", (1, 2, 3, 4)),
        (json.dumps([{"bbox_2d": [1, 2, 3, 4]}], indent=8), (1, 2, 3, 4)),
        ("[1, 2, 3, 4]" + " " * 10_000, None),
        ("[-5, -2, 3, 4]", (-5, -2, 3, 4)),
        ("None", NONE),
        (" none. ", NONE),
        ("```\nNone\n```", NONE),
        ("[]", NONE),
        ("", None),
        ("[1, 2, 3]", None),
        ("[1, 2, 3, 4, 5]", None),
        ("[3, 2, 1, 4]", None),
        ("[1, 2, 1, 4]", None),
        ('["1", "2", "3", "4"]', None),
        ("[nan, 0, 1, 1]", None),
        ("[0, 0, 1e308, 1]", None),
        ("[0, 0, 99999999, 1]", None),
        ("[0, 0, 1" + "0" * 400 + ", 1]", None),
        ("[1, 2, 3, 4] or [5, 6, 7, 8]", None),
        ("1, 2, 3, 4", None),
        ("[1, 2, 3, 4", None),
        ("[١, ٢, ٣, ٤]", None),
        ("there is none of them", None),
    ],
)
def test_parse_box(content: str, expected: Target | None) -> None:
    assert parse_box(content) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think><answer>b</answer>", "b"),
        ("\n <think>a</think>\n<answer>b</answer>\n", "b"),
        ("<answer>b</answer>", "b"),
        ("a thought that the prompt began</think><answer>b</answer>", "b"),
        ("<think>a</think><answer>b", None),
        ("<think><answer>b</answer></think>", None),
        ("<think><answer>b</answer></think><answer>c</answer>", None),
        ("<think>a<answer>b</answer>", None),
        ("<think>a</think><think><answer>b</answer>", None),
        ("a</think><think><answer>b</answer>", None),
        ("<think>a</think><answer>b</answer><answer>c</answer>", None),
        ("<think>a</think><answer><answer>b</answer></answer>", None),
        ("<think>a</think></answer>b<answer>", None),
        ("", None),
    ],
)
def test_extract_answer(text: str, expected: str | None) -> None:
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think><answer>b</answer>", True),
        (" <think>a</think>\n\n<answer>b</answer>\n", True),
        ("<think></think><answer></answer>", True),
        ("so <think>a</think><answer>b</answer>", False),
        ("<think>a</think> so <answer>b</answer>", False),
        ("<think>a</think><answer>b</answer>.", False),
        ("<think><think>a</think></think><answer>b</answer>", False),
        ("<think>a</think><answer>b</answer><answer>b</answer>", False),
        ("<think>a<answer>b</answer></think>", False),
        ("<answer>b</answer><think>a</think>", False),
        ("<answer>b</answer>", False),
    ],
)
def test_is_think_answer(text: str, expected: bool) -> None:
    assert is_think_answer(text) is expected


@given(texts)
def test_no_text_raises(text: str) -> None:
    extract_answer(text)
    is_think_answer(text)
    parse_box(text)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10_000_000,
        "[1,2,3,4]" * 1_000_000,
        "[1,2,3,4," * 1_000_000,
        "[" + "1" * 10_000_000,
        "[]" * 5_000_000,
        "[a]" * 3_000_000,
        "<answer>" * 1_000_000,
        " " * 10_000_000,
    ],
    ids=["brackets", "boxes", "unclosed", "digits", "empty", "lists", "tags", "spaces"],
)
def test_ten_megabytes_do_not_hold_up_a_step(text: str) -> None:
    started = time.perf_counter()
    is_think_answer(text)
    extract_answer(text)
    parse_box(text)
    extract_answer(f"<answer>{text}</answer>")
    assert time.perf_counter() - started < 1


def test_what_is_written_is_read() -> None:
    text = AnswerFormat.TAGS.write(write_box((1.2, 2, 30, 44.7)), "the red one")
    assert is_think_answer(text)
    content = extract_answer(text)
    assert content is not None
    assert parse_box(content) == (1, 2, 30, 45)
    assert write_box(NONE) == "None"
