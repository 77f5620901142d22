"""Every algorithm on the built-in model: greedy and sampled rewards before and after.

python benchmarks/algorithms.py --output benchmarks/algorithms.md
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from vlmenv.algos import ALGORITHMS


@dataclass
class Args:
    """Train with every algorithm."""

    env: str = "VLM-REC-v0"
    """Environment."""
    seeds: int = 3
    """Runs of each."""
    steps: int = 300
    """Of each run."""
    limit: int = 512
    """Held-out samples to measure on."""
    output: Path | None = None
    """Markdown file for the table."""


def main(args: Args) -> None:
    rows = [row(name, args) for name in ALGORITHMS]
    table = "\n".join([*head(args), *rows]) + "\n"
    print(table)
    if args.output is not None:
        args.output.write_text(table, encoding="utf-8")


def row(name: str, args: Args) -> str:
    runs = [train(name, seed, args) for seed in range(args.seeds)]
    cells = [" / ".join(f"{run[column]:.3f}" for run in runs) for column in ("before", "after", "first", "last")]
    return f"| {name} | {' | '.join(cells)} | {' / '.join(format(run['seconds'], '.0f') for run in runs)} |"


def train(name: str, seed: int, args: Args) -> dict[str, float]:
    """One run: the first metric before and after, the mean reward of the first and last tenth, and the time."""
    with tempfile.TemporaryDirectory() as folder:
        run, started = Path(folder) / "run", time.perf_counter()
        options = {
            "--env": args.env,
            "--algo": name,
            "--seed": seed,
            "--steps": args.steps,
            "--eval-limit": args.limit,
            "--output": run,
            "--device": "cpu",
        }
        given = [str(part) for option in options.items() for part in option]
        subprocess.run([sys.executable, "-m", "vlmenv", "train", *given], check=True)
        seconds = time.perf_counter() - started
        measured = json.loads((run / "evaluation.json").read_text())
        steps = [json.loads(line)["reward/mean"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    metric, tenth = next(iter(measured["before"])), max(1, len(steps) // 10)
    return {
        "before": measured["before"][metric]["value"],
        "after": measured["after"][metric]["value"],
        "first": sum(steps[:tenth]) / tenth,
        "last": sum(steps[-tenth:]) / tenth,
        "seconds": seconds,
    }


def head(args: Args) -> list[str]:
    return [
        f"# Algorithms on {args.env}",
        "",
        f"    python benchmarks/algorithms.py --env {args.env} --seeds {args.seeds} --steps {args.steps} "
        f"--limit {args.limit}",
        "",
        f"The built-in model, {args.steps} steps, seeds 0 to {args.seeds - 1}; {os.cpu_count()} cores of "
        f"{platform.processor() or platform.machine()}, float32, torch {torch.__version__}. The metric is the first of "
        "`vlmenv eval`'s, greedy; the reward is that of sampled answers, over the first and last tenth of the steps.",
        "",
        "| | metric before | after | reward at first | at last | seconds |",
        "|---|---|---|---|---|---|",
    ]


if __name__ == "__main__":
    main(tyro.cli(Args))
