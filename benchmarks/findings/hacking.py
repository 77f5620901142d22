"""Reward hacking in detection: the reward of the published code, and ours.

    python benchmarks/findings/hacking.py --output benchmarks/findings/hacking.md

VLM-R1 (arXiv 2504.07615, section 5) finds that with AP as the reward answers grow longer and have more and more boxes.
In its code boxes with absent labels cost nothing, and boxes after the last true one neither. `map` here counts the
former against an answer. `od_length` multiplies `map` by a penalty for boxes beyond the true number, against both.
A base finds a door only if it sometimes walks through it. So the base is the built-in model after lessons of careless
annotators, who find all boxes and repeat some.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from careless import NAME as LESSONS
from careless import SHARE
from matplotlib.figure import Figure
from runs import (
    check_model,
    draw_seeds,
    evaluation_of,
    hardware,
    last_model,
    mean_of,
    publish,
    save,
    seconds_of,
    seeds_cell,
    steps_of,
    tail,
    trained,
)

REWARDS = {"published": "published:published_map", "od_length": "od_length"}
"""The term of each reward."""
CURVES = {
    "completion/box_ratio": "boxes answered per true one",
    "completion/length": "tokens of an answer",
    "eval/image_ap/mean": "held-out AP per image",
}
METRICS = ("image_ap/mean", "precision@0.5", "recall@0.5")
TRAITS = {"completion/box_ratio": 2, "completion/length": 0}
"""Of sampled answers, with digits to be shown."""
HERE = Path(__file__).parent
LONGEST = 320
"""Tokens of an answer, at most."""
COMMON: Mapping[str, Any] = {"max_new_tokens": LONGEST, "keep": 1, "device": "cpu"}


@dataclass
class Args:
    """Train detection with each reward."""

    seeds: int = 3
    """Runs of each."""
    lessons: int = 150
    """Supervised steps of the base, of 16 scenes of careless annotators."""
    steps: int = 30
    """Of each run."""
    prompts: int = 8
    """In a step, eight answers to each."""
    every: int = 10
    """Steps between measurements."""
    limit: int = 96
    """Held-out samples to measure on."""
    runs: Path = Path("runs/findings/hacking")
    """Folder of the base and the runs."""
    output: Path | None = None
    """Markdown file for the table; the figure goes beside it, as .png."""


def main(args: Args) -> None:
    check_model(args.runs)
    base = taught(args)
    found = {name: [run(name, seed, base, args) for seed in range(args.seeds)] for name in REWARDS}
    publish([*head(args), *table(found)], args.output, lambda path: draw(path, found))


def taught(args: Args) -> Path:
    """The model after the lessons of careless annotators."""
    options = {
        **COMMON,
        "env": f"careless:{LESSONS}",
        "algo": "sft",
        "steps": args.lessons,
        "prompts_per_step": 16,
        "eval_limit": 0,
        "checkpoint_every": max(1, args.lessons // 4),
    }
    return last_model(trained(args.runs / "base", options)).absolute()


def run(name: str, seed: int, base: Path, args: Args) -> Path:
    options = {
        **COMMON,
        "env": "VLM-OVD-v0",
        "model": str(base),
        "rewards": {REWARDS[name]: 1.0, "format": 0.1},
        "seed": seed,
        "steps": args.steps,
        "prompts_per_step": args.prompts,
        "eval_limit": args.limit,
        "eval_every": args.every,
        "checkpoint_every": max(1, args.steps // 4),
    }
    return trained(args.runs / f"{name}-seed{seed}", options)


def head(args: Args) -> list[str]:
    options = ("seeds", "lessons", "steps", "prompts", "every", "limit")
    lines = [
        "# Reward hacking in detection",
        "",
        "    python benchmarks/findings/hacking.py " + " ".join(f"--{name} {getattr(args, name)}" for name in options),
        "",
        f"GRPO on the built-in detection scenes, {args.steps} steps of {args.prompts} prompts, seeds 0 to "
        f"{args.seeds - 1}, answers of up to {LONGEST} tokens; {hardware()}. "
        f"The base is the built-in model after {args.lessons} steps of SFT by annotators who find all boxes, and in "
        f"{SHARE:.0%} of the scenes repeat some under any label asked for. `published` is AP as in VLM-R1's code, "
        "where absent labels are dropped. Each reward has `format` beside it, with weight 0.1. AP per image, "
        f"precision and recall are of greedy answers to {args.limit} held-out scenes. A box with an absent label "
        "counts against AP per image. Boxes and tokens are of sampled answers in the last tenth of training. Warnings "
        "are those of the run itself (`warnings.jsonl`): answers drift while the held-out metric falls.",
    ]
    return lines if args.output is None else [*lines, "", f"![Boxes, tokens and AP]({args.output.stem}.png)"]


def table(found: Mapping[str, list[Path]]) -> list[str]:
    first = found["published"][0]
    before = evaluation_of(first, "before")
    cells = [f"{before[name]:.3f}" for name in METRICS]
    cells += [f"{mean_of(steps_of(first)[:1], name):.{digits}f}" for name, digits in TRAITS.items()]
    return [
        "",
        "| | AP per image | precision@0.5 | recall@0.5 | reward | boxes per true one | tokens | warnings | seconds |",
        "|---" * 9 + "|",
        f"| before | {' | '.join(cells[:3])} | | {' | '.join(cells[3:])} | | |",
        *(row(name, folders) for name, folders in found.items()),
    ]


def row(name: str, folders: list[Path]) -> str:
    after = [evaluation_of(folder) for folder in folders]
    cells = [seeds_cell([one[metric] for one in after]) for metric in METRICS]
    own = f"reward/{REWARDS[name].rpartition(':')[2]}"
    cells.append(seeds_cell([tail(folder, own) for folder in folders], 2))
    cells += [seeds_cell([tail(folder, trait) for folder in folders], digits) for trait, digits in TRAITS.items()]
    cells.append(seeds_cell([warnings(folder) for folder in folders], 0))
    cells.append(seeds_cell([seconds_of(folder) for folder in folders], 0))
    return f"| {name} | {' | '.join(cells)} |"


def warnings(folder: Path) -> int:
    """The number of times that the watch warned of a drift."""
    file = folder / "warnings.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return sum(json.loads(line)["kind"] == "drift" for line in lines)


def draw(path: Path, found: Mapping[str, list[Path]]) -> None:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        steps = [step["step"] for step in at(found["published"][0], name)]
        curves = {
            reward: [[step.get(name, float("nan")) for step in at(folder, name)] for folder in folders]
            for reward, folders in found.items()
        }
        draw_seeds(axes, curves, width=1 if name.startswith("eval/") else 10, steps=steps)
        axes.set(ylabel=label)
    axes.legend(frameon=False)
    save(figure, path)


def at(folder: Path, name: str) -> list[dict[str, float]]:
    """The steps at which a metric is drawn: for one of held-out samples, those at which it was measured."""
    return [step for step in steps_of(folder) if name in step or not name.startswith("eval/")]


if __name__ == "__main__":
    main(tyro.cli(Args))
