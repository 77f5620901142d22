"""What GRPO does to the built-in model on the built-in scenes, against supervised training of the same time.

    python benchmarks/rec_builtin.py --output benchmarks/rec_builtin.md

Trains by `vlmenv train` with each seed, and twice by supervision for as long as the first run's steps took: on the
loose labels that the model was taught by, and on exact ones. Measures all of them by `vlmenv eval` on the same held-out
scenes, greedily and with eight sampled answers to each. An interrupted benchmark is taken up by the same command.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT / part) for part in ("examples", "benchmarks/findings")]

import builtin_model  # noqa: E402
from runs import check_model, hardware, last_model, measured, seconds_of, tell_rows, trained  # noqa: E402

COLUMNS = ("iou/mean", "accuracy@0.5", "accuracy@0.75", "format")


@dataclass
class Args:
    """Measures what GRPO does to the built-in model."""

    seeds: int = 3
    """Runs of GRPO, with seeds from 0."""
    steps: int = 300
    """Steps of GRPO; 300 are those of `vlmenv train`."""
    limit: int = 512
    """Held-out scenes to measure on."""
    runs: Path = Path("runs/rec_builtin")
    """Folder of the runs."""
    output: Path | None = None
    """Markdown file for the table."""


def main(args: Args) -> None:
    check_model(args.runs)
    tell_rows(head(args), rows(args), args.output)


def head(args: Args) -> list[str]:
    return [
        "# GRPO on the built-in model and scenes",
        "",
        "    python benchmarks/rec_builtin.py "
        f"--seeds {args.seeds} --steps {args.steps} --limit {args.limit} --output benchmarks/rec_builtin.md",
        "",
        f"{args.limit} held-out scenes; {hardware()}. Time is that of the steps, in seconds. Supervision takes as long "
        "as the steps of seed 0.",
        "",
        f"| | {' | '.join([*COLUMNS, 'sampled iou/mean'])} | time |",
        "|---" * (len(COLUMNS) + 3) + "|",
    ]


def rows(args: Args) -> Iterator[str]:
    yield row("built-in model", "builtin", args.runs / "base", "", args)
    runs = [grpo(seed, args) for seed in range(args.seeds)]
    for seed, run in enumerate(runs):
        model = str(last_model(run).absolute())
        yield row(f"GRPO, seed {seed}", model, args.runs / f"seed{seed}-eval", f"{seconds_of(run):.0f}", args)
    seconds = seconds_of(runs[0])
    for labels in LABELS:
        model = str(supervised(labels, seconds, args).absolute())
        yield row(f"supervised, {labels} labels", model, args.runs / f"{labels}-eval", f"{seconds:.0f}", args)


LABELS: tuple[Literal["loose", "exact"], ...] = ("loose", "exact")


def grpo(seed: int, args: Args) -> Path:
    options = {"seed": seed, "steps": args.steps, "eval_limit": args.limit, "device": "cpu"}
    return trained(args.runs / f"seed{seed}", options)


def supervised(labels: Literal["loose", "exact"], seconds: float, args: Args) -> Path:
    """The built-in model after so long on labels of referring expressions alone."""
    folder = args.runs / labels
    if not (folder / "vlmenv.json").exists():  # it is written last
        lessons = builtin_model.Args(folder, init="builtin", labels=labels, minutes=seconds / 60, tasks={}, lr=1e-3)
        builtin_model.main(lessons)
    return folder


def row(name: str, model: str, folder: Path, time: str, args: Args) -> str:
    """Greedy metrics, and the mean overlap of sampled answers."""
    options = {"model": model, "eval_limit": args.limit, "device": "cpu"}
    greedy = measured(folder / "greedy", options)
    sampled = measured(folder / "sampled", options | {"samples": 8})
    cells = [f"{value:.3f}" for value in (*(greedy[column] for column in COLUMNS), sampled["iou/mean"])]
    return f"| {name} | {' | '.join(cells)} | {time} |"


if __name__ == "__main__":
    main(tyro.cli(Args))
