"""Holds `accuracy` against MMMU-Pro's own verdicts on published answers, and classes the differences.

The answers of GPT-4o stand in the repository of MMMU (github.com/MMMU-Benchmark/MMMU), in `mmmu-pro/output/`. Each is
a whole response with the verdict of its rules (`if_right`) and the letter that they read (`pred_indexs`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Final, NamedTuple

import tyro
from published_rows import mmmu_pro

from vlmenv.core.answers import Answer
from vlmenv.core.formats import AnswerFormat
from vlmenv.envs.data.choices import LETTERS
from vlmenv.envs.rewards.answers import accuracy_term
from vlmenv.envs.rewards.letters import read_letters
from vlmenv.envs.vqa import VQAEnv


@dataclass
class Args:
    """Compare with MMMU-Pro's verdicts."""

    folder: Path
    """Copy of the repository of MMMU."""
    output: Path | None = None
    """Markdown file for the page."""
    differences: Path | None = None
    """JSONL file for all answers on which the verdicts differ."""


class Verdict(NamedTuple):
    """An answer with both verdicts."""

    id: str
    truth: str
    text: str
    read: str
    """the letters that are read here; empty if there are none"""
    ours: bool
    theirs: bool


def main(args: Args) -> None:
    found = {file.stem: judge(file) for file in sorted((args.folder / "mmmu-pro" / "output").glob("*.jsonl"))}
    page = describe(found)
    print(page)
    if args.output is not None:
        args.output.write_text(page, encoding="utf-8")
    if args.differences is not None:
        rows = (one._asdict() | {"kind": kind_of(one)} for one in chain(*found.values()) if one.ours != one.theirs)
        args.differences.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def judge(file: Path) -> list[Verdict]:
    """Both verdicts on all answers of a file, but for those to a question whose choices cannot be read."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    answered = [(row, target) for i, row in enumerate(rows) if (target := _target(row, i)) is not None]
    texts = [f"<answer>{row['response']}</answer>" for row, _ in answered]
    targets = [target for _, target in answered]
    scores = accuracy_term.batch(texts, targets, [()] * len(texts), AnswerFormat.TAGS)
    return [
        Verdict(
            row["id"],
            target.text,
            row["response"],
            read_letters(row["response"], target.choices) or "",
            score == 1,
            bool(row["if_right"]),
        )
        for (row, target), score in zip(answered, scores, strict=True)
    ]


_READING: Final = VQAEnv().reading()


def _target(row: Mapping[str, Any], number: int) -> Answer | None:
    try:
        target = _READING.sample(mmmu_pro(row), number)[0].target
    except ValueError:
        return None
    return target if isinstance(target, Answer) else None


KINDS: Final[Mapping[str, Callable[[Verdict], bool]]] = {
    "no letter and no choice is read here; a letter is drawn at random there": lambda one: not one.read and one.theirs,
    "another letter is read here; the true one is read or drawn there": lambda one: bool(one.read) and one.theirs,
    "the true letter is at the end, or before its choice": lambda one: (
        one.ours and one.read == one.truth and one.truth in LETTERS
    ),
}
"""Kinds of differences, the first that fits."""


def kind_of(one: Verdict) -> str:
    return next((kind for kind, fits in KINDS.items() if fits(one)), "others")


def describe(found: Mapping[str, Sequence[Verdict]]) -> str:
    """The page."""
    lines = [*_HEAD, "| answers | both right | both wrong | right here alone | right there alone | agreement |"]
    lines.append("|---|---|---|---|---|---|")
    for name, part in found.items():
        count = Counter((one.ours, one.theirs) for one in part)
        share = 100 * (count[True, True] + count[False, False]) / max(1, len(part))
        counts = [count[verdict] for verdict in ((True, True), (False, False), (True, False), (False, True))]
        lines.append(f"| {name} | " + " | ".join(map(str, counts)) + f" | {share:.1f} % |")
    kinds = Counter(kind_of(one) for part in found.values() for one in part if one.ours != one.theirs)
    lines += [
        "",
        "| difference | answers |",
        "|---|---|",
        *(f"| {kind} | {kinds[kind]} |" for kind in (*KINDS, "others")),
    ]
    return "\n".join([*lines, *_FOOT]) + "\n"


_FOOT: Final = (
    "\nAll 32 answers that are right there alone were read. Of the 24 in which nothing is read here, 19 are refusals",
    'and two name no choice. One names two ("Answer: A, E"), one says "not listed", and one ends with a bare letter',
    'after "therefore confirming:". The 8 others name another choice than the true one. Such is "C. Reduce A and B",',
    "where B is true.\n",
    "Of the 68 that are right here alone, 67 are read as the true letter. The rules there take the last capital of a",
    'text without "Answer:", as the A in "D. A conflict crime".',
)
_HEAD: Final = (
    "# Answers against MMMU-Pro's evaluation\n",
    "    python benchmarks/against_mmmu_pro.py --folder MMMU --output docs/choices_against_mmmu_pro.md\n",
    "MMMU-Pro (arXiv 2409.02813) publishes responses of GPT-4o beside its code, each with the verdict of its own",
    "rules. This page compares them with the verdicts of `accuracy` on the whole responses, in its repository at",
    "commit bb0b95a. If its rules find no letter, they draw one at random. This package has none of these files.\n",
)


if __name__ == "__main__":
    main(tyro.cli(Args, config=(tyro.conf.FlagConversionOff,)))
