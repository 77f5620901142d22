"""Perception before reasoning: two stages of rewards against one, and against the answer's reward alone.

    python benchmarks/findings/two_stages.py --output benchmarks/findings/two_stages.md

PeBR-R1 (arXiv 2509.13031) first rewards what a model says of the image, and then the answers that it comes to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tyro
from runs import (
    check_model,
    draw_stages,
    hardware,
    last_model,
    measured,
    publish,
    seconds_of,
    seeds_cell,
    trained,
)

PERCEPTION = {"clip": 0.4, "keywords": 0.4, "format": 0.1, "length": 0.1}
REASONING = {"accuracy": 0.9, "format": 0.1}
BOTH = {"clip": 0.2, "keywords": 0.2, "accuracy": 0.45, "format": 0.1, "length": 0.05}
WAYS: Mapping[str, list[dict[str, float]]] = {
    "perception, then reasoning": [PERCEPTION, REASONING],
    "both at once": [BOTH],
    "reasoning only": [REASONING],
}
"""The rewards of each stage; the stages of a way share its steps."""
METRICS = ("clip", "keyword_recall", "accuracy", "format")


@dataclass
class Args:
    """Train in one stage and in two."""

    seeds: int = 3
    """Runs of each."""
    steps: int = 120
    """Of each way, over its stages together."""
    prompts: int = 8
    """In a step, eight answers to each."""
    limit: int = 256
    """Held-out samples to measure on."""
    runs: Path = Path("runs/findings/two_stages")
    """Folder of the runs."""
    output: Path | None = None
    """Markdown file for the table; the figure goes beside it, as .png."""


def main(args: Args) -> None:
    check_model(args.runs)
    found = {way: [stages(way, seed, args) for seed in range(args.seeds)] for way in WAYS}
    publish(
        [*head(args), *table(found, args)],
        args.output,
        lambda path: draw_stages(path, found, ("reward/keywords", "reward/accuracy")),
    )


def stages(way: str, seed: int, args: Args) -> list[Path]:
    """The runs of a way's stages, each from the model of the one before."""
    folders: list[Path] = []
    for number, rewards in enumerate(WAYS[way], 1):
        steps = args.steps // len(WAYS[way])
        options = {
            "env": "VLM-Caption-v0",
            "model": str(last_model(folders[-1]).absolute()) if folders else "builtin",
            "rewards": rewards,
            "seed": seed,
            "steps": steps,
            "prompts_per_step": args.prompts,
            "eval_limit": 0,
            "checkpoint_every": max(1, steps // 3),
            "keep": 1,
            "device": "cpu",
        }
        folders.append(trained(args.runs / f"{way.replace(',', '').replace(' ', '-')}-seed{seed}-{number}", options))
    return folders


def head(args: Args) -> list[str]:
    lines = [
        "# Perception before reasoning",
        "",
        f"    python benchmarks/findings/two_stages.py --seeds {args.seeds} --steps {args.steps} "
        f"--prompts {args.prompts} --limit {args.limit}",
        "",
        f"GRPO on the built-in captions and questions from the built-in model, {args.steps} steps of {args.prompts} "
        f"prompts in all, seeds 0 to {args.seeds - 1}; {hardware()}. Perception earns by `clip`, key words, format and "
        "length of the description, reasoning by the answer (0.9) and format (0.1); at once, by the mean of both. "
        f"Greedy answers to {args.limit} held-out samples.",
    ]
    return lines if args.output is None else [*lines, "", f"![Accuracy of sampled answers]({args.output.stem}.png)"]


def table(found: Mapping[str, list[list[Path]]], args: Args) -> list[str]:
    before = measure(args.runs / "before", "builtin", args)
    lines = ["", f"| rewards | {' | '.join(METRICS)} | seconds |", "|---" * (len(METRICS) + 2) + "|"]
    lines.append(f"| before | {' | '.join(f'{before[name]:.3f}' for name in METRICS)} | |")
    for way, seeds in found.items():
        for number in range(len(WAYS[way]) - 1):
            cells = cells_of([folders[number] for folders in seeds], args)
            lines.append(f"| … after its first stage | {cells} | |")
        seconds = seeds_cell([sum(map(seconds_of, folders)) for folders in seeds], 0)
        lines.append(f"| {way} | {cells_of([folders[-1] for folders in seeds], args)} | {seconds} |")
    return lines


def measure(folder: Path, model: str, args: Args) -> dict[str, float]:
    options = {"env": "VLM-Caption-v0", "model": model, "rewards": BOTH, "eval_limit": args.limit, "device": "cpu"}
    return measured(folder / "held-out", options)


def cells_of(folders: list[Path], args: Args) -> str:
    after = [measure(folder, str(last_model(folder)), args) for folder in folders]
    return " | ".join(seeds_cell([one[name] for one in after]) for name in METRICS)


if __name__ == "__main__":
    main(tyro.cli(Args))
