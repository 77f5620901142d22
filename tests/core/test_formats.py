from __future__ import annotations

import pytest

from vlmenv.core.formats import AnswerFormat

SECTIONS = AnswerFormat.SECTIONS
FINAL = "### The final answer is:"
ABOVE = "### Image Description: a cat\n### Rationales:\n### Let's think step by step.\n### Step 1: look\n"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (" 42", "42"),
        ("\n42\n", "42"),
        ("\n\\[\n\\boxed{42}\n\\]", "\\[\n\\boxed{42}\n\\]"),
        (" The area is\n\n$$\n42\n$$\n", "The area is\n\n$$\n42\n$$"),
        ('\n```json\n[{"bbox_2d": [1, 2, 3, 4]}]\n```', '```json\n[{"bbox_2d": [1, 2, 3, 4]}]\n```'),
        ("\n[\n1,\n2\n]", "[\n1,\n2\n]"),
        (f" 42\n{FINAL} 42", None),
        (f" 42\n{FINAL} 43", None),
        (f" 43\n{FINAL} 42", None),
        (" 42\n### Rationales: none", None),
        ("", None),
        ("\n \n", None),
    ],
)
def test_the_answer_after_the_final_heading_is_read_whole(said: str, expected: str | None) -> None:
    assert SECTIONS.extract(f"{ABOVE}{FINAL}{said}") == expected


def test_a_heading_that_is_quoted_is_none() -> None:
    quoted = ABOVE.replace("look", f'then comes "{FINAL} 7"')
    assert SECTIONS.extract(f"{quoted}{FINAL} 42") == "42"
    assert SECTIONS.extract(f"So {FINAL} 42") == "42"
    assert SECTIONS.extract("42") is None


@pytest.mark.parametrize(
    ("said", "followed"),
    [(" 42", True), ("\n42", True), (" 42\nI hope that this helps.", False), ("\n\\[\n42\n\\]", False), ("", False)],
)
def test_the_format_of_sections_is_exact(said: str, followed: bool) -> None:
    assert SECTIONS.is_followed(f"{ABOVE}{FINAL}{said}") is followed


@pytest.mark.parametrize("answer_format", AnswerFormat)
def test_what_is_written_is_read(answer_format: AnswerFormat) -> None:
    assert answer_format.extract(answer_format.write("42", "a cat")) == "42"
    assert answer_format.is_followed(answer_format.write("42", "a cat"))
