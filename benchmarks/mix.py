"""Referring expressions, detection and questions in one run, against a run on each of them.

    python benchmarks/mix.py --output benchmarks/mix.md

Beside the mixed run stand two runs on each task alone: one of as many samples of that task, and one of as many samples
in all. An interrupted benchmark is taken up by the same command.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import tyro

sys.path.append(str(Path(__file__).parent / "findings"))

from runs import check_model, evaluation_of, hardware, seconds_of, seeds_cell, spread_cell, trained

METRICS: Final[Mapping[str, str]] = {"VLM-REC-v0": "iou/mean", "VLM-OVD-v0": "AP", "VLM-VQA-v0": "accuracy"}
"""The tasks of the mix, each with its held-out metric."""


@dataclass
class Args:
    """Train on three tasks together and apart."""

    seeds: int = 3
    """Runs of each kind."""
    steps: int = 150
    """Of each run."""
    prompts: int = 4
    """Samples of each task in a step, with 8 answers each."""
    limit: int = 256
    """Held-out samples of each task."""
    runs: Path = Path("runs/mix")
    """Folder of the runs."""
    output: Path | None = None
    """Markdown file for the table."""


def main(args: Args) -> None:
    check_model(args.runs)
    seeds = range(args.seeds)
    mixed = [run("mix", {"mix": list(METRICS)}, args.prompts * len(METRICS), seed, args) for seed in seeds]
    alone = {
        name: {
            prompts: [run(f"{name}-{prompts}", {"env": name}, prompts, seed, args) for seed in seeds]
            for prompts in (args.prompts, args.prompts * len(METRICS))
        }
        for name in METRICS
    }
    text = "\n".join([*head(args), *table(mixed, alone), *cost(mixed, alone)]) + "\n"
    print(text)
    if args.output is not None:
        args.output.write_text(text, encoding="utf-8")


def run(name: str, task: Mapping[str, Any], prompts: int, seed: int, args: Args) -> Path:
    options = {
        **task,
        "seed": seed,
        "steps": args.steps,
        "prompts_per_step": prompts,
        "eval_limit": args.limit,
        "checkpoint_every": max(1, args.steps // 3),
        "keep": 1,
        "tracker": "none",
        "device": "cpu",
    }
    return trained(args.runs / f"{name}-seed{seed}", options)


def head(args: Args) -> list[str]:
    return [
        "# Three tasks in one run",
        "",
        f"    python benchmarks/mix.py --seeds {args.seeds} --steps {args.steps} --prompts {args.prompts} "
        f"--limit {args.limit}",
        "",
        f"GRPO with the built-in model, {args.steps} steps, 8 answers to each sample, seeds 0 to {args.seeds - 1}; "
        f"{hardware()}. The mix has {args.prompts} samples of each task in a "
        f"step. A run alone has {args.prompts} samples of its task in a step, as many as the mix has of it. A longer "
        f"one has as many as the mix has of all tasks together. Greedy answers to {args.limit} held-out samples of "
        "each task: mean over the seeds, standard deviation, and the seeds in their order.",
    ]


def table(mixed: Sequence[Path], alone: Mapping[str, Mapping[int, Sequence[Path]]]) -> list[str]:
    lines = ["", "| task | metric | before | mix | alone | alone, longer |", "|---" * 6 + "|"]
    for name, metric in METRICS.items():
        before = seeds_cell([evaluation_of(folder, "before")[f"{name}/{metric}"] for folder in mixed])
        cells = [spread_cell([evaluation_of(folder)[f"{name}/{metric}"] for folder in mixed])]
        cells += [
            spread_cell([evaluation_of(folder)[metric] for folder in folders]) for folders in alone[name].values()
        ]
        lines.append(f"| {name} | {metric} | {before} | {' | '.join(cells)} |")
    return lines


def cost(mixed: Sequence[Path], alone: Mapping[str, Mapping[int, Sequence[Path]]]) -> list[str]:
    """The seconds of all runs of each kind."""
    short, long = (
        [sum(seconds_of(own[prompts][i]) for own in alone.values()) for i in range(len(mixed))]
        for prompts in next(iter(alone.values()))
    )
    mix = seeds_cell([seconds_of(folder) for folder in mixed], 0)
    apart = f"{seeds_cell(short, 0)} for the three runs alone, and {seeds_cell(long, 0)} for the three longer ones"
    return ["", f"Seconds of training: {mix} for the mix, {apart}."]


if __name__ == "__main__":
    main(tyro.cli(Args))
