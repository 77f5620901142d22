"""What the shipped models can do: greedy answers to the built-in samples of every task, by the first metric of each.

    python benchmarks/builtin_tasks.py --output benchmarks/builtin_tasks.md

Both models answer the same samples. A star marks the tasks that a model has been taught.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.append(str(Path(__file__).parent / "findings"))

from runs import hardware, measured, tell_rows

from vlmenv.agents.vlm import find_model
from vlmenv.core.names import SHIPPED
from vlmenv.envs.making import visual_tasks


@dataclass
class Args:
    """Measure the shipped models on every task."""

    limit: int = 256
    """Held-out samples of each task."""
    runs: Path = Path("runs/builtin_tasks")
    """Folder of the answers."""
    output: Path | None = None
    """Markdown file for the table."""


def main(args: Args) -> None:
    tell_rows(head(args), (row(name, args) for name in visual_tasks()), args.output)


def head(args: Args) -> list[str]:
    columns = ["task", "metric", *(f"`{model}`, readable" for model in SHIPPED)]
    return [
        "# What the shipped models can do",
        "",
        f"`python benchmarks/builtin_tasks.py --limit {args.limit}`, on {hardware()}",
        "",
        f"Greedy answers of both shipped models to {args.limit} held-out built-in samples of each task, with 95 % "
        "intervals, and the share of answers that can be read. A star marks the tasks that a model has been taught.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]


def row(name: str, args: Args) -> str:
    found = [cells(name, model, args) for model in SHIPPED]
    return f"| {name} | `{found[0][0]}` | {' | '.join(cell for _, cell in found)} |"


def cells(name: str, model: str, args: Args) -> tuple[str, str]:
    """The first metric of a task, and a model's value of it."""
    folder = args.runs / model / name
    options = {"env": name, "model": model, "eval_limit": args.limit, "max_new_tokens": 320, "device": "cpu"}
    values = measured(folder, options)
    metric = next(iter(values))
    told = json.loads((folder / "metrics.json").read_text())[metric]
    star = "* " if name in json.loads((find_model(model) / "vlmenv.json").read_text())["taught"] else ""
    interval = f"{told['value']:.3f} ({told['low']:.3f} to {told['high']:.3f})"
    return metric, f"{star}{interval}, {1 - values['unparsable']:.2f}"


if __name__ == "__main__":
    main(tyro.cli(Args))
