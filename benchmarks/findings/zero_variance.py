"""Groups whose rewards are all equal teach nothing: what is gained by looking for others.

    python benchmarks/findings/zero_variance.py --output benchmarks/findings/zero_variance.md

With a reward that is 0 or 1, a group of answers that are all right, or all wrong, has no advantages. PeBR-R1 leaves
such questions out by sampling before training; DAPO (arXiv 2503.14476, section 3.2) rolls out further batches until one
is full of groups that differ, `--most-rounds`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure
from runs import (
    check_model,
    draw_seeds,
    evaluation_of,
    hardware,
    publish,
    save,
    seconds_of,
    seeds_cell,
    steps_of,
    trained,
)

WAYS = {"as they come": 1, "left out": 4}
"""Batches that a step may roll out."""


@dataclass
class Args:
    """Train with and without groups of equal rewards."""

    seeds: int = 3
    """Runs of each."""
    steps: int = 100
    """Of each run."""
    prompts: int = 8
    """In a step, eight answers to each."""
    limit: int = 512
    """Held-out samples to measure on."""
    runs: Path = Path("runs/findings/zero_variance")
    """Folder of the runs."""
    output: Path | None = None
    """Markdown file for the table; the figure goes beside it, as .png."""


def main(args: Args) -> None:
    check_model(args.runs)
    found = {name: [run(rounds, seed, args) for seed in range(args.seeds)] for name, rounds in WAYS.items()}
    publish([*head(args), *table(found)], args.output, lambda path: draw(path, found))


def run(rounds: int, seed: int, args: Args) -> Path:
    options = {
        "env": "VLM-REC-v0",
        "rewards": {"iou@0.5": 1.0},
        "most_rounds": rounds,
        "seed": seed,
        "steps": args.steps,
        "prompts_per_step": args.prompts,
        "eval_limit": args.limit,
        "eval_every": max(1, args.steps // 4),
        "checkpoint_every": max(1, args.steps // 4),
        "keep": 1,
        "device": "cpu",
    }
    return trained(args.runs / f"rounds{rounds}-seed{seed}", options)


def head(args: Args) -> list[str]:
    lines = [
        "# Groups that teach nothing",
        "",
        f"    python benchmarks/findings/zero_variance.py --seeds {args.seeds} --steps {args.steps} "
        f"--prompts {args.prompts} --limit {args.limit}",
        "",
        f"GRPO on the built-in referring expressions from the built-in model, {args.steps} steps of {args.prompts} "
        f"prompts, seeds 0 to {args.seeds - 1}; {hardware()}. The reward is 1 where the overlap is above one "
        f"half, else 0. Greedy answers to {args.limit} held-out scenes. The share of groups of equal rewards is "
        "among all that were rolled out; batches are what a step rolled out, on average.",
    ]
    return lines if args.output is None else [*lines, "", f"![Held-out accuracy]({args.output.stem}.png)"]


def table(found: Mapping[str, list[Path]]) -> list[str]:
    before = evaluation_of(found["as they come"][0], "before")
    return [
        "",
        "| groups of equal rewards | accuracy@0.5 | accuracy@0.75 | mean overlap | share | batches a step | seconds |",
        "|---" * 7 + "|",
        f"| before | {before['accuracy@0.5']:.3f} | {before['accuracy@0.75']:.3f} | {before['iou/mean']:.3f} | | | |",
        *(row(name, folders) for name, folders in found.items()),
    ]


def row(name: str, folders: list[Path]) -> str:
    after = [evaluation_of(folder) for folder in folders]
    cells = [seeds_cell([one[metric] for one in after]) for metric in ("accuracy@0.5", "accuracy@0.75", "iou/mean")]
    cells.append(seeds_cell([mean(folder, "reward/zero_std_groups") for folder in folders], 2))
    cells.append(seeds_cell([mean(folder, "rounds") for folder in folders], 1))
    cells.append(seeds_cell([seconds_of(folder) for folder in folders], 0))
    return f"| {name} | {' | '.join(cells)} |"


def mean(folder: Path, name: str) -> float:
    return float(np.mean([step.get(name, 1.0) for step in steps_of(folder)]))


def draw(path: Path, found: Mapping[str, list[Path]]) -> None:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, folders in found.items():
        steps = [steps_of(folder) for folder in folders]
        at = [step["step"] for step in steps[0] if "eval/accuracy@0.5" in step]
        curves = np.array([[step["eval/accuracy@0.5"] for step in own if "eval/accuracy@0.5" in step] for own in steps])
        left.plot(at, curves.mean(axis=0), marker="o", label=name)
    left.set(xlabel="step", ylabel="held-out accuracy@0.5")
    left.grid(alpha=0.3)
    left.legend(frameon=False)
    shares = {n: [[s["reward/zero_std_groups"] for s in steps_of(f)] for f in folders] for n, folders in found.items()}
    draw_seeds(right, shares, width=10)
    right.set(ylabel="groups of equal rewards")
    save(figure, path)


if __name__ == "__main__":
    main(tyro.cli(Args))
