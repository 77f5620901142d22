"""Whether GRPO raises the metrics of the tasks that the built-in model has not been taught, from a loosely taught base.

    python benchmarks/new_tasks.py --output benchmarks/new_tasks.md

The base is the built-in model, taught the tasks of `TASKS` by loose annotators (`examples/builtin_model.py`). Each task
is then trained by `vlmenv train` with three seeds. An interrupted benchmark is taken up by the same command.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT / part) for part in ("examples", "benchmarks/findings")]

import builtin_model  # noqa: E402
from runs import evaluation_of, hardware, mean_of, seeds_cell, steps_of, tail, trained  # noqa: E402


class Task(NamedTuple):
    """A task of the benchmark."""

    samples: int
    """in a step of teaching"""
    metric: str
    """the one that is told"""
    loose: str
    """how the annotators answer"""


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "VLM-Point-v0": Task(6, "f1/mean", "points 20 to 90 % of the object's height too low"),
        "VLM-Count-v0": Task(5, "accuracy", "60 % of the groups of three and more lack one"),
        "VLM-Seg-v0": Task(6, "iou/mean", "rectangles, each side 5 to 30 % too far out"),
        "VLM-GUI-v0": Task(4, "accuracy", "clicks 20 to 90 % of the element's height too low"),
        "VLM-Temporal-v0": Task(5, "iou/mean", "0.5 to 1.5 seconds too long at either end"),
    }
)


@dataclass
class Args:
    """Teach the base, and train each task from it."""

    tasks: tuple[str, ...] = tuple(TASKS)
    """Names of `TASKS`. The base is taught all of them, whichever are trained."""
    minutes: float = 32.0
    """Of teaching, by the clock."""
    steps: int = 40
    """Steps of GRPO, of 8 prompts with 8 answers."""
    seeds: int = 3
    """Number of runs of a task, with seeds from 0."""
    limit: int = 128
    """Held-out samples to measure on."""
    runs: Path = Path("runs/new_tasks")
    """Folder of the base and the runs."""
    output: Path | None = None
    """Markdown file for the table."""


def main(args: Args) -> None:
    taught = teach_base(args.runs / "base", args.minutes)
    lines = head(args, taught)
    for name in args.tasks:
        lines.append(row(name, args))
        print(lines[-1], flush=True)
        if args.output is not None:
            args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


def teach_base(folder: Path, minutes: float) -> dict[str, float]:
    """Teaches the base, unless that has been done. Returns the number of its steps and minutes."""
    note = folder.with_name("taught.json")
    if not note.exists():
        samples = {name: task.samples for name, task in TASKS.items()}
        started = time.monotonic()
        steps = builtin_model.main(
            builtin_model.Args(output=folder, init="builtin", scenes=4, tasks=samples, minutes=minutes)
        )
        note.write_text(json.dumps({"steps": steps, "minutes": (time.monotonic() - started) / 60}))
    return dict(json.loads(note.read_text()))


def head(args: Args, taught: Mapping[str, float]) -> list[str]:
    each = ", ".join(f"{task.samples} of {name}" for name, task in TASKS.items())
    return [
        "# Learning of the newer tasks",
        "",
        f"`python benchmarks/new_tasks.py --minutes {args.minutes:g} --steps {args.steps} --seeds {args.seeds} --limit "
        f"{args.limit}`, on {hardware()}, {torch.get_num_threads()} thread, beside other work.",
        "",
        f"The base is the built-in model after {taught['steps']:.0f} more supervised steps ({taught['minutes']:.0f} "
        f"minutes). Each has {each}, and 4 scenes with expressions to locate. The annotators are loose, as the table "
        f"says. GRPO then takes {args.steps} steps of 8 prompts with 8 answers, with the task's own rewards. "
        f"Answers to {args.limit} held-out samples are greedy. Intervals are of 95 %, and the change is of the same "
        "samples. Uniform groups are those whose answers all get the same reward, over the first and the last tenth of "
        "steps.",
        "",
        "| task | loose labels | metric | before | after | change, by seed | readable before, after | "
        "uniform groups | step (s) |",
        "|---" * 9 + "|",
    ]


def row(name: str, args: Args) -> str:
    """A task's line of the table, once its runs are through."""
    short = name.removeprefix("VLM-").removesuffix("-v0").lower()
    runs = [trained(args.runs / f"{short}-{seed}", options(name, seed, args)) for seed in range(args.seeds)]
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
        "model": str(args.runs / "base"),
        "steps": args.steps,
        "prompts_per_step": 8,
        "group_size": 8,
        "max_new_tokens": 320,
        "eval_limit": args.limit,
        "seed": seed,
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
