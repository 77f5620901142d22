"""What the built-in model can do: greedy answers to the built-in samples of every task, by the first metric of each.

python benchmarks/builtin_tasks.py --output benchmarks/builtin_tasks.md
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT / part) for part in ("examples", "benchmarks/findings")]

from builtin_model import OTHER_TASKS  # noqa: E402
from runs import hardware, measured, tell_rows  # noqa: E402

from vlmenv.envs.making import visual_tasks  # noqa: E402


@dataclass
class Args:
    """Measure the built-in model on every task."""

    limit: int = 256
    """Held-out samples of each task."""
    runs: Path = Path("runs/builtin_tasks")
    """Folder of the answers."""
    output: Path | None = None
    """Markdown file for the table."""


def main(args: Args) -> None:
    tell_rows(head(args), (row(name, args) for name in visual_tasks()), args.output)


def head(args: Args) -> list[str]:
    return [
        "# What the built-in model can do",
        "",
        f"`python benchmarks/builtin_tasks.py --limit {args.limit}`, on {hardware()}, {torch.get_num_threads()} thread",
        "",
        f"Greedy answers of the built-in model to {args.limit} held-out built-in samples of each task, with 95 % "
        "intervals. Readable is the share of answers that can be read.",
        "",
        "| task | taught | metric | value | readable |",
        "|---" * 5 + "|",
    ]


def row(name: str, args: Args) -> str:
    folder = args.runs / name
    options = {"env": name, "model": "builtin", "eval_limit": args.limit, "max_new_tokens": 320, "device": "cpu"}
    values = measured(folder, options)
    metric = next(iter(values))
    told = json.loads((folder / "metrics.json").read_text())[metric]
    taught = "yes" if name == "VLM-REC-v0" or name in OTHER_TASKS else "no"
    interval = f"{told['value']:.3f} ({told['low']:.3f} to {told['high']:.3f})"
    return f"| {name} | {taught} | `{metric}` | {interval} | {1 - values['unparsable']:.2f} |"


if __name__ == "__main__":
    main(tyro.cli(Args))
