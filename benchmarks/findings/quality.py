"""Data quality: rows whose expression determines one object, and rows whose expression fits several.

    python benchmarks/findings/quality.py --output benchmarks/findings/quality.md

VLM-R1 (arXiv 2504.07615) names the quality of training data among its insights. Here half of the objects of a scene
share attributes, so that most scenes have an expression of either kind. All kinds of rows are of the same scenes, and
equal in number. The true object of an ambiguous row is one of those that its expression fits, drawn by chance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure
from runs import (
    check_model,
    draw_seeds,
    evaluation_of,
    hardware,
    measurements_of,
    publish,
    rows_file,
    save,
    seconds_of,
    seeds_cell,
    spread_cell,
    steps_of,
    trained,
)

from vlmenv.envs import Sample
from vlmenv.envs.data.scenes import QUESTION, ReferringScenes, Scene, Shape, choose_reference, sample_scene

ENV = "VLM-REC-v0"
KINDS = {"determined": 0.0, "ambiguous": 1.0}
"""The share of ambiguous rows."""
METRICS = ("iou/mean", "accuracy@0.5", "accuracy@0.75")


@dataclass
class Args:
    """Train on rows of each kind."""

    seeds: int = 3
    """Runs of each."""
    rows: int = 400
    """Training rows of each kind."""
    steps: int = 50
    """Of each run."""
    prompts: int = 8
    """In a step, eight answers to each."""
    every: int = 25
    """Steps between measurements."""
    limit: int = 256
    """Held-out samples to measure on."""
    runs: Path = Path("runs/findings/quality")
    """Folder of the rows and the runs."""
    output: Path | None = None
    """Markdown file for the table; the figure goes beside it, as .png."""


def main(args: Args) -> None:
    check_model(args.runs)
    held_out = rows_file(ENV, map(ReferringScenes("eval").get, range(args.limit)), args.runs / "held-out")
    found = {kind: [run(kind, seed, held_out, args) for seed in range(args.seeds)] for kind in KINDS}
    publish([*head(args), *table(found)], args.output, lambda path: draw(path, found))


def samples(share: float) -> Iterator[Sample]:
    """Referring expressions of the scenes that have ambiguous ones too; a share of them is ambiguous."""
    for index in count():
        scene, rng = sample_scene("train", index)
        unclear = ambiguous(scene)
        if not unclear:
            continue
        clear = choose_reference(scene, rng)
        expression, fitting = unclear[rng.integers(len(unclear))]
        target = fitting[rng.integers(len(fitting))]
        if rng.random() >= share:
            expression, target = clear.expression, clear.target
        question = QUESTION.format(expression=expression)
        yield Sample(f"scene-{index}", (scene.image,), question, target.box, f"the {target}")


def ambiguous(scene: Scene) -> list[tuple[str, list[Shape]]]:
    """Expressions that fit several shapes of a scene, and these."""
    found = []
    for word in sorted({word for shape in scene.shapes for word in (shape.colour, shape.kind)}):
        fitting = [shape for shape in scene.shapes if word in (shape.colour, shape.kind)]
        if len(fitting) > 1:
            found.append((f"the {word}" if fitting[0].kind == word else f"the {word} shape", fitting))
    return found


def run(kind: str, seed: int, held_out: Path, args: Args) -> Path:
    rows = rows_file(ENV, islice(samples(KINDS[kind]), args.rows), args.runs / "rows" / kind)
    options = {
        "env": ENV,
        "dataset": [str(rows)],
        "eval_dataset": [str(held_out)],
        "seed": seed,
        "steps": args.steps,
        "prompts_per_step": args.prompts,
        "eval_limit": args.limit,
        "eval_every": args.every,
        "checkpoint_every": max(1, args.steps // 4),
        "keep": 1,
        "device": "cpu",
    }
    return trained(args.runs / f"{kind}-seed{seed}", options)


def head(args: Args) -> list[str]:
    options = ("seeds", "rows", "steps", "prompts", "every", "limit")
    lines = [
        "# Data quality",
        "",
        "    python benchmarks/findings/quality.py " + " ".join(f"--{name} {getattr(args, name)}" for name in options),
        "",
        f"GRPO on referring expressions from the built-in model, {args.steps} steps of {args.prompts} prompts, seeds 0 "
        f"to {args.seeds - 1}; {hardware()}. Each kind has {args.rows} "
        "rows of the same scenes. An ambiguous expression fits two objects or more, and one of them, drawn by chance, "
        f"is the true one. Greedy answers to the same {args.limit} held-out scenes, whose expressions determine one "
        "object. The mean over seeds ± the standard deviation, and each seed.",
    ]
    return lines if args.output is None else [*lines, "", f"![Held-out mean IoU and reward]({args.output.stem}.png)"]


def table(found: Mapping[str, list[Path]]) -> list[str]:
    before = evaluation_of(found["determined"][0], "before")
    return [
        "",
        f"| rows | {' | '.join(METRICS)} | groups of equal rewards | seconds |",
        "|---" * (len(METRICS) + 3) + "|",
        f"| before | {' | '.join(f'{before[name]:.3f}' for name in METRICS)} | | |",
        *(row(kind, folders) for kind, folders in found.items()),
    ]


def row(kind: str, folders: list[Path]) -> str:
    after = [evaluation_of(folder) for folder in folders]
    equal = [np.mean([step["reward/zero_std_groups"] for step in steps_of(folder)]) for folder in folders]
    cells = [spread_cell([one[name] for one in after]) for name in METRICS]
    cells += [seeds_cell(equal, 2), seeds_cell([seconds_of(folder) for folder in folders], 0)]
    return f"| {kind} | {' | '.join(cells)} |"


def draw(path: Path, found: Mapping[str, list[Path]]) -> None:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    at = [step for step, _ in measurements_of(found["determined"][0], "iou/mean")]
    measured = {
        kind: [[value for _, value in measurements_of(folder, "iou/mean")] for folder in folders]
        for kind, folders in found.items()
    }
    rewards = {kind: [[step["reward/iou"] for step in steps_of(f)] for f in folders] for kind, folders in found.items()}
    draw_seeds(left, measured, steps=at)
    draw_seeds(right, rewards, width=10)
    left.set(ylabel="held-out mean IoU")
    right.set(ylabel="IoU of sampled answers")
    left.legend(frameon=False)
    save(figure, path)


if __name__ == "__main__":
    main(tyro.cli(Args))
