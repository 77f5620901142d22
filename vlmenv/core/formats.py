"""How a completion sets its answer apart from its reasoning. No text raises, and every function runs in linear time."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

TAGS: Final = ("<think>", "</think>", "<answer>", "</answer>")
SECTIONS: Final = (
    "### Image Description:",
    "### Rationales:",
    "### Let's think step by step.",
    "### The final answer is:",
)
"""The headings of PeBR-R1 (arXiv 2509.13031)."""

_FENCE: Final = "```"


class AnswerFormat(StrEnum):
    """The shape of a completion."""

    TAGS = "tags"
    """`<think>…</think><answer>…</answer>`, as in VLM-R1."""
    SECTIONS = "sections"
    """Four headings, the answer on the line of the last, as in PeBR-R1."""

    def extract(self, text: str) -> str | None:
        """The answer in a completion; None where there is none, or more than one."""
        return extract_answer(text) if self is AnswerFormat.TAGS else _final_answer(text)

    def is_followed(self, text: str) -> bool:
        """Whether a completion has this shape and nothing else but white space."""
        return is_think_answer(text) if self is AnswerFormat.TAGS else _has_sections(text)

    def write(self, answer: str, thought: str = "") -> str:
        """The completion that says `answer` after `thought`, which may describe the image."""
        if self is AnswerFormat.TAGS:
            return f"<think>{thought}</think><answer>{answer}</answer>"
        described, rationales, steps, final = SECTIONS
        return f"{described} {thought}\n{rationales}\n{steps}\n### Step 1:\n{final} {answer}"

    def example(self, answer: str) -> str:
        """What a prompt shows of the shape, with the form of the answer."""
        if self is AnswerFormat.TAGS:
            return self.write(answer, "reasoning")
        described, rationales, steps, final = SECTIONS
        return f"{described} …\n{rationales} …\n{steps}\n### Step 1: …\n{final} {answer}"

    def answer_only(self, answer: str) -> str:
        """The part of a completion that is the answer."""
        return f"<answer>{answer}</answer>" if self is AnswerFormat.TAGS else f"{SECTIONS[-1]} {answer}"

    def description(self, text: str) -> str:
        """What a completion says about the image: its think block, or its section "Image Description".

        It ends at the next tag or heading, whichever that is: an answer is no description.
        """
        marks = TAGS if self is AnswerFormat.TAGS else SECTIONS
        described = text.partition(marks[0])[2]
        return min((described.partition(mark)[0] for mark in marks), key=len).strip()


def is_think_answer(text: str) -> bool:
    """Whether `text` is one think block followed by one answer block and nothing else but white space."""
    if any(text.count(tag) != 1 for tag in TAGS):
        return False
    text = text.strip()
    opened, closed, answered = (text.find(tag) for tag in TAGS[:3])
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


def _final_answer(text: str) -> str | None:
    """What stands on the line of the only final heading, or the first after it; a fence or JSON is taken whole.

    A final heading that another follows is not the final one.
    """
    if text.count(SECTIONS[-1]) != 1:
        return None
    content = text.partition(SECTIONS[-1])[2].strip()
    if any(heading in content for heading in SECTIONS):
        return None
    if content.startswith(("[", "{")):
        return content
    if content.startswith(_FENCE):
        fenced, ended, _ = content.removeprefix(_FENCE).partition(_FENCE)
        return f"{_FENCE}{fenced}{_FENCE}" if ended else None
    return content.partition("\n")[0].strip() or None


def _has_sections(text: str) -> bool:
    """Whether every heading occurs once, at the beginning of a line, in order, with an answer after the last."""
    if any(text.count(heading) != 1 for heading in SECTIONS):
        return False
    lines = "\n" + text.strip()
    places = [lines.find("\n" + heading) for heading in SECTIONS]
    ordered = places[0] == 0 and -1 not in places and places == sorted(places)
    answer = _final_answer(text)
    return ordered and answer is not None and lines.endswith(answer)
