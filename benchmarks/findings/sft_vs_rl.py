"""Supervised learning against reinforcement learning, on scenes like those of training and on others.

    python benchmarks/findings/sft_vs_rl.py --output benchmarks/findings/sft_vs_rl.md

VLM-R1 (arXiv 2504.07615, section 4.3) trains on referring expressions of one kind and measures on another,
LISA-Grounding, where SFT ends below its start and reinforcement learning above.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import tyro
from PIL import Image
from runs import check_model, draw_changes, hardware, last_model, measured, publish, seconds_of, seeds_cell, trained

from vlmenv.envs.data import scenes
from vlmenv.envs.data.scenes import choose_reference, sample_scene

COLOURS = {
    "red": (255, 120, 130),
    "orange": (190, 90, 20),
    "yellow": (190, 170, 80),
    "green": (120, 220, 130),
    "blue": (110, 180, 255),
    "purple": (190, 130, 220),
}
"""Other shades of the same colours."""
SIDES = {"small": (11, 14), "large": (42, 48)}
"""Smaller and larger than any in training, 16 to 25 and 30 to 40."""
DOMAINS = ("as in training", "other shades", "other sizes", "more shapes", "other phrasing")
ALGORITHMS = ("grpo", "sft")


@dataclass
class Args:
    """Train both ways, and measure on five kinds of scenes."""

    seeds: int = 3
    """Runs of each."""
    steps: int = 150
    """Of each run."""
    limit: int = 256
    """Held-out samples of each kind."""
    runs: Path = Path("runs/findings/sft_vs_rl")
    """Folder of the runs and the scenes."""
    output: Path | None = None
    """Markdown file for the table; the figure goes beside it, as .png."""


def main(args: Args) -> None:
    check_model(args.runs)
    data = {domain: write_scenes(args.runs / "scenes" / domain.replace(" ", "-"), domain, args) for domain in DOMAINS}
    start = {domain: [measure(args.runs / "before", "builtin", file, args)] for domain, file in data.items()}
    folders = {name: [run(name, seed, args) for seed in range(args.seeds)] for name in ALGORITHMS}
    found = {"before": start} | {
        name: {domain: [measure(one, str(last_model(one)), file, args) for one in own] for domain, file in data.items()}
        for name, own in folders.items()
    }
    seconds = {name: [seconds_of(folder) for folder in own] for name, own in folders.items()}
    draw = partial(draw_changes, changes=changes_of(found), label="change of the mean overlap")
    publish([*head(args), *table(found, seconds)], args.output, draw)


def run(algo: str, seed: int, args: Args) -> Path:
    options = {
        "env": "VLM-REC-v0",
        "algo": algo,
        "seed": seed,
        "steps": args.steps,
        "eval_limit": args.limit,
        "checkpoint_every": max(1, args.steps // 5),
        "keep": 1,
        "device": "cpu",
    }
    return trained(args.runs / f"{algo}-seed{seed}", options)


def measure(folder: Path, model: str, file: Path, args: Args) -> dict[str, float]:
    options = {"model": model, "dataset": file, "image_root": file.parent, "eval_limit": args.limit, "device": "cpu"}
    return measured(folder / "on" / file.parent.name, options)


def write_scenes(folder: Path, domain: str, args: Args) -> Path:
    """Held-out scenes of a kind as VLM-R1's JSONL with pictures."""
    file = folder / "rec.jsonl"
    if file.exists():
        return file
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    with drawn_as(domain):
        for i in range(args.limit):
            scene, rng = sample_scene("eval", i, (6, 8) if domain == "more shapes" else (2, 4))
            reference = choose_reference(scene, rng)
            Image.fromarray(scene.image).save(folder / f"{i}.png")
            asks = "Point out {}" if domain == "other phrasing" else "Locate {}."
            turns = [
                {"from": "human", "value": f"<image>{asks.format(reference.expression)}"},
                {"from": "gpt", "value": str(list(reference.target.box))},
            ]
            rows.append({"id": i, "image": f"{i}.png", "conversations": turns})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@contextmanager
def drawn_as(domain: str) -> Iterator[None]:
    """Makes the built-in scenes of another kind while the block runs."""
    with ExitStack() as opened:
        if domain == "other shades":
            opened.enter_context(patch.dict(scenes.COLOURS, COLOURS))
        if domain in ("other sizes", "more shapes"):
            opened.enter_context(patch.dict(scenes.SIDES, SIDES if domain == "other sizes" else {"large": (26, 30)}))
        yield


def head(args: Args) -> list[str]:
    lines = [
        "# Supervised learning against reinforcement learning",
        "",
        f"    python benchmarks/findings/sft_vs_rl.py --seeds {args.seeds} --steps {args.steps} --limit {args.limit}",
        "",
        f"The built-in model on the built-in referring expressions, {args.steps} steps of 16 samples with each "
        f"algorithm's own defaults (SFT imitates the true answers), seeds 0 to {args.seeds - 1}; {hardware()}. Mean "
        f"overlap of greedy answers on {args.limit} held-out scenes of each kind: as in training; other shades of the "
        "colours; shapes smaller and larger than any in training; six to eight shapes instead of two to four; another "
        'wording ("Point out" for "Locate"). In brackets the share with an overlap of at least one half.',
    ]
    return lines if args.output is None else [*lines, "", f"![Change of the overlap]({args.output.stem}.png)"]


def table(found: Mapping[str, Mapping[str, list[dict[str, float]]]], seconds: Mapping[str, list[float]]) -> list[str]:
    lines = ["", f"| | {' | '.join(DOMAINS)} | seconds |", "|---" * (len(DOMAINS) + 2) + "|"]
    for name, own in found.items():
        cells = [
            f"{seeds_cell([one['iou/mean'] for one in own[domain]])} "
            f"({seeds_cell([one['accuracy@0.5'] for one in own[domain]], 2)})"
            for domain in DOMAINS
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {seeds_cell(seconds[name], 0) if name in seconds else ''} |")
    return lines


def changes_of(found: Mapping[str, Mapping[str, list[dict[str, float]]]]) -> dict[str, dict[str, list[float]]]:
    """The change of the mean overlap in each run, by algorithm and kind of scene."""
    begun = {domain: found["before"][domain][0]["iou/mean"] for domain in DOMAINS}
    return {
        name: {domain: [one["iou/mean"] - begun[domain] for one in found[name][domain]] for domain in DOMAINS}
        for name in ALGORITHMS
    }


if __name__ == "__main__":
    main(tyro.cli(Args))
