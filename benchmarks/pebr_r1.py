"""The stages of PeBR-R1 in miniature, with several seeds.

    python benchmarks/pebr_r1.py --output benchmarks/pebr_r1.md

Runs `vlmenv pipeline` on `pebr_r1_builtin`, with a seed for all of its stages. An interrupted benchmark is taken up by
the same command.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import tyro
import yaml

sys.path.append(str(Path(__file__).parent / "findings"))

from runs import check_model, hardware, piped, spread_cell

METRICS = {"clip": "perception", "keyword_recall": "perception", "accuracy": "reasoning", "format": "reasoning"}
"""By metric, the evaluation that has it."""


@dataclass
class Args:
    """Run the pipeline with several seeds."""

    seeds: int = 3
    """Number of pipelines, with seeds from 0."""
    pipeline: Path = Path(str(files("vlmenv") / "pipelines" / "pebr_r1_builtin.yaml"))
    """The pipeline's file."""
    runs: Path = Path("runs/pebr_r1")
    """Folder of the pipelines' runs."""
    output: Path | None = None
    """Markdown file for the table."""


def main(args: Args) -> None:
    check_model(args.runs)
    reports = [report(seed, args) for seed in range(args.seeds)]
    text = "\n".join([*head(args), *table(reports)]) + "\n"
    print(text)
    if args.output is not None:
        args.output.write_text(text, encoding="utf-8")


def report(seed: int, args: Args) -> dict[str, Any]:
    """What the pipeline measures with a seed."""
    file = args.runs / f"seed{seed}.yaml"
    file.write_text(yaml.safe_dump(seeded(yaml.safe_load(args.pipeline.read_text()), seed), sort_keys=False))
    return piped(args.runs / f"seed{seed}", file)


def seeded(pipeline: dict[str, Any], seed: int) -> dict[str, Any]:
    for stage in pipeline["stages"].values():
        for options in stage.values():
            options["seed"] = seed
    return pipeline


def head(args: Args) -> list[str]:
    return [
        "# PeBR-R1 in miniature",
        "",
        f"`python benchmarks/pebr_r1.py --seeds {args.seeds}`, on {hardware()}",
        "",
        f"The four stages of `vlmenv pipeline {args.pipeline.stem}` with seeds 0 to {args.seeds - 1}, from the "
        "built-in model. Four sampled answers to each of 256 held-out scenes, as the pipeline measures them. The mean "
        "over seeds ± the standard deviation, and each seed.",
    ]


def table(reports: list[dict[str, Any]]) -> list[str]:
    models = list(reports[0])
    rows = [
        [name, *(spread_cell([one[model][f"{part}: {name}"]["value"] for one in reports]) for model in models)]
        for name, part in METRICS.items()
    ]
    lines = [["", *models], ["---"] * (len(models) + 1), *rows]
    return ["", *(f"| {' | '.join(line)} |" for line in lines)]


if __name__ == "__main__":
    main(tyro.cli(Args))
