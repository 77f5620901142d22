"""Forms that separate an answer from its reasoning. No text raises, and every function runs in linear time."""

from __future__ import annotations

import re
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
_GLM_BOX = re.compile(r"<\|begin_of_box\|>((?:(?!<\|begin_of_box\|>).)*?)<\|end_of_box\|>", re.DOTALL)
_ANEW = re.compile(r"</answer>\s*+<think>")


class AnswerFormat(StrEnum):
    """The form of a completion."""

    TAGS = "tags"
    """`<think>…</think><answer>…</answer>`, as in VLM-R1."""
    SECTIONS = "sections"
    """Four headings, the answer after the last, as in PeBR-R1."""

    def extract(self, text: str) -> str | None:
        r"""The answer in a completion; None if there is none, or several. GLM's marks of a box become `\boxed{…}`."""
        found = extract_answer(text) if self is AnswerFormat.TAGS else _final_answer(text)
        return found and _GLM_BOX.sub(r"\\boxed{\1}", found)

    def is_followed(self, text: str) -> bool:
        """Whether a completion has this form and nothing else but white space."""
        return is_think_answer(text) if self is AnswerFormat.TAGS else _has_sections(text)

    def write(self, answer: str, thought: str = "") -> str:
        """The completion with `answer` after `thought`, which may describe the image."""
        if self is AnswerFormat.TAGS:
            return f"<think>{thought}</think><answer>{answer}</answer>"
        described, rationales, steps, final = SECTIONS
        return f"{described} {thought}\n{rationales}\n{steps}\n### Step 1:\n{final} {answer}"

    def example(self, answer: str) -> str:
        """The example of the form in a prompt, with the form of the answer."""
        if self is AnswerFormat.TAGS:
            return self.write(answer, "reasoning")
        described, rationales, steps, final = SECTIONS
        return f"{described} …\n{rationales} …\n{steps}\n### Step 1: …\n{final} {answer}"

    def answer_only(self, answer: str) -> str:
        """The part of a completion that is the answer."""
        return f"<answer>{answer}</answer>" if self is AnswerFormat.TAGS else f"{SECTIONS[-1]} {answer}"

    def description(self, text: str) -> str:
        """A completion's description of the image: its think block, or its section "Image Description".

        It ends at the next tag or heading of any kind: an answer is no description.
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
    """The answer in a text with tags, or None.

    Only the text after the last `</think>` counts, and none if thinking is never closed. In it the only answer block is
    the answer, closed or not. Without a block all of the text is the answer. A think block after an answer leaves no
    answer. A text without thinking tags may quote the answer tags before its answer: its last block counts.
    """
    thinking, thought, spoken = text.rpartition("</think>")
    if _ANEW.search(thinking):
        return None
    spoken = spoken.partition("<think>")[0]
    before, answered, content = spoken.rpartition("<answer>")
    if thought and "<answer>" in before:
        return None
    content = content.partition("</answer>")[0]
    return content if (thought or answered) and content.strip() else None


def _final_answer(text: str) -> str | None:
    """The text after the final heading. None: it occurs twice, or another heading follows.

    A heading within a line is a quotation, unless no heading begins a line.
    """
    parts = text.split(SECTIONS[-1])
    begun = [i for i in range(1, len(parts)) if not parts[i - 1].rpartition("\n")[2].strip()]
    if len(parts) == 1 or len(begun) > 1:
        return None
    answer = SECTIONS[-1].join(parts[begun[0] if begun else -1 :]).strip()
    return None if not answer or any(heading in answer for heading in SECTIONS) else answer


def _final_line(text: str) -> str:
    """The text on the line of the final heading, or the first line after it. A fence or JSON is taken whole."""
    content = text.partition(SECTIONS[-1])[2].strip()
    if content.startswith(("[", "{")):
        return content
    if content.startswith(_FENCE):
        fenced, ended, _ = content.removeprefix(_FENCE).partition(_FENCE)
        return f"{_FENCE}{fenced}{_FENCE}" if ended else ""
    return content.partition("\n")[0].strip()


def _has_sections(text: str) -> bool:
    """Whether every heading occurs once, at the beginning of a line, in order, with an answer after the last."""
    if any(text.count(heading) != 1 for heading in SECTIONS):
        return False
    lines = "\n" + text.strip()
    places = [lines.find("\n" + heading) for heading in SECTIONS]
    ordered = places[0] == 0 and -1 not in places and places == sorted(places)
    answer = _final_line(text)
    return ordered and bool(answer) and lines.endswith(answer)
