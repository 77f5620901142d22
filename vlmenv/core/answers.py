"""Reads answers out of free text. No text raises, and every function runs in time linear in its length."""

from __future__ import annotations

import re
from typing import Final, Literal

from vlmenv.core.coordinates import Box, is_box

NONE: Final = "None"
"""What is answered, and written in data sets, when nothing in the image fits."""

Target = Box | Literal["None"]
"""A box, or `"None"` where nothing in the image fits."""

THINK_ANSWER: Final = ("<think>", "</think>", "<answer>", "</answer>")

# Bounded quantifiers only: no input makes these backtrack beyond a number's own length.
_INNERMOST_LIST = re.compile(r"\[([^\[\]]*)\]")
_NUMBER = re.compile(r"[+-]?\d{1,9}(?:\.\d{0,17})?", re.ASCII)
_LONGEST_ANSWER = 10_000  # characters; a box needs 30, a wordy answer some hundreds
_NONE_FORMS: Final = frozenset({"none", '"none"', "'none'", "none.", "[]"})


def write_answer(answer: str, thought: str) -> str:
    """The think/answer text that says `answer` after `thought`."""
    return f"<think>{thought}</think><answer>{answer}</answer>"


def is_think_answer(text: str) -> bool:
    """Whether `text` is one think block followed by one answer block and nothing else but white space."""
    if any(text.count(tag) != 1 for tag in THINK_ANSWER):
        return False
    text = text.strip()
    opened, closed, answered = (text.find(tag) for tag in THINK_ANSWER[:3])
    return (
        opened == 0
        and opened < closed < answered
        and not text[closed + len("</think>") : answered].strip()
        and text.endswith("</answer>")
    )


def extract_answer(text: str) -> str | None:
    """The content of the only answer block after the thinking, or None.

    An answer inside the think block, in a second answer block, or cut off before its closing tag is
    no answer.
    """
    opened, closed = text.count("<think>"), text.count("</think>")
    if closed > 1 or opened > closed or text.count("<answer>") != 1:
        return None
    spoken = text.rpartition("</think>")[2]
    if "<think>" in spoken or spoken.count("</answer>") != 1:
        return None
    _, answered, rest = spoken.partition("<answer>")
    content, ended, _ = rest.partition("</answer>")
    return content if answered and ended else None


def parse_box(content: str) -> Target | None:
    """Reads one box, or "None", from the content of an answer.

    A bare list, a fenced one, a JSON object with `bbox_2d`, floats and trailing commas all parse.
    What holds no box, more than one, or one with swapped edges, another count of numbers, or numbers
    that are no finite coordinates does not, nor does an answer of more than 10,000 characters.

    Args:
        content: Any text.

    Returns:
        The box in the coordinates that the text uses, `"None"`, or None if there is no single answer.
    """
    if len(content) > _LONGEST_ANSWER:
        return None
    if _unfenced(content).lower() in _NONE_FORMS:
        return NONE
    found: Box | None = None
    for match in _INNERMOST_LIST.finditer(content):
        values = _numbers(match[1])
        if values is None:
            continue
        if found is not None or not is_box(values):
            return None
        found = (values[0], values[1], values[2], values[3])
    return found


def _unfenced(content: str) -> str:
    """`content` without white space and a Markdown code fence around it."""
    content = content.strip().removeprefix("```json").removeprefix("```").removesuffix("```")
    return content.strip()


def _numbers(items: str) -> tuple[float, ...] | None:
    """The numbers of a comma-separated list; None where it is no list of numbers."""
    parts = [part.strip() for part in items.rstrip().removesuffix(",").split(",")]
    if not all(_NUMBER.fullmatch(part) for part in parts):
        return None
    return tuple(float(part) for part in parts)


def write_box(target: Target) -> str:
    """A box as models are asked to write it, rounded to whole numbers; "None" stays "None"."""
    if target == NONE:
        return NONE
    return "[" + ",".join(f"{value:.0f}" for value in target) + "]"
