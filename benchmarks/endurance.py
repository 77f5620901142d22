"""Does memory or the number of open files grow with the steps of training, or with scored answers?

    python benchmarks/endurance.py --steps 2000 --answers 200000 --output benchmarks/endurance.md

Trains the built-in model with few and short completions for many steps in this process, and then scores many answers to
mathematical samples, a part of which computer algebra compares in child processes. Resident memory, open files and
child processes are read from /proc, so that this needs Linux. The first tenth counts as warming up. Ends with status 1
if memory grows by more than `limit` MiB after it, or if open files or child processes grow at all.
"""

from __future__ import annotations

import gc
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil
import torch
import tyro

from vlmenv.api import train
from vlmenv.core.formats import AnswerFormat
from vlmenv.envs.making import make_envs
from vlmenv.runs.run_folder import RunFolder

_BATCH: Final = 500
_POINTS: Final = 10


@dataclass
class Args:
    """Watch memory and open files."""

    steps: int = 2000
    """Training steps."""
    answers: int = 200_000
    """Answers to score."""
    limit: float = 48.0
    """MiB by which memory may grow after the first tenth."""
    output: Path | None = None
    """Markdown file for the tables."""


@dataclass(frozen=True)
class Held:
    """What this process holds at a moment."""

    done: int
    memory: float
    """MiB, resident"""
    children_memory: float
    """MiB, resident, of child processes"""
    files: int
    children: int

    @classmethod
    def now(cls, done: int) -> Held:
        """Reads it."""
        gc.collect()
        own = psutil.Process()
        children = own.children(recursive=True)
        memory = sum(child.memory_info().rss for child in children)
        return cls(done, own.memory_info().rss / 2**20, memory / 2**20, own.num_fds(), len(children))


def trained(steps: int, folder: Path) -> Iterator[Held]:
    """Holdings along a training run, whose metrics are watched as they are written."""
    found: list[Held] = []
    write = RunFolder.write_step

    def watching(run: RunFolder, result: object) -> None:
        write(run, result)  # type: ignore[arg-type]
        if result.step % max(1, steps // _POINTS) == 0:  # type: ignore[attr-defined]
            found.append(Held.now(result.step))  # type: ignore[attr-defined]

    RunFolder.write_step = watching  # type: ignore[method-assign, assignment]
    sizes = {"prompts_per_step": 2, "group_size": 2, "max_new_tokens": 12, "eval_limit": 0}
    train(steps=steps, output=folder / "run", checkpoint_every=max(1, steps // 20), device="cpu", **sizes)
    RunFolder.write_step = write  # type: ignore[method-assign]
    return iter(found)


def scored(answers: int) -> Iterator[Held]:
    """Holdings along the scoring of answers, all of which are different."""
    task, rng = make_envs("VLM-Math-v0", 1).task, random.Random(0)
    samples = [task.source.get(index) for index in range(_BATCH)]
    every = max(_BATCH, answers // _POINTS // _BATCH * _BATCH)
    for done in range(_BATCH, answers + 1, _BATCH):
        task.score_batch([AnswerFormat.TAGS.write(_answer(rng)) for _ in samples], samples)
        if done % every == 0:
            yield Held.now(done)


def _answer(rng: random.Random) -> str:
    number = rng.randrange(10**9)
    forms = (str(number), f"{number}/{rng.randrange(1, 10**6)}", "n" * rng.randrange(400), f"{number} cm")
    return f"x^2+{number}x-\\sqrt{{{number}}}" if rng.random() < 0.02 else rng.choice(forms)


def growth(rows: list[Held]) -> tuple[float, int, int]:
    """MiB, open files and processes that were added after the first tenth."""
    first, last = rows[0], rows[-1]
    memory = last.memory + last.children_memory - first.memory - first.children_memory
    return memory, last.files - first.files, last.children - first.children


def table(what: str, rows: list[Held], seconds: float) -> str:
    """The holdings as Markdown."""
    memory, files, children = growth(rows)
    lines = [
        f"| {row.done:,} | {row.memory:.0f} | {row.children_memory:.0f} | {row.files} | {row.children} |"
        for row in rows
    ]
    head = f"| {what} | MiB | MiB of child processes | open files | child processes |"
    told = f"From the first line to the last: {memory:+.1f} MiB, {files:+} open files, {children:+} child processes; "
    return "\n".join([head, "|---|---|---|---|---|", *lines, "", f"{told}{seconds / 60:.0f} minutes.", ""])


def main(args: Args) -> None:
    """Does both, and writes the tables."""
    tables, fine = list[str](), True
    with tempfile.TemporaryDirectory() as folder:
        for what, work in (
            ("steps", lambda: trained(args.steps, Path(folder))),
            ("answers", lambda: scored(args.answers)),
        ):
            started = time.monotonic()
            rows = list(work())
            tables.append(table(what, rows, time.monotonic() - started))
            print(tables[-1], flush=True)
            memory, files, children = growth(rows)
            fine = fine and memory <= args.limit and files <= 0 and children <= 0
    machine = f"{os.cpu_count()} CPU cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, torch {torch.__version__}"
    intro = f"# Memory and open files\n\n`python {' '.join(sys.argv)}` on {machine}, with other work beside it.\n"
    if args.output is not None:
        args.output.write_text("\n".join([intro, *tables]), encoding="utf-8")
    sys.exit(not fine)


if __name__ == "__main__":
    main(tyro.cli(Args))
