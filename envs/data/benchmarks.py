"""Published benchmarks of visual mathematics and perception: from their rows to the usual columns.

Each function takes a row as it stands in the published file. The answers are compared by rule, the
letter of a choice also where it is written out; what their own evaluations do beyond that is said below.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from vlmenv.core.rollout import IMAGE_MARK
from vlmenv.envs.rewards.letters import truth_letters

Raw = Mapping[str, Any]

_LETTERS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_IMAGE_MARK = re.compile(r"<image\d*>")
_NUMBERED_MARK = re.compile(r"<image(\d+)>")
_CHOICE_LINE = re.compile(r"^\(?([A-Z])[.:)] ?(.*\S)", re.MULTILINE)
_LETTERS_ALONE = re.compile(r"[A-Z](?:\s+[A-Z])*")


def mathvista(row: Raw) -> dict[str, Any]:
    """MathVista (arXiv 2310.02255): parquet with `query`, `choices`, `answer`, `question_type`, `precision`.

    The answer to a choice is stored written out; here it is its letter. A decimal counts as right when it
    rounds to the stored one at its precision, as there. There a language model extracts the answer first, and
    of a choice the nearest by edit distance counts.
    """
    answer, kind = str(row["answer"]), row["answer_type"]
    read: dict[str, Any] = {"id": row["pid"], "images": _image(row, "decoded_image"), "question": row["query"]}
    if row["question_type"] == "multi_choice":
        return read | _choice(answer, row["choices"])
    if kind in ("integer", "float"):
        tolerance = 0.5 * 10.0 ** -int(row["precision"] or 0) if kind == "float" else 0.0
        return read | {"answer": answer, "accu_reward_method": "numeric", "tolerance": tolerance}
    return read | {"answer": answer, "accu_reward_method": "exact"}


def mathverse(row: Raw) -> dict[str, Any]:
    """MathVerse (arXiv 2403.14624): JSON or parquet with `query_cot`, `answer`, `question_type`, `problem_version`.

    The version is the subject. The choices stand in the question. Some answers are a choice written out, or several
    letters. There a language model extracts the answer and another compares it.
    """
    answer = str(row["answer"]).strip()
    read: dict[str, Any] = {"answer": answer, "accu_reward_method": "math"}
    if row["question_type"] == "multi-choice":
        answer = ", ".join(answer.split()) if _LETTERS_ALONE.fullmatch(answer) else answer
        choices = _listed(row["question"])
        is_known = bool(choices) and truth_letters(answer, choices) is not None
        read = {"answer": answer, "accu_reward_method": "choice"} | ({"choices": choices} if is_known else {})
    return read | {
        "id": row["sample_index"],
        "images": _image(row, "image"),
        "question": row["query_cot"],
        "subject": row["problem_version"],
    }


def math_vision(row: Raw) -> dict[str, Any]:
    """MATH-Vision (arXiv 2402.14804): JSONL or parquet with `question`, `options`, `answer`, `subject`.

    Rules decide there too: a letter or the value that it stands for, else the value of an expression. The question of
    some rows is the image alone, and the options of some are parts of it.
    """
    options = [_NUMBERED_MARK.sub(r"image \1", option) for option in row.get("options") or ()]
    question = _IMAGE_MARK.sub(" ", row["question"]).strip()
    read = {
        "id": row["id"],
        "images": _image(row, "decoded_image" if row.get("decoded_image") is not None else "image"),
        "question": question,
        "answer": str(row["answer"]).strip(),
        "subject": row["subject"],
    }
    if not options:
        return read | {"question": question or IMAGE_MARK, "accu_reward_method": "math"}
    written = "\n".join(f"({letter}) {option}" for letter, option in zip(_LETTERS, options, strict=False))
    return read | {"question": f"{question}\nChoices:\n{written}", "choices": options, "accu_reward_method": "choice"}


def mmstar(row: Raw) -> dict[str, Any]:
    """MMStar (arXiv 2403.20330): parquet with `question`, which lists the options, and the letter as `answer`.

    Rules decide there too, by the letter alone.
    """
    return {
        "id": row["index"],
        "images": _image(row, "image"),
        "question": row["question"],
        "answer": str(row["answer"]).strip(),
        "subject": row["category"],
        "accu_reward_method": "choice",
    }


def hallusion_bench(row: Raw) -> dict[str, Any]:
    """HallusionBench (arXiv 2310.14566): parquet with `question` and `gt_answer`, 1 for yes and 0 for no.

    The id is category/subcategory/set/figure/question, of which groups of answers are made. There a
    language model reads the answer as yes, no or unclear.
    """
    truth = str(row["gt_answer"])
    if truth not in ("0", "1"):
        raise ValueError(f"'gt_answer' is {truth!r}, neither 0 nor 1")
    place = (str(row[name]) for name in ("category", "subcategory", "set_id", "figure_id", "question_id"))
    return {
        "id": "/".join(place),
        "images": _image(row, "image"),
        "question": f"{row['question']} Answer yes or no.",
        "answer": "yes" if truth == "1" else "no",
        "subject": row["category"],
        "accu_reward_method": "yes_no",
    }


def _image(row: Raw, column: str) -> Any:
    if row[column] is None:
        raise ValueError(f"there is no image in '{column}'")
    return row[column]


def _listed(question: str) -> tuple[str, ...]:
    """The choices in a question, on lines "A. …" or "A:…" of their own; none if their letters are not A, B …"""
    found = _CHOICE_LINE.findall(question)
    letters = "".join(letter for letter, _ in found)
    return tuple(text for _, text in found) if letters and letters == _LETTERS[: len(letters)] else ()


def _choice(answer: str, choices: Sequence[str] | None) -> dict[str, Any]:
    """The letter of an answer that is written out."""
    places = [i for i, choice in enumerate(choices or ()) if choice == answer]
    if not places:
        raise ValueError(f"the answer {answer!r} is none of the choices {list(choices or ())}")
    return {"answer": _LETTERS[places[0]], "choices": list(choices or ()), "accu_reward_method": "choice"}
