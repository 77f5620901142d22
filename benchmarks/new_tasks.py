"""Whether GRPO raises the metrics of the tasks that the built-in model has not been taught, from a loosely taught base.

    python benchmarks/new_tasks.py --output benchmarks/new_tasks.md

The base of each task is the built-in model, taught that task by loose annotators (`examples/builtin_model.py`), or the
model of `--model`. It is then trained by `vlmenv train` with three seeds. An interrupted benchmark is taken up by the
same command.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import tyro

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT / part) for part in ("examples", "benchmarks/findings")]

import builtin_model  # noqa: E402
from runs import evaluation_of, hardware, mean_of, seeds_cell, steps_of, tail, tell_rows, trained  # noqa: E402


class Task(NamedTuple):
    """A task of the benchmark."""

    metric: str
    """the one that is told"""
    loose: str
    """how the annotators answer"""
    rounds: int = 1
    """of lessons"""
    lr: float = 3e-4
    """of GRPO; 3e-4 is that of the built-in model"""


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "VLM-Point-v0": Task("f1/mean", "points 30 to 70 % of the object's height too low"),
        "VLM-Count-v0": Task("accuracy", "60 % of the groups of three and more lack one"),
        "VLM-Seg-v0": Task("iou/mean", "rectangles, each side 5 to 30 % too far out"),
        "VLM-Temporal-v0": Task("iou/mean", "0.5 to 1.5 seconds too long at either end"),
        "VLM-Chart-v0": Task("relaxed", "numbers 2 to 12 % too low"),
        "VLM-GUI-v0": Task("accuracy", "clicks 30 to 70 % of the element's height too low", rounds=2, lr=2e-4),
    }
)


@dataclass
class Args:
    """Teach a base for each task, and train from it."""

    tasks: tuple[str, ...] = tuple(TASKS)
    """Names of `TASKS`."""
    lessons: int = 1000
    """Supervised steps of a base, of 16 samples."""
    model: str | None = None
    """Base of all tasks, such as `builtin-tasks`. Default: one is taught for each."""
    steps: int = 60
    """Steps of GRPO, of 8 prompts with 8 answers."""
    seeds: int = 3
    """Number of runs of a task, with seeds from 0."""
    limit: int = 128
    """Held-out samples to measure on."""
    runs: Path = Path("runs/new_tasks")
    """Folder of the bases and the runs."""
    output: Path | None = None
    """Markdown file for the table."""


def main(args: Args) -> None:
    tell_rows(head(args), (row(name, args) for name in args.tasks), args.output)


def head(args: Args) -> list[str]:
    asked = f"--tasks {' '.join(args.tasks)} --steps {args.steps} --seeds {args.seeds} --limit {args.limit}"
    asked += f" --model {args.model}" if args.model else f" --lessons {args.lessons}"
    return [
        "# Learning of the newer tasks",
        "",
        f"`python benchmarks/new_tasks.py {asked}`, on {hardware()}, beside other work.",
        "",
        f"{told_base(args)} GRPO then takes {args.steps} steps of 8 prompts with 8 answers, "
        f"with the task's own rewards. Answers to {args.limit} held-out samples are greedy. Intervals are of 95 %, and "
        "the change is of the same samples. Uniform groups are those whose answers all get the same reward, over the "
        "first and the last tenth of steps.",
        "",
        "| task | loose labels | metric | before | after | change, by seed | readable before, after | "
        "uniform groups | step (s) |",
        "|---" * 9 + "|",
    ]


def told_base(args: Args) -> str:
    """What the head says of the bases."""
    if args.model is not None:
        return f"The base is `{args.model}`, taught by loose annotators as the table says, among other tasks."
    twice = [name for name in args.tasks if TASKS[name].rounds > 1]
    more = f"; {', '.join(twice)} for twice as many" if twice else ""
    return (
        f"The base of a task is the built-in model, taught that task for {args.lessons} steps of 16 samples by loose "
        f"annotators, as the table says{more}."
    )


def base_of(name: str, args: Args) -> str:
    """The base of a task; it is taught, unless that has been done."""
    if args.model is not None:
        return args.model
    folder = args.runs / f"{short(name)}-base"
    note = folder.with_name(f"{folder.name}.json")
    told = json.loads(note.read_text()) if note.exists() else {"lessons": 0, "minutes": 0.0}
    while told["lessons"] < args.lessons * TASKS[name].rounds:
        started, done = time.monotonic(), told["lessons"] // args.lessons
        lessons = builtin_model.Args(folder, scenes=0, tasks={name: 16}, steps=args.lessons, lr=1e-3, seed=done)
        builtin_model.main(replace(lessons, init=str(folder) if done else "builtin"))
        minutes = told["minutes"] + (time.monotonic() - started) / 60
        told = {"lessons": told["lessons"] + args.lessons, "minutes": minutes}
        note.write_text(json.dumps(told))
    if told["lessons"] != args.lessons * TASKS[name].rounds:
        raise SystemExit(f"{folder} was taught {told['lessons']} steps: choose another --runs, or remove it")
    return str(folder)


def short(name: str) -> str:
    return name.removeprefix("VLM-").removesuffix("-v0").lower()


def row(name: str, args: Args) -> str:
    """A task's line of the table, once its runs are through."""
    runs = [trained(args.runs / f"{short(name)}-{seed}", options(name, seed, args)) for seed in range(args.seeds)]
    metric = TASKS[name].metric
    before = interval(runs[0], "before", metric)
    after = seeds_cell([evaluation_of(run)[metric] for run in runs])
    changes = " / ".join(interval(run, "change", metric, "+") for run in runs)
    readable = seeds_cell([1 - evaluation_of(run)["unparsable"] for run in runs], 2)
    readable = f"{1 - evaluation_of(runs[0], 'before')['unparsable']:.2f}, {readable}"
    uniform = f"{over(runs, first, 'reward/zero_std_groups'):.2f}, {over(runs, tail, 'reward/zero_std_groups'):.2f}"
    seconds = sum(over(runs, tail, f"time/{part}") for part in ("rollout", "score", "update"))
    cells = (name, TASKS[name].loose, f"`{metric}`", before, after, changes, readable, uniform, f"{seconds:.1f}")
    return f"| {' | '.join(cells)} |"


def options(name: str, seed: int, args: Args) -> dict[str, Any]:
    """The options of a run; the device is the CPU, where all have been measured."""
    return {
        "env": name,
        "model": base_of(name, args),
        "steps": args.steps,
        "prompts_per_step": 8,
        "group_size": 8,
        "max_new_tokens": 320,
        "eval_limit": args.limit,
        "seed": seed,
        "lr": TASKS[name].lr,
        "coordinates": "original",
        "checkpoint_every": args.steps,
        "device": "cpu",
    }


def interval(run: Path, when: str, metric: str, sign: str = "") -> str:
    """A metric of a run's evaluation with its interval."""
    told = json.loads((run / "evaluation.json").read_text())[when][metric]
    return f"{told['value']:{sign}.3f} ({told['low']:{sign}.3f} to {told['high']:{sign}.3f})"


def first(folder: Path, name: str) -> float:
    """The mean of a metric over the first tenth of the steps."""
    steps = steps_of(folder)
    return mean_of(steps[: max(1, len(steps) // 10)], name)


def over(runs: Sequence[Path], measure: Callable[[Path, str], float], name: str) -> float:
    """The mean of a measure over runs."""
    return float(np.mean([measure(run, name) for run in runs]))


if __name__ == "__main__":
    main(tyro.cli(Args))
