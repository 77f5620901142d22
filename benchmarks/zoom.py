"""Whether a model learns to look closer where that pays, and only there.

    python benchmarks/zoom.py --output benchmarks/zoom.md

The built-in model knows neither requests nor crops. Supervised steps teach it both: first dialogues with wide crops,
whose place it learns to tell, then close crops, in which it learns to read. The dialogues' teacher asks for a crop or
answers at once, at random. Then GRPO trains it on `VLM-Zoom-v0`, half of whose questions are about dots that are too
small to see. The control starts from the same model, and no request is granted. An interrupted benchmark is taken up by
the same command.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE / "findings")]

from runs import (  # noqa: E402
    check_model,
    draw_seeds,
    hardware,
    last_model,
    publish,
    save,
    seconds_of,
    seeds_cell,
    spread_cell,
    trained,
)
from zoom_lessons import CLOSE_UPS, DIALOGUES, WIDE  # noqa: E402

from vlmenv.envs.vqa import VQAEnv  # noqa: E402

WAYS: Final[Mapping[str, int]] = {"with crops": 2, "without": 1}
"""Most answers in an episode of each way."""
KINDS: Final = ("tiny", "plain")
COMMON: Final[Mapping[str, Any]] = {
    "prompt_template": VQAEnv.prompt_template,
    "max_pixels": 96 * 96,
    "coordinates": "resized",
    "max_new_tokens": 48,
    "device": "cpu",
    "tracker": "none",
    "keep": 1,
}


@dataclass
class Args:
    """Teach dialogues, and train with and without crops."""

    seeds: int = 3
    """Runs of each way."""
    wide: int = 600
    """Supervised steps of 24 dialogues with wide crops."""
    close: int = 600
    """Supervised steps of 12 dialogues with close crops, and 12 questions about such crops alone."""
    steps: int = 100
    """Steps of GRPO, of `prompts` questions with 8 episodes each."""
    prompts: int = 16
    """Questions of a step of GRPO."""
    crop_cost: float = 0.05
    """What a crop costs, where a right answer earns 1."""
    every: int = 20
    """Steps between two evaluations."""
    limit: int = 256
    """Held-out questions."""
    runs: Path = Path("runs/zoom")
    """Folder of the runs."""
    output: Path | None = None
    """Markdown file for the table; the figure goes beside it, as .png."""


def main(args: Args) -> None:
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    check_model(args.runs)
    found = {way: [run(way, seed, args) for seed in range(args.seeds)] for way in WAYS}
    publish([*head(args), *table(found, args)], args.output, lambda path: draw(path, found))


def taught(args: Args) -> Path:
    """The model after the lessons."""
    first = imitated("wide", [WIDE], args.wide, "builtin", args)
    return imitated("close", [CLOSE_UPS, DIALOGUES], args.close, str(first), args)


def imitated(name: str, tasks: Sequence[str], steps: int, model: str, args: Args) -> Path:
    """A model after supervised steps of 24 samples, in equal parts of some tasks."""
    options = {
        **COMMON,
        "mix": [f"zoom_lessons:{task}:1" for task in tasks],
        "model": model,
        "algo": "sft",
        "steps": steps,
        "prompts_per_step": 24,
        "lr": 1.5e-3,
        "eval_limit": 0,
        "checkpoint_every": max(1, steps // 4),
    }
    return last_model(trained(args.runs / name, options)).absolute()


def run(way: str, seed: int, args: Args) -> Path:
    options = {
        **COMMON,
        "env": "VLM-Zoom-v0",
        "model": str(taught(args)),
        "max_turns": WAYS[way],
        "rewards": {"accuracy": 1.0, "format": 0.1, "crops": -args.crop_cost},
        "seed": seed,
        "steps": args.steps,
        "prompts_per_step": args.prompts,
        "eval_every": args.every,
        "eval_limit": args.limit,
        "checkpoint_every": max(1, args.steps // 4),
    }
    return trained(args.runs / f"{way.replace(' ', '-')}-seed{seed}", options)


def head(args: Args) -> list[str]:
    threads = torch.get_num_threads()
    lines = [
        "# Looking closer where it pays",
        "",
        f"    python benchmarks/zoom.py --seeds {args.seeds} --wide {args.wide} --close {args.close} "
        f"--steps {args.steps} --prompts {args.prompts} --crop-cost {args.crop_cost} --limit {args.limit}",
        "",
        f"The built-in model on `VLM-Zoom-v0`, which shows it images at 96 x 96 pixels; {hardware()}, {threads} "
        f"thread{'s' * (threads > 1)}. Half of the questions are about tiny dots, of 1.5 to 2.5 pixels there. Half are "
        "about the kind of a shape, which is plain to see.",
        "",
        f"Supervised steps of 24 samples come first: {args.wide} of dialogues with wide crops, then {args.close}, of "
        "which half are dialogues with close crops, and half are questions about such crops alone. The teacher asks "
        f"for a crop or answers at once, at random. Then {args.steps} steps of GRPO follow, of {args.prompts} "
        f"questions with 8 episodes each, seeds 0 to {args.seeds - 1}. A crop costs {args.crop_cost:g}, a right answer "
        "earns 1. The control starts from the same "
        f"model, and a request ends its episodes. Greedy answers to {args.limit} held-out questions: "
        "mean over the seeds, standard deviation, and the seeds in their order.",
    ]
    return lines if args.output is None else [*lines, "", f"![Right answers and crops]({args.output.stem}.png)"]


def table(found: Mapping[str, Sequence[Path]], args: Args) -> list[str]:
    names = ["right", *(f"right, {kind}" for kind in KINDS), *(f"crops, {kind}" for kind in KINDS)]
    lines = ["", f"| | {' | '.join(names)} | seconds |", "|---" * (len(names) + 2) + "|"]
    for way, folders in found.items():
        for when in ("before", "after"):
            measured = [shares(folder / when / "answers.jsonl") for folder in folders]
            cells = [spread_cell([one[name] for one in measured]) for name in names]
            seconds = seeds_cell([seconds_of(folder) for folder in folders], 0) if when == "after" else ""
            lines.append(
                f"| {way}, {'lessons alone' if when == 'before' else 'after GRPO'} | {' | '.join(cells)} | {seconds} |"
            )
    return lines


def shares(file: Path) -> dict[str, float]:
    """The shares of right answers and of episodes with a crop, by kind of detail."""
    answers = [json.loads(line) for line in file.read_text().splitlines()]
    own = {kind: [one["measures"] for one in answers if one["subject"] == kind] for kind in KINDS}
    return {
        "right": mean([one["measures"] for one in answers], "accuracy"),
        **{f"right, {kind}": mean(measures, "accuracy") for kind, measures in own.items()},
        **{f"crops, {kind}": mean(measures, "crops") for kind, measures in own.items()},
    }


def mean(measures: Sequence[Mapping[str, float]], name: str) -> float:
    """The mean of a measure; NaN without answers."""
    return float(np.mean([one.get(name, 0.0) for one in measures])) if measures else float("nan")


def draw(path: Path, found: Mapping[str, Sequence[Path]]) -> None:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    curves = {way: [curve(folder) for folder in folders] for way, folders in found.items()}
    steps = [step for step, _ in curves["with crops"][0]]
    lines = {f"{kind}, {way}": (way, f"right, {kind}") for way in WAYS for kind in KINDS}
    plot(
        left, steps, {name: values(curves[way], what) for name, (way, what) in lines.items()}, "share of right answers"
    )
    plot(right, steps, {kind: values(curves["with crops"], f"crops, {kind}") for kind in KINDS}, "share with a crop")
    save(figure, path)


def plot(axes: Any, steps: Sequence[int], lines: Mapping[str, Sequence[Sequence[float]]], label: str) -> None:
    draw_seeds(axes, lines, steps=steps)
    axes.set(ylabel=label, ylim=(-0.03, 1.03))
    axes.legend(frameon=False)


def values(curves: Sequence[Sequence[tuple[int, Mapping[str, float]]]], name: str) -> list[list[float]]:
    """A share over the evaluations of each seed."""
    return [[measured[name] for _, measured in one] for one in curves]


def curve(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """What was measured before training and on the way, by step."""
    places = [(int(one.name.removeprefix("step-")), one) for one in (folder / "evaluations").glob("step-*")]
    return [(step, shares(place / "answers.jsonl")) for step, place in sorted([(0, folder / "before"), *places])]


if __name__ == "__main__":
    main(tyro.cli(Args))
