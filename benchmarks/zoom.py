"""Whether a model learns to look closer where that pays, and only there.

    python benchmarks/zoom.py --output benchmarks/zoom.md

The built-in model knows neither requests nor crops. Supervised steps teach it both: first to read close crops and to
say where a dot is, each alone, then whole dialogues. The teacher asks for a crop in a third of the cases, whatever the
question. Then `dr_grpo` trains it on `VLM-Zoom-v0`, half of whose questions are about dots that are too small to see.
The control starts from the same model, and no request is granted. An interrupted benchmark is taken up by the same
command.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import tyro
from matplotlib.figure import Figure

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE / "findings"), str(HERE.parent / "examples")]

import builtin_model  # noqa: E402
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
from zoom_lessons import CLOSE_UPS, DIALOGUES, FIRST_TURNS, PIXELS, SHOWN  # noqa: E402

WAYS: Final[Mapping[str, int]] = {"with crops": 2, "without": 1}
"""Most answers in an episode of each way."""
KINDS: Final = ("tiny", "plain")
COMMON: Final[Mapping[str, Any]] = {
    "prompt_template": SHOWN["prompt_template"],
    "max_pixels": PIXELS,
    "coordinates": SHOWN["coordinates"],
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
    parts: int = 600
    """Supervised steps of 16 questions about close crops, and 16 first turns of dialogues."""
    dialogues: int = 100
    """Supervised steps of 24 whole dialogues."""
    steps: int = 100
    """Steps of GRPO, of `prompts` questions with 8 episodes each."""
    prompts: int = 16
    """Questions of a step of GRPO."""
    algo: str = "dr_grpo"
    """Algorithm. `grpo` divides by the deviation of a group, in which a small cost may be all that differs."""
    crop_cost: float = 0.05
    """What a crop costs, where a right answer earns 1."""
    limit: int = 256
    """Held-out questions."""
    runs: Path = Path("runs/zoom")
    """Folder of the runs."""
    output: Path | None = None
    """Markdown file for the table; the figure goes beside it, as .png."""


def main(args: Args) -> None:
    check_model(args.runs)
    found = {way: [run(way, seed, args) for seed in range(args.seeds)] for way in WAYS}
    publish([*head(args), *table(found, args)], args.output, lambda path: draw(path, found, args))


def taught(args: Args) -> Path:
    """The model after the lessons; those that are done are not given anew."""
    parts, done = args.runs / "parts", args.runs / f"parts-{args.parts}.done"
    if not done.exists():
        tasks = {CLOSE_UPS: 16, FIRST_TURNS: 16}
        builtin_model.main(builtin_model.Args(parts, init="builtin", scenes=0, tasks=tasks, steps=args.parts, lr=1e-3))
        done.touch()
    options = {
        **COMMON,
        "env": f"zoom_lessons:{DIALOGUES}",
        "max_turns": max(WAYS.values()),
        "model": str(parts.absolute()),
        "algo": "sft",
        "steps": args.dialogues,
        "prompts_per_step": 24,
        "lr": 5e-4,
        "eval_limit": 0,
        "checkpoint_every": max(1, args.dialogues // 4),
    }
    return last_model(trained(args.runs / "dialogues", options)).absolute()


def run(way: str, seed: int, args: Args) -> Path:
    options = {
        **COMMON,
        "env": "VLM-Zoom-v0",
        "model": str(taught(args)),
        "max_turns": WAYS[way],
        "algo": args.algo,
        "rewards": {"accuracy": 1.0, "format": 0.1, "crops": -args.crop_cost},
        "seed": seed,
        "steps": args.steps,
        "prompts_per_step": args.prompts,
        "eval_limit": args.limit,
        "checkpoint_every": max(1, args.steps // 4),
    }
    return trained(args.runs / f"{way.replace(' ', '-')}-seed{seed}", options)


def head(args: Args) -> list[str]:
    lines = [
        "# Looking closer where it pays",
        "",
        f"    python benchmarks/zoom.py --seeds {args.seeds} --parts {args.parts} --dialogues {args.dialogues} "
        f"--steps {args.steps} --prompts {args.prompts} --algo {args.algo} --crop-cost {args.crop_cost} "
        f"--limit {args.limit}",
        "",
        f"The built-in model on `VLM-Zoom-v0`, which shows it images at 96 x 96 pixels; {hardware()}. "
        "Half of the questions are about tiny dots, of 1.5 to 2.5 pixels there. Half are "
        "about the kind of a shape, which is plain to see.",
        "",
        f"Supervised steps come first: {args.parts} of 16 close crops to read and 16 first turns of dialogues, then "
        f"{args.dialogues} of 24 whole dialogues. The teacher asks for a crop in a third of the cases, whatever the "
        f"question. Then {args.steps} steps of `{args.algo}` follow, of "
        f"{args.prompts} questions with 8 episodes each, seeds 0 to {args.seeds - 1}. A crop costs {args.crop_cost:g}, "
        "a right answer earns 1. The control starts from the same model, and a request ends its episodes. Sampled "
        f"answers are those of training; greedy ones are to {args.limit} held-out questions. Mean over the seeds, "
        "standard deviation, and the seeds in their order.",
    ]
    return lines if args.output is None else [*lines, "", f"![Right answers and crops]({args.output.stem}.png)"]


def table(found: Mapping[str, Sequence[Path]], args: Args) -> list[str]:
    names = ["right", *(f"right, {kind}" for kind in KINDS), *(f"crops, {kind}" for kind in KINDS)]
    lines = ["", f"| | answers | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for way, folders in found.items():
        windows = [sampled(folder, args) for folder in folders]
        stages = {
            "sampled, first tenth of the steps": [one[0] for one in windows],
            "sampled, last tenth": [one[-1] for one in windows],
            "greedy, before": [greedy(folder / "before") for folder in folders],
            "greedy, after": [greedy(folder / "after") for folder in folders],
        }
        for stage, shares in stages.items():
            cells = " | ".join(spread_cell([one[name] for one in shares]) for name in names)
            lines.append(f"| {way} | {stage} | {cells} |")
    seconds = "; ".join(f"{seeds_cell([seconds_of(one) for one in own], 0)} {way}" for way, own in found.items())
    return [*lines, "", f"Seconds of training: {seconds}."]


def sampled(run: Path, args: Args) -> list[dict[str, float]]:
    """The shares in the episodes of training, over each tenth of its steps."""
    width = max(1, args.steps // 10)
    windows: list[list[tuple[str, Mapping[str, float]]]] = [[] for _ in range(0, args.steps, width)]
    for line in (run / "rollouts.jsonl").read_text().splitlines():
        row = json.loads(line)
        asked = row["turns"][0]["text"] if "turns" in row else row["prompt"]
        windows[(row["step"] - 1) // width].append((KINDS["the dot in" not in asked], row["rewards"]))
    return [shares(window) for window in windows]


def greedy(folder: Path) -> dict[str, float]:
    """The shares in the answers of an evaluation."""
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    return shares([(one["subject"], one["measures"]) for one in answers])


def shares(episodes: Sequence[tuple[str, Mapping[str, float]]]) -> dict[str, float]:
    """The shares of right answers and of episodes with a request, by kind of detail."""
    own = {kind: [measures for one, measures in episodes if one == kind] for kind in KINDS}
    return {
        "right": share([measures for _, measures in episodes], "accuracy"),
        **{f"right, {kind}": share(measures, "accuracy") for kind, measures in own.items()},
        **{f"crops, {kind}": share(measures, "crops") for kind, measures in own.items()},
    }


def share(measures: Sequence[Mapping[str, float]], name: str) -> float:
    """The share of episodes whose measure is above 0; NaN without episodes."""
    return float(np.mean([one.get(name, 0.0) > 0 for one in measures])) if measures else float("nan")


def draw(path: Path, found: Mapping[str, Sequence[Path]], args: Args) -> None:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    windows = {way: [sampled(folder, args) for folder in folders] for way, folders in found.items()}
    lines = {f"{kind}, {way}": (way, f"right, {kind}") for way in WAYS for kind in KINDS}
    plot(left, {line: curves(windows[way], name) for line, (way, name) in lines.items()}, "share of right answers")
    asked = {kind: curves(windows["with crops"], f"crops, {kind}") for kind in KINDS}
    plot(right, asked, "share with a request, with crops")
    save(figure, path)


def curves(windows: Sequence[Sequence[Mapping[str, float]]], name: str) -> list[list[float]]:
    """A share over the tenths of training, of each seed."""
    return [[one[name] for one in own] for own in windows]


def plot(axes: Any, lines: Mapping[str, Sequence[Sequence[float]]], label: str) -> None:
    draw_seeds(axes, lines)
    axes.set(xlabel="tenth of the steps", ylabel=label, ylim=(-0.03, 1.03))
    axes.legend(frameon=False)


if __name__ == "__main__":
    main(tyro.cli(Args))
