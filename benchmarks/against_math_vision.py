"""Holds `accuracy` against MATH-Vision's own verdicts on published answers, and classes the differences.

The answers stand in the repository of MATH-Vision (github.com/mathllm/MATH-V), in `outputs/`, each with the text that
its rules compare (`model_answer`) and their verdict (`correct`). `accuracy` compares the same texts with the truths.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import tyro

from vlmenv.core.formats import AnswerFormat
from vlmenv.envs.data.benchmarks import math_vision
from vlmenv.envs.math_reasoning import MathEnv
from vlmenv.envs.rewards.answers import accuracy_term


@dataclass
class Args:
    """Compare with MATH-Vision's verdicts."""

    folder: Path
    """Copy of the repository of MATH-Vision."""
    output: Path | None = None
    """Markdown file for the page."""
    differences: Path | None = None
    """JSONL file for all answers on which the verdicts differ."""
    every: int = 1
    """Compare every n-th question with choices."""
    every_formula: int = 1
    """Compare every n-th question without choices."""


class Verdict(NamedTuple):
    """An answer with both verdicts."""

    model: str
    id: str
    is_choice: bool
    truth: str
    choices: tuple[str, ...]
    text: str
    ours: bool
    theirs: bool


def main(args: Args) -> None:
    found = judge(args.folder, args.every, args.every_formula)
    page = describe(found)
    print(page)
    if args.output is not None:
        args.output.write_text(page, encoding="utf-8")
    if args.differences is not None:
        rows = (json.dumps(one._asdict() | {"kind": kind_of(one)}) for one in found if one.ours != one.theirs)
        args.differences.write_text("\n".join(rows) + "\n", encoding="utf-8")


def judge(folder: Path, every: int = 1, every_formula: int = 1) -> list[Verdict]:
    """Both verdicts on all published answers."""
    reading = MathEnv().reading()
    rows = _lines(folder / "data" / "test.jsonl")
    chosen = [row for row in rows if row["options"]][::every] + [row for row in rows if not row["options"]][
        ::every_formula
    ]
    samples = {row["id"]: reading.sample(math_vision(row), i)[0] for i, row in enumerate(chosen)}
    files = sorted((folder / "outputs").rglob("*.jsonl"))
    answers = [(file.stem, one) for file in files for one in _lines(file) if one["id"] in samples]
    texts = [f"<answer>{one['model_answer']}</answer>" for _, one in answers]
    targets = [samples[one["id"]].target for _, one in answers]
    scores: list[float] = []
    for start in range(0, len(texts), 1000):
        part = slice(start, start + 1000)
        scores += accuracy_term.batch(texts[part], targets[part], [()] * len(texts[part]), AnswerFormat.TAGS)
    return [
        Verdict(
            model,
            one["id"],
            target.kind == "choice",
            target.text,
            target.choices,
            str(one["model_answer"]),
            score == 1,
            str(one["correct"]) == "True",
        )
        for (model, one), target, score in zip(answers, targets, scores, strict=True)
    ]


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def _right_text(one: Verdict) -> str:
    """The text of the truth: the choice's, or the answer."""
    return one.choices["ABCDE".index(one.truth)] if one.is_choice else one.truth


def _plain(text: str) -> str:
    """A text without commands, spaces and signs of mathematics, for the classes alone."""
    text = re.sub(r"\\(?:text(?:bf|rm|it)?|math(?:rm|bf)|operatorname)(?![a-z])", "", text.lower())
    return re.sub(r"\\[a-z]+|[^a-z0-9./:+=<>-]", "", text)


KINDS: Final[Mapping[str, Callable[[Verdict], bool]]] = {
    "a letter in font commands or brackets, as `\\boxed{\\textbf{(E) } 50}`": lambda one: (
        one.is_choice and re.fullmatch(rf"[^a-z]*{one.truth.lower()}[^a-z]*", _plain(one.text).rstrip(".")) is not None
    ),
    "a letter with the text of its choice": lambda one: (
        one.is_choice and re.match(rf"\W*{one.truth}\b", one.text, re.IGNORECASE) is not None
    ),
    "the text of the truth, but for signs and fonts": lambda one: _plain(one.text) == _plain(_right_text(one)),
    "the truth with a unit or a word": lambda one: (
        _plain(one.text).startswith(_plain(_right_text(one))) or _plain(_right_text(one)).startswith(_plain(one.text))
    ),
    "the truth after an equals sign or a lead-in": lambda one: _plain(one.text).endswith(_plain(_right_text(one))),
}
"""Kinds of differences, the first that fits."""


def kind_of(one: Verdict) -> str:
    return next((kind for kind, fits in KINDS.items() if fits(one)), "others")


def describe(found: Sequence[Verdict]) -> str:
    """The page."""
    return "\n".join([*_HEAD, *_tables(found), *_FOOT]) + "\n"


_HEAD: Final = (
    "# Answers against MATH-Vision's evaluation\n",
    "    python benchmarks/against_math_vision.py --folder MATH-V --output docs/choices_against_math_vision.md\n",
    "MATH-Vision (arXiv 2402.14804) publishes the answers of models beside its code, each with the verdict of its",
    "own rules. This page compares them with the verdicts of `accuracy` on the same texts. They are the answers of 16",
    "models, in its repository at commit a1f5cc3. This package contains none of these files.",
    "Another page compares with [MMMU-Pro's verdicts](choices_against_mmmu_pro.md).",
    "The judge's rules are tested in [test_order_of_evidence.py](../tests/envs/test_order_of_evidence.py).\n",
)
_FOOT: Final = (
    "\nThe answers are those to all 1,532 questions with choices and all 1,508 without. The texts are those that",
    "MATH-Vision's rules had cut out of the responses, in small letters and without spaces.\n",
    "All 26 answers that are right there alone were read. In 16, a value near the truth, or a text that works out to",
    "the same, counts as equal there: for truth 7/16, the answer 11/25, which is another choice. Eight texts were cut",
    'within a formula or a sentence, as `\\frac{3\\pi}{2}}{cm`. Two are answers "e" to one question with the letters',
    'A, B, C, E as choices. "E" is the label here, and the text there.\n',
    "Of those that are right here alone, the 223 of the first, the fifth and the last kind were read. Most are a",
    "letter right before the text of its choice, as `d\\frac{1}{6}`. All name the true choice.",
)


def _tables(found: Sequence[Verdict]) -> Iterator[str]:
    parts = {"with choices": [one for one in found if one.is_choice]}
    parts["without"] = [one for one in found if not one.is_choice]
    yield "| | with choices | without |"
    yield "|---|---|---|"
    counts = {name: Counter((one.ours, one.theirs) for one in part) for name, part in parts.items()}
    verdicts = {"both right": (True, True), "both wrong": (False, False)}
    verdicts |= {"right here alone": (True, False), "right there alone": (False, True)}
    for name, verdict in verdicts.items():
        yield f"| {name} | " + " | ".join(f"{count[verdict]:,}" for count in counts.values()) + " |"
    shares = [100 * (count[True, True] + count[False, False]) / max(1, count.total()) for count in counts.values()]
    yield "| agreement | " + " | ".join(f"{share:.1f} %" for share in shares) + " |"
    for title, ours in (("right here alone", True), ("right there alone", False)):
        kinds = {
            name: Counter(kind_of(one) for one in part if one.ours == ours != one.theirs)
            for name, part in parts.items()
        }
        yield f"\n| {title}, by kind | with choices | without |"
        yield "|---|---|---|"
        for kind in (*KINDS, "others"):
            if any(count[kind] for count in kinds.values()):
                yield f"| {kind} | " + " | ".join(str(count[kind]) for count in kinds.values()) + " |"


if __name__ == "__main__":
    main(tyro.cli(Args, config=(tyro.conf.FlagConversionOff,)))
