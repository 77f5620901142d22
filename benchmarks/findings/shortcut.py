"""Questions with a shortcut: does a loss for perception keep the model looking?

    python benchmarks/findings/shortcut.py --output benchmarks/findings/shortcut.md

PAPO (arXiv 2507.06448) and VPPO (arXiv 2510.09285) find that rewards of the answer alone teach a model to answer
without looking. Here the colour that a question asks for follows from the kind of shape that it names in 60 % of the
training rows. Held-out rows have the shortcut as often, and are also measured apart: those that the shortcut answers
rightly, and those that it answers wrongly.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import tyro
from matplotlib.figure import Figure
from PIL import Image
from runs import (
    check_model,
    draw_seeds,
    hardware,
    last_model,
    publish,
    save,
    seconds_of,
    seeds_cell,
    sight_of,
    steps_of,
    trained,
)

from vlmenv.envs.data.questions import VisualQuestions
from vlmenv.envs.data.scenes import COLOURS, SHAPES, Split

USUAL: Mapping[str, str] = dict(zip(SHAPES, COLOURS, strict=False))
"""The colour that the shortcut says, by the kind of shape."""
SHARE = 0.6
"""Of the rows that the shortcut answers rightly."""
COLUMNS = ("accuracy", "with the shortcut", "against it", "lost by blank images", "log-prob. lost", "seconds")


@dataclass
class Args:
    """Train with and without a loss for perception."""

    algos: tuple[str, ...] = ("grpo", "papo_g", "vppo")
    """Algorithms that are compared."""
    seeds: int = 3
    """Runs of each."""
    steps: int = 120
    """Of each run."""
    prompts: int = 8
    """In a step, each with eight answers."""
    rows: int = 600
    """Training rows."""
    limit: int = 300
    """Held-out rows to measure on."""
    every: int = 10
    """Steps between measurements of visual dependence in training."""
    runs: Path = Path("runs/findings/shortcut")
    """Folder of the rows and the runs."""
    output: Path | None = None
    """Markdown file for the table; the figure goes beside it, as .png."""


def main(args: Args) -> None:
    check_model(args.runs)
    files = {
        "train": written("train", args.rows, args.runs / "rows"),
        "eval": written("eval", args.limit, args.runs / "rows"),
    }
    found = {algo: [run(algo, seed, files, args) for seed in range(args.seeds)] for algo in args.algos}
    publish([*head(args), *table(found, files, args)], args.output, lambda path: draw(path, found))


def written(split: Split, number: int, folder: Path) -> Path:
    """Writes rows and images; a share of them has the usual colour. They alternate, so that each batch is mixed."""
    file = (folder / f"{split}.jsonl").absolute()
    if file.exists():
        return file
    (folder / split).mkdir(parents=True, exist_ok=True)
    usual, unusual = colour_questions(split, usual=True), colour_questions(split, usual=False)
    rows = []
    for place in range(number):
        follows = int((place + 1) * SHARE) > int(place * SHARE)
        image, question, answer = next(usual if follows else unusual)
        image.save(folder / split / f"{place}.png")
        subject = "usual" if follows else "unusual"
        image_name = f"{split}/{place}.png"
        rows.append({"id": place, "image": image_name, "question": question, "answer": answer, "subject": subject})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def colour_questions(split: Split, *, usual: bool) -> Iterator[tuple[Image.Image, str, str]]:
    """Built-in questions for a colour, whose answer is the usual one of the kind that they name, or is not."""
    source = VisualQuestions(split)
    for index in count():
        sample = source.get(index)
        kinds = [kind for kind in SHAPES if kind in sample.question]
        if sample.subject == "colour" and len(kinds) == 1 and (sample.target.text == USUAL[kinds[0]]) == usual:
            yield Image.fromarray(sample.images[0]), sample.question, sample.target.text


def run(algo: str, seed: int, files: Mapping[Split, Path], args: Args) -> Path:
    options = {
        "env": "VLM-VQA-v0",
        "algo": algo,
        "dataset": [str(files["train"])],
        "image_root": [str(files["train"].parent)],
        "seed": seed,
        "steps": args.steps,
        "prompts_per_step": args.prompts,
        "eval_limit": 0,
        "visual_dependence_every": args.every,
        "checkpoint_every": args.steps,
        "keep": 1,
        "device": "cpu",
    }
    return trained(args.runs / f"{algo}-seed{seed}", options)


def head(args: Args) -> list[str]:
    usual = ", ".join(f"{colour} for a {kind}" for kind, colour in USUAL.items())
    lines = [
        "# A shortcut in questions",
        "",
        f"    python benchmarks/findings/shortcut.py --seeds {args.seeds} --steps {args.steps} "
        f"--prompts {args.prompts} --rows {args.rows} --limit {args.limit} --algos {' '.join(args.algos)}",
        "",
        f"The built-in model, {args.steps} steps of {args.prompts} prompts, seeds 0 to {args.seeds - 1}; {hardware()}. "
        f"Each of {args.rows} training rows asks for the colour of "
        f"a shape. In {SHARE:.0%} of them it goes with the kind of shape: {usual}. The {args.limit} "
        "held-out rows are divided alike. Answers are greedy. The two columns of what is lost tell how much accuracy, "
        "and the log-probability of the answers per token, fall with blank images.",
    ]
    return lines if args.output is None else [*lines, "", f"![Accuracy and visual dependence]({args.output.stem}.png)"]


def table(found: Mapping[str, list[Path]], files: Mapping[Split, Path], args: Args) -> list[str]:
    lines = ["", f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    before = figures(args.runs / "before", "builtin", files)
    lines.append(f"| before | {' | '.join(f'{value:.3f}' for value in before)} | |")
    for algo, runs in found.items():
        after = [figures(folder, str(last_model(folder)), files) for folder in runs]
        cells = [seeds_cell(column) for column in zip(*after, strict=True)]
        lines.append(f"| {algo} | {' | '.join(cells)} | {seeds_cell([seconds_of(folder) for folder in runs], 0)} |")
    return lines


def figures(folder: Path, model: str, files: Mapping[Split, Path]) -> list[float]:
    """The columns but the last, of a model's answers to the held-out rows."""
    options = {
        "env": "VLM-VQA-v0",
        "model": model,
        "dataset": str(files["eval"]),
        "image_root": str(files["eval"].parent),
        "device": "cpu",
    }
    sight = sight_of(folder / "held-out", options)
    shown = {name: metric["value"] for name, metric in sight["as shown"]["metrics"].items()}
    lost = {name: -change["value"] for name, change in sight["blank"]["change"].items()}
    accuracies = [shown[name] for name in ("accuracy", "accuracy/usual", "accuracy/unusual")]
    return [*accuracies, lost["accuracy"], lost["logprob"]]


def draw(path: Path, found: Mapping[str, list[Path]]) -> None:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rewards = {
        algo: [[step["reward/accuracy"] for step in steps_of(run)] for run in runs] for algo, runs in found.items()
    }
    draw_seeds(left, rewards, width=10)
    looks = {algo: [dependence(run) for run in runs] for algo, runs in found.items()}
    draw_seeds(right, looks, width=1)
    left.set(ylabel="accuracy of sampled answers")
    right.set(ylabel="visual dependence (nats per token)", xlabel="measurement")
    left.legend(frameon=False)
    save(figure, path)


def dependence(run: Path) -> list[Any]:
    return [step["vision/dependence"] for step in steps_of(run) if "vision/dependence" in step]


if __name__ == "__main__":
    main(tyro.cli(Args))
