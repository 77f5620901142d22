"""What fewer bits of weights, optimizer state and frozen bases do to learning.

    python benchmarks/weights.py --output benchmarks/weights.md

Writes the built-in model in bfloat16, as models are published, and trains it on the built-in scenes by `vlmenv train`:
all weights, and adapters, in each of the ways below, with the same seeds. Writes the measure before and after.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from common import hardware

LORA = ("--lora-rank", "16", "--lr", "1e-3")
HALF = ("--precision", "bf16")
WAYS: dict[str, tuple[str, ...]] = {
    "all weights, float32": (),
    "all weights, float32, 8-bit AdamW": ("--optimizer", "adamw_8bit"),
    "all weights, float32, bf16 passes": HALF,
    "all weights, bf16": (*HALF, "--weights", "bf16"),
    "all weights, bf16, 8-bit AdamW": (*HALF, "--weights", "bf16", "--optimizer", "adamw_8bit"),
    "adapters, float32": LORA,
    "adapters, bf16 passes, float32 base": (*LORA, *HALF, "--weights", "fp32"),
    "adapters, bf16 passes, bf16 base": (*LORA, *HALF),
    "adapters, bf16 passes, int8 base": (*LORA, *HALF, "--quantize", "int8"),
    "adapters, bf16 passes, nf4 base": (*LORA, *HALF, "--quantize", "nf4"),
}


@dataclass
class Args:
    """Compares learning with weights and optimizer states of fewer bits."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds to train with."""
    steps: int = 100
    """Steps of each run."""
    eval_limit: int = 256
    """Held-out scenes to measure on."""
    ways: tuple[str, ...] = tuple(WAYS)
    """Ways to train."""
    output: Path | None = None
    """Markdown file for the table; written anew after each way."""


def main(args: Args) -> None:
    rows: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        vlmenv("export", "builtin", str(base), "--dtype", "bfloat16")
        for way in args.ways:
            found = [measured(base, Path(folder) / f"{len(rows)}-{seed}", way, seed, args) for seed in args.seeds]
            rows.append(row(way, found))
            report = table(rows, args)
            if args.output is not None:
                args.output.write_text(report, encoding="utf-8")
    print(report)


def measured(base: Path, run: Path, way: str, seed: int, args: Args) -> tuple[float, float, float]:
    """The mean overlap before and after, and the mean reward of the last ten steps."""
    options = ("--steps", str(args.steps), "--eval-limit", str(args.eval_limit), "--tracker", "none", "--device", "cpu")
    vlmenv("train", "--model", str(base), "--output", str(run), "--seed", str(seed), *options, *WAYS[way])
    evaluation = json.loads((run / "evaluation.json").read_text())
    ends = [evaluation[when]["iou/mean"]["value"] for when in ("before", "after")]
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return ends[0], ends[1], statistics.mean(step["reward/mean"] for step in steps[-10:])


def row(way: str, found: list[tuple[float, float, float]]) -> str:
    before, after, rewards = zip(*found, strict=True)
    cells = [f"{before[0]:.3f}", *(f"{one:.3f}" for one in after), f"{statistics.mean(after):.3f}"]
    return f"| {way} | {' | '.join(cells)} | {statistics.mean(rewards):.3f} |"


def table(rows: list[str], args: Args) -> str:
    threads = f"threads of PyTorch: {torch.get_num_threads()}, "
    names = ["before", *(f"seed {seed}" for seed in args.seeds), "mean", "reward"]
    lines = [
        "# Learning with fewer bits",
        "",
        f"    python benchmarks/weights.py --steps {args.steps} --eval-limit {args.eval_limit} "
        f"--seeds {' '.join(map(str, args.seeds))} --output benchmarks/weights.md",
        "",
        f"The built-in model in bfloat16, {args.steps} steps on the built-in scenes; the mean overlap on "
        f"{args.eval_limit} held-out ones, and the reward of the last ten steps. {hardware(threads)}.",
        "",
        f"| | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def vlmenv(*args: str) -> None:
    subprocess.run([sys.executable, "-m", "vlmenv", *args], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main(tyro.cli(Args))
