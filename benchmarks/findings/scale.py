"""What GRPO adds to bases of three sizes that were taught alike.

    python benchmarks/findings/scale.py --output benchmarks/findings/scale.md

The bases are like the built-in model, but narrower or wider. Each is taught referring expressions from random weights,
by the same number of lessons with loose boxes. GRPO then rewards the overlap.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tyro
from bases import taught
from matplotlib.figure import Figure
from runs import (
    check_model,
    draw_seeds,
    evaluation_of,
    hardware,
    mean_of,
    measurements_of,
    publish,
    save,
    seconds_of,
    seeds_cell,
    spread_cell,
    steps_of,
    tail,
    trained,
)

from vlmenv.agents import VLMAgent

METRIC = "iou/mean"


@dataclass
class Args:
    """Teach bases of several sizes, and train from each."""

    widths: tuple[int, ...] = (64, 128, 256)
    """Of the bases' hidden states: 0.5, 1.6 and 5.6 million parameters."""
    lessons: int = 3000
    """Supervised steps of a base, of 16 scenes with four expressions."""
    seeds: int = 3
    """Runs from each base."""
    steps: int = 100
    """Of each run."""
    prompts: int = 8
    """In a step, with eight answers each."""
    every: int = 20
    """Steps between measurements."""
    limit: int = 512
    """Held-out samples to measure on."""
    runs: Path = Path("runs/findings/scale")
    """Folder of the bases and the runs."""
    output: Path | None = None
    """Markdown file for the table; the figure goes beside it, as .png."""


def main(args: Args) -> None:
    check_model(args.runs)
    found = {width: [run(width, seed, args) for seed in range(args.seeds)] for width in args.widths}
    publish([*head(args), *table(found, args)], args.output, lambda path: draw(path, found))


def base_of(width: int, args: Args) -> Path:
    return taught(args.runs / f"base-{width}", width, args.lessons)


def run(width: int, seed: int, args: Args) -> Path:
    options = {
        "env": "VLM-REC-v0",
        "model": str(base_of(width, args)),
        "seed": seed,
        "steps": args.steps,
        "prompts_per_step": args.prompts,
        "group_size": 8,
        "eval_limit": args.limit,
        "eval_every": args.every,
        "checkpoint_every": max(1, args.steps // 4),
        "keep": 1,
        "device": "cpu",
    }
    return trained(args.runs / f"width-{width}-seed{seed}", options)


def head(args: Args) -> list[str]:
    options = ("lessons", "seeds", "steps", "prompts", "every", "limit")
    lines = [
        "# Size",
        "",
        "    python benchmarks/findings/scale.py " + " ".join(f"--{name} {getattr(args, name)}" for name in options),
        "",
        f"Bases of several widths, each taught referring expressions from random weights for {args.lessons} steps of "
        "16 scenes, by annotators whose boxes are 5 to 30 % too wide on every side. Then GRPO with the reward IoU, "
        f"{args.steps} steps of {args.prompts} prompts with 8 answers, seeds 0 to {args.seeds - 1}; {hardware()}. "
        f"Mean IoU of greedy answers to {args.limit} held-out samples; "
        "the changes are those of the same samples, with 95 % intervals. The reward is that of sampled answers, over "
        "the first and the last tenth of the steps. One base of each size was taught, so the spread over bases is not "
        "known.",
    ]
    return lines if args.output is None else [*lines, "", f"![Held-out mean IoU]({args.output.stem}.png)"]


def table(found: Mapping[int, list[Path]], args: Args) -> list[str]:
    columns = ("parameters (M)", "mean IoU before", "after", "change, by seed", "reward at first", "at last", "seconds")
    return ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"] + [
        row(width, folders, args) for width, folders in found.items()
    ]


def row(width: int, folders: list[Path], args: Args) -> str:
    model = VLMAgent.from_pretrained(base_of(width, args)).family.model
    tenth = max(1, args.steps // 10)
    first = [mean_of(steps_of(folder)[:tenth], "reward/mean") for folder in folders]
    cells = [
        f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.1f}",
        f"{evaluation_of(folders[0], 'before')[METRIC]:.3f}",
        spread_cell([evaluation_of(folder)[METRIC] for folder in folders]),
        " / ".join(change(folder) for folder in folders),
        seeds_cell(first),
        seeds_cell([tail(folder, "reward/mean") for folder in folders]),
        seeds_cell([seconds_of(folder) for folder in folders], 0),
    ]
    return f"| {' | '.join(cells)} |"


def change(folder: Path) -> str:
    told = json.loads((folder / "evaluation.json").read_text())["change"][METRIC]
    return f"{told['value']:+.3f} ({told['low']:+.3f} to {told['high']:+.3f})"


def draw(path: Path, found: Mapping[int, list[Path]]) -> None:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots()
    curves = {f"width {width}": [curve(folder) for folder in folders] for width, folders in found.items()}
    steps = [step for step, _ in next(iter(curves.values()))[0]]
    draw_seeds(axes, {name: [[value for _, value in one] for one in own] for name, own in curves.items()}, steps=steps)
    axes.set(xlabel="step", ylabel="held-out mean IoU")
    axes.legend(frameon=False)
    save(figure, path)


def curve(folder: Path) -> list[tuple[int, float]]:
    """The held-out metric before training and on the way, by step."""
    return [(0, evaluation_of(folder, "before")[METRIC]), *measurements_of(folder, METRIC)]


if __name__ == "__main__":
    main(tyro.cli(Args))
