"""Reward hacking in detection: AP as the reward, with and without a penalty for superfluous boxes.

    python benchmarks/findings/hacking.py --output benchmarks/findings/hacking.md

VLM-R1 (arXiv 2504.07615, section 5) finds that with AP as the reward answers grow longer and have more and more boxes.
`od_length` multiplies AP by a penalty for boxes beyond the true number, which stops that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tyro
from matplotlib.figure import Figure
from runs import (
    check_model,
    draw_seeds,
    evaluation_of,
    hardware,
    mean_of,
    publish,
    save,
    seconds_of,
    seeds_cell,
    steps_of,
    tail,
    trained,
)

REWARDS = ("map", "map50", "od_length")
CURVES = {"completion/box_ratio": "boxes answered per true one", "completion/length": "tokens of an answer"}


@dataclass
class Args:
    """Train detection with each reward."""

    seeds: int = 3
    """Runs of each."""
    steps: int = 120
    """Of each run."""
    prompts: int = 8
    """In a step, eight answers to each."""
    limit: int = 256
    """Held-out samples to measure on."""
    runs: Path = Path("runs/findings/hacking")
    """Folder of the runs."""
    output: Path | None = None
    """Markdown file for the table; the figure goes beside it, as .png."""


def main(args: Args) -> None:
    check_model(args.runs)
    found = {reward: [run(reward, seed, args) for seed in range(args.seeds)] for reward in REWARDS}
    publish([*head(args), *table(found)], args.output, lambda path: draw(path, found))


def run(reward: str, seed: int, args: Args) -> Path:
    options = {
        "env": "VLM-OVD-v0",
        "rewards": {reward: 1.0, "format": 0.1},
        "seed": seed,
        "steps": args.steps,
        "prompts_per_step": args.prompts,
        "max_new_tokens": 320,
        "eval_limit": args.limit,
        "eval_every": max(1, args.steps // 4),
        "checkpoint_every": max(1, args.steps // 4),
        "keep": 1,
        "device": "cpu",
    }
    return trained(args.runs / f"{reward}-seed{seed}", options)


def head(args: Args) -> list[str]:
    lines = [
        "# Reward hacking in detection",
        "",
        f"    python benchmarks/findings/hacking.py --seeds {args.seeds} --steps {args.steps} --prompts {args.prompts} "
        f"--limit {args.limit}",
        "",
        f"GRPO on the built-in detection scenes from the built-in model, {args.steps} steps of {args.prompts} prompts, "
        f"seeds 0 to {args.seeds - 1}, answers of up to 320 tokens; {hardware()}. Each reward has `format` beside it, "
        f"with weight 0.1. AP, precision and recall are of greedy answers to {args.limit} held-out scenes; boxes and "
        "tokens of sampled answers in the last tenth of training. Warnings are those of the run itself "
        "(`warnings.jsonl`): answers drift while the held-out metric falls.",
    ]
    return lines if args.output is None else [*lines, "", f"![Boxes and tokens]({args.output.stem}.png)"]


def table(found: Mapping[str, list[Path]]) -> list[str]:
    first = found[REWARDS[0]][0]
    before = evaluation_of(first, "before")
    steps = steps_of(first)[:1]
    return [
        "",
        "| reward | AP | precision@0.5 | recall@0.5 | boxes per true one | tokens | warnings | seconds |",
        "|---" * 8 + "|",
        f"| before | {before['AP']:.3f} | {before['precision@0.5']:.3f} | {before['recall@0.5']:.3f} "
        f"| {mean_of(steps, 'completion/box_ratio'):.2f} | {mean_of(steps, 'completion/length'):.0f} | | |",
        *(row(reward, folders) for reward, folders in found.items()),
    ]


def row(reward: str, folders: list[Path]) -> str:
    after = [evaluation_of(folder) for folder in folders]
    cells = [seeds_cell([one[name] for one in after]) for name in ("AP", "precision@0.5", "recall@0.5")]
    cells.append(seeds_cell([tail(folder, "completion/box_ratio") for folder in folders], 2))
    cells.append(seeds_cell([tail(folder, "completion/length") for folder in folders], 0))
    cells.append(seeds_cell([warnings(folder) for folder in folders], 0))
    cells.append(seeds_cell([seconds_of(folder) for folder in folders], 0))
    return f"| {reward} | {' | '.join(cells)} |"


def warnings(folder: Path) -> int:
    file = folder / "warnings.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def draw(path: Path, found: Mapping[str, list[Path]]) -> None:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        curves = {
            reward: [[s.get(name, float("nan")) for s in steps_of(f)] for f in folders]
            for reward, folders in found.items()
        }
        draw_seeds(axes, curves, width=10)
        axes.set(ylabel=label)
        axes.legend(frameon=False)
    save(figure, path)


if __name__ == "__main__":
    main(tyro.cli(Args))
