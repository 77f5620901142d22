"""Sampling of a data set before training, against filtering while it goes on.

    python benchmarks/findings/sampling.py --output benchmarks/findings/sampling.md

PeBR-R1 (arXiv 2509.13031) answers each question eight times before training. It trains on those that are neither always
right nor never. Here four fifths of the rows are too easy or too hard for the base, as many further answers tell. DAPO
(arXiv 2503.14476) rolls out further prompts until a batch is full of groups that differ (`--most-rounds`). `--revisit`
shows rows less often whose answers all earned the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.figure import Figure
from runs import (
    check_model,
    evaluation_of,
    hardware,
    measurements_of,
    publish,
    rows_file,
    sampled,
    save,
    seconds_of,
    seeds_cell,
    spread_cell,
    steps_of,
    trained,
)

from vlmenv.envs.data.scenes import ReferringScenes

ENV = "VLM-REC-v0"
ANSWERS = 8
"""Of a prompt, in training and in sampling."""
MEDIUM_SHARE = 0.2
"""Of the rows of the file."""
METRIC = "accuracy@0.5"
SAMPLED = "sampled rows"
WAYS: Mapping[str, Mapping[str, Any]] = {
    "all rows": {},
    SAMPLED: {},
    "online filtering": {"most_rounds": 4},
    "revisit": {"revisit": 0.2},
}
"""Options of each way."""


@dataclass
class Args:
    """Train on a file of mostly useless rows in each way."""

    seeds: int = 3
    """Runs of each."""
    pool: int = 6000
    """Built-in samples, of which the file is made."""
    again: int = 32
    """Further answers to each sample that seems too easy or too hard, in which it must be so too."""
    rows: int = 200
    """Of the file."""
    steps: int = 60
    """Of each run."""
    prompts: int = 8
    """In a step."""
    every: int = 15
    """Steps between measurements."""
    limit: int = 512
    """Held-out samples to measure on."""
    runs: Path = Path("runs/findings/sampling")
    """Folder of the rows and the runs."""
    output: Path | None = None
    """Markdown file for the table; the figure goes beside it, as .png."""


def main(args: Args) -> None:
    check_model(args.runs)
    pool = rated(args.runs / "pool", args, eval_limit=args.pool).absolute()
    mixed = file_of_rows(pool, args)
    chosen = rated(args.runs / "file", args, dataset=str(mixed))
    medium = pool / f"medium-of-{mixed.name}"  # beside the images
    medium.write_text((chosen / "medium.jsonl").read_text())
    found = {
        way: [run(way, seed, medium if way == SAMPLED else mixed, args) for seed in range(args.seeds)] for way in WAYS
    }
    counts = {"pool": counts_of(pool), "file": counts_of(chosen)}
    publish([*head(counts, args), *table(found, args)], args.output, lambda path: draw(path, found, args))


def rated(folder: Path, args: Args, **options: Any) -> Path:
    """A folder with rows by the share of the base's answers that are right."""
    return sampled(folder, {"env": ENV, "rewards": {"iou@0.5": 1.0}, "n": ANSWERS, "device": "cpu"} | options)


def counts_of(folder: Path) -> dict[str, int]:
    """Rows by level."""
    return dict(json.loads((folder / "summary.json").read_text()))


def file_of_rows(pool: Path, args: Args) -> Path:
    """A file with as many easy as hard rows, and `MEDIUM_SHARE` of medium ones."""
    medium = round(MEDIUM_SHARE * args.rows)
    hard = (args.rows - medium) // 2
    wanted = {"medium": medium, "hard": hard, "easy": args.rows - medium - hard}
    chosen: list[str] = []
    for level, count in wanted.items():
        rows = (pool / f"{level}.jsonl").read_text().splitlines() if level == "medium" else settled(pool, level, args)
        if len(rows) < count:
            raise SystemExit(f"{args.pool} samples have {len(rows)} {level} rows, not {count}: raise --pool")
        chosen += rows[:count]
    file = pool / f"rows-{args.rows}.jsonl"
    file.write_text("\n".join(np.random.default_rng(0).permutation(chosen).tolist()) + "\n")
    return file


def settled(pool: Path, level: str, args: Args) -> list[str]:
    """The easy or hard rows of the pool that are so in further answers too."""
    if not (pool / f"{level}.jsonl").read_text():
        return []
    again = rated(args.runs / f"{level}-again", args, dataset=str(pool / f"{level}.jsonl"), n=args.again, seed=1)
    return (again / f"{level}.jsonl").read_text().splitlines()


def run(way: str, seed: int, file: Path, args: Args) -> Path:
    options = {
        "env": ENV,
        "rewards": {"iou@0.5": 1.0},
        "dataset": [str(file)],
        "eval_dataset": [
            str(rows_file(ENV, map(ReferringScenes("eval").get, range(args.limit)), args.runs / "held-out"))
        ],
        "seed": seed,
        "steps": args.steps,
        "prompts_per_step": args.prompts,
        "group_size": ANSWERS,
        "eval_limit": args.limit,
        "eval_every": args.every,
        "checkpoint_every": max(1, args.steps // 4),
        "keep": 1,
        "device": "cpu",
    }
    return trained(args.runs / f"{way.replace(' ', '-')}-seed{seed}", options | WAYS[way])


def head(counts: Mapping[str, Mapping[str, int]], args: Args) -> list[str]:
    options = ("seeds", "pool", "again", "rows", "steps", "prompts", "every", "limit")
    found, again = counts["pool"], counts["file"]
    lines = [
        "# Sampling before training",
        "",
        "    python benchmarks/findings/sampling.py " + " ".join(f"--{name} {getattr(args, name)}" for name in options),
        "",
        f"GRPO on referring expressions from the built-in model, {args.steps} steps of {args.prompts} prompts with "
        f"{ANSWERS} answers, seeds 0 to {args.seeds - 1}; {hardware()}. "
        "The reward is 1 where the overlap is above one half, else 0. "
        f"The base answers {args.pool} samples {ANSWERS} times: {found['easy']} are easy (all right), {found['hard']} "
        f"hard (none right), {found['medium']} medium. A file has {args.rows} rows: {MEDIUM_SHARE:.0%} medium, and as "
        f"many easy as hard ones, which were so in {args.again} further answers too. `vlmenv sample` answers the file "
        f"{ANSWERS} times again, and takes {again['easy']} rows for easy, {again['hard']} for hard and "
        f"{again['medium']} for medium; these are the sampled rows. "
        f"Greedy answers to {args.limit} held-out scenes. Answers spent include those "
        "of `vlmenv sample` on the file, for sampled rows, and of all rounds of a step, for online filtering. The mean "
        "over seeds ± the standard deviation, and each seed.",
    ]
    return lines if args.output is None else [*lines, "", f"![Accuracy by answers spent]({args.output.stem}.png)"]


def table(found: Mapping[str, list[Path]], args: Args) -> list[str]:
    before = evaluation_of(found["all rows"][0], "before")
    return [
        "",
        "| | accuracy@0.5 | mean IoU | groups of equal rewards | answers spent | seconds |",
        "|---" * 6 + "|",
        f"| before | {before[METRIC]:.3f} | {before['iou/mean']:.3f} | | | |",
        *(row(way, folders, args) for way, folders in found.items()),
    ]


def row(way: str, folders: list[Path], args: Args) -> str:
    after = [evaluation_of(folder) for folder in folders]
    equal = [np.mean([step["reward/zero_std_groups"] for step in steps_of(folder)]) for folder in folders]
    cells = [spread_cell([one[METRIC] for one in after]), spread_cell([one["iou/mean"] for one in after])]
    cells += [seeds_cell(equal, 2), seeds_cell([spent(way, folder, args)[-1] for folder in folders], 0)]
    return f"| {way} | {' | '.join(cells)} | {seeds_cell([seconds_of(folder) for folder in folders], 0)} |"


def spent(way: str, folder: Path, args: Args) -> np.ndarray:
    """[steps + 1], the answers that were sampled before training and until each step."""
    rounds = [step.get("rounds", 1.0) for step in steps_of(folder)]
    first = args.rows * ANSWERS if way == SAMPLED else 0
    return first + args.prompts * ANSWERS * np.cumsum([0.0, *rounds])


def draw(path: Path, found: Mapping[str, list[Path]], args: Args) -> None:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots()
    for i, (way, folders) in enumerate(found.items()):
        curves = np.array([curve(way, folder, args) for folder in folders])
        for answers, accuracy in curves:
            axes.plot(answers, accuracy, color=f"C{i}", linewidth=0.5, alpha=0.5)
        axes.plot(*curves.mean(axis=0), color=f"C{i}", linewidth=1.6, label=way)
    axes.set(xlabel="answers spent", ylabel="held-out accuracy@0.5")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save(figure, path)


def curve(way: str, folder: Path, args: Args) -> tuple[list[float], list[float]]:
    """The answers spent until each measurement, and the accuracy; the first is before training."""
    measured = [(0, evaluation_of(folder, "before")[METRIC]), *measurements_of(folder, METRIC)]
    answers = spent(way, folder, args)
    return [float(answers[step]) for step, _ in measured], [value for _, value in measured]


if __name__ == "__main__":
    main(tyro.cli(Args))
