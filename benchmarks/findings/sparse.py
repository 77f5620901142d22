"""Perception before reasoning, where the reward of the reasoning is too sparse to begin with.

    python benchmarks/findings/sparse.py --output benchmarks/findings/sparse.md

PeBR-R1 (arXiv 2509.13031) first rewards what a model says of the image, and then the answers that it comes to. Here an
answer earns if the description before it names the colours and shapes of a crowded scene, and no others. The built-in
model was taught to describe two shapes. After some supervised steps on whole descriptions few of its answers earn.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from runs import (
    check_model,
    draw_stages,
    hardware,
    last_model,
    measured,
    publish,
    rows_file,
    seconds_of,
    spread_cell,
    trained,
)

from vlmenv.envs import Sample
from vlmenv.envs.data.captions import CaptionScenes
from vlmenv.envs.data.scenes import Split

ENV = "VLM-Caption-v0"
DESCRIBED, GROUNDED = "grounded:described", "grounded:grounded_answer"
WAYS: Mapping[str, list[dict[str, float]]] = {
    "perception, then reasoning": [{DESCRIBED: 1.0}, {GROUNDED: 1.0}],
    "both at once": [{DESCRIBED: 0.5, GROUNDED: 0.5}],
    "reasoning only": [{GROUNDED: 1.0}],
}
"""The rewards of each stage; the stages of a way share its steps."""
TOKENS = 96
"""Most new tokens, enough for whole descriptions."""
SHAPES = 5
"""Key words that a scene has at least: three shapes that differ."""


@dataclass
class Args:
    """Train in one stage and in two."""

    seeds: int = 3
    """Runs of each."""
    steps: int = 160
    """Of each way, over its stages together."""
    prompts: int = 8
    """In a step, eight answers to each."""
    rows: int = 600
    """Crowded scenes to train on."""
    lessons: int = 40
    """Supervised steps of the base on whole descriptions, of 16 built-in scenes."""
    limit: int = 256
    """Held-out crowded scenes to measure on."""
    runs: Path = Path("runs/findings/sparse")
    """Folder of the rows and the runs."""
    output: Path | None = None
    """Markdown file for the table; the figure goes beside it, as .png."""


def main(args: Args) -> None:
    check_model(args.runs)
    found = {way: [stages(way, seed, args) for seed in range(args.seeds)] for way in WAYS}
    publish(
        [*head(args), *table(found, args)],
        args.output,
        lambda path: draw_stages(path, found, ("reward/described", "reward/grounded_answer")),
    )


def crowded(split: Split) -> Iterator[Sample]:
    """Scenes that need `SHAPES` key words or more."""
    source = CaptionScenes(split)
    return (sample for sample in map(source.get, count()) if len(sample.target.keywords) >= SHAPES)


def base(args: Args) -> Path:
    """The model that all ways start from."""
    lessons = {"algo": "sft", "steps": args.lessons, "prompts_per_step": 16, "lr": 1e-3, "warmup_steps": 0}
    return last_model(trained(args.runs / "base", common() | lessons | {"checkpoint_every": args.lessons})).absolute()


def common() -> dict[str, Any]:
    return {"env": ENV, "max_new_tokens": TOKENS, "eval_limit": 0, "keep": 1, "device": "cpu"}


def stages(way: str, seed: int, args: Args) -> list[Path]:
    """The runs of a way's stages, each from the model of the one before."""
    rows = rows_file(ENV, islice(crowded("train"), args.rows), args.runs / "rows")
    folders: list[Path] = []
    for number, rewards in enumerate(WAYS[way], 1):
        steps = args.steps // len(WAYS[way])
        options = common() | {
            "dataset": [str(rows)],
            "model": str(last_model(folders[-1]).absolute() if folders else base(args)),
            "rewards": rewards,
            "seed": seed,
            "steps": steps,
            "prompts_per_step": args.prompts,
            "checkpoint_every": max(1, steps // 3),
        }
        folder = args.runs / f"{way.replace(',', '').replace(' ', '-')}-seed{seed}-{number}"
        folders.append(trained(folder, options))
    return folders


def head(args: Args) -> list[str]:
    options = ("seeds", "steps", "prompts", "rows", "lessons", "limit")
    lines = [
        "# A sparse reward for reasoning",
        "",
        "    python benchmarks/findings/sparse.py " + " ".join(f"--{name} {getattr(args, name)}" for name in options),
        "",
        f"GRPO on {args.rows} built-in scenes with {SHAPES} key words or more, {args.steps} steps of {args.prompts} "
        f"prompts with 8 answers in all, seeds 0 to {args.seeds - 1}; {hardware()}. "
        f"The base is the built-in model after {args.lessons} steps of SFT on whole "
        "descriptions. Perception earns by the F1 of the colours and shapes that the description names. Reasoning "
        "earns by a right answer after a description of F1 1. At once, it is the mean of both. Out of format nothing "
        "is earned. "
        f"Greedy answers to {args.limit} held-out scenes of this kind. The mean over seeds ± the standard deviation, "
        "and each seed.",
    ]
    return lines if args.output is None else [*lines, "", f"![Rewards of sampled answers]({args.output.stem}.png)"]


def table(found: Mapping[str, list[list[Path]]], args: Args) -> list[str]:
    columns = ("rewards", "F1 of descriptions", "right answers", "after exact descriptions", "seconds")
    lines = ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    before = measure(args.runs / "before", str(base(args)), args)
    lines.append(f"| before | {' | '.join(f'{value:.3f}' for value in before)} | |")
    for way, seeds in found.items():
        for number in range(len(WAYS[way]) - 1):
            lines.append(f"| … after its first stage | {cells_of([folders[number] for folders in seeds], args)} | |")
        seconds = spread_cell([sum(map(seconds_of, folders)) for folders in seeds], 0)
        lines.append(f"| {way} | {cells_of([folders[-1] for folders in seeds], args)} | {seconds} |")
    return lines


def measure(folder: Path, model: str, args: Args) -> list[float]:
    """Means over greedy answers: of both rewards, and between them of right answers."""
    rows = rows_file(ENV, islice(crowded("eval"), args.limit), args.runs / "held-out")
    asked = {"env": ENV, "dataset": [str(rows)], "model": model, "rewards": {DESCRIBED: 0.5, GROUNDED: 0.5}}
    measured(folder / "measured", asked | {"eval_limit": args.limit, "max_new_tokens": TOKENS, "device": "cpu"})
    lines = (folder / "measured" / "answers.jsonl").read_text().splitlines()
    answers = [(one["rewards"], one["measures"]) for one in map(json.loads, lines)]
    found = [(rewards["described"], own["accuracy"], rewards["grounded_answer"]) for rewards, own in answers]
    return [float(mean) for mean in np.mean(found, axis=0)]


def cells_of(folders: list[Path], args: Args) -> str:
    after = [measure(folder, str(last_model(folder)), args) for folder in folders]
    return " | ".join(map(spread_cell, zip(*after, strict=True)))


if __name__ == "__main__":
    main(tyro.cli(Args))
