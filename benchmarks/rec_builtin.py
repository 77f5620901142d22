"""What GRPO does to the built-in model on the built-in scenes, against supervised training of the same time.

    python benchmarks/rec_builtin.py --output benchmarks/rec_builtin.md

Trains with `vlmenv train` for each seed, and twice by supervision for as long as the first run's steps
took: on the loose labels that the model was taught by, and on exact ones. Measures all of them with
`vlmenv eval` on the same 512 held-out scenes, greedily and with eight sampled answers to each.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from findings.runs import hardware

EXAMPLE = Path(__file__).parent.parent / "examples" / "builtin_model.py"
COLUMNS = ("iou/mean", "accuracy@0.5", "accuracy@0.75", "format")


@dataclass
class Args:
    """Measures what GRPO does to the built-in model."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds to train with."""
    output: Path | None = None
    """Markdown file for the table."""


def main(args: Args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        rows = [("built-in model", measure("builtin", work / "base"), "")]
        seconds = 0.0
        for seed in args.seeds:
            started = time.monotonic()
            run = work / f"seed{seed}"
            vlmenv("train", "--seed", str(seed), "--output", str(run))
            whole = time.monotonic() - started
            steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            learning = sum(step["time/rollout"] + step["time/score"] + step["time/update"] for step in steps)
            seconds = seconds or learning
            model = run / "checkpoints" / f"step-{len(steps)}"
            rows.append((f"GRPO, seed {seed}", measure(str(model), run / "eval"), f"{learning:.0f} ({whole:.0f})"))
        for labels in ("loose", "exact"):
            model = work / labels
            options = ["--init", "builtin", "--labels", labels, "--lr", "1e-3", "--minutes", str(seconds / 60)]
            options.append("--referring-only")
            subprocess.run([sys.executable, str(EXAMPLE), *options, "--output", str(model)], check=True)
            rows.append(
                (f"supervised, {labels} labels", measure(str(model), work / f"{labels}-eval"), f"{seconds:.0f}")
            )
    report = table(rows)
    print(report)
    if args.output is not None:
        args.output.write_text(report, encoding="utf-8")


def vlmenv(*args: str) -> None:
    subprocess.run([sys.executable, "-m", "vlmenv", *args, "--device", "cpu"], check=True)


def measure(model: str, folder: Path) -> dict[str, float]:
    """Greedy metrics, and the mean overlap of sampled answers."""
    vlmenv("eval", "--model", model, "--output", str(folder / "greedy"))
    vlmenv("eval", "--model", model, "--samples", "8", "--output", str(folder / "sampled"))
    greedy = json.loads((folder / "greedy" / "metrics.json").read_text())
    sampled = json.loads((folder / "sampled" / "metrics.json").read_text())
    return {name: greedy[name]["value"] for name in COLUMNS} | {"sampled iou/mean": sampled["iou/mean"]["value"]}


def table(rows: list[tuple[str, dict[str, float], str]]) -> str:
    names = list(rows[0][1])
    lines = [
        "# GRPO on the built-in model and scenes",
        "",
        "    python benchmarks/rec_builtin.py --output benchmarks/rec_builtin.md",
        "",
        f"512 held-out scenes; {hardware()}. Time is that of the steps (of the whole command), in seconds.",
        "",
        "| | " + " | ".join(names) + " | time |",
        "|---" * (len(names) + 2) + "|",
    ]
    lines += [f"| {name} | " + " | ".join(f"{m[n]:.3f}" for n in names) + f" | {t} |" for name, m, t in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Args))
