"""Every algorithm on the built-in model: metrics before and after, and curves of the rewards.

    python benchmarks/algorithms.py --env VLM-REC-v0 --env VLM-VQA-v0 --output benchmarks/algorithms.md

Each run has a folder under `--runs`. One that is finished is read and not trained anew, and one that was cut off goes
on, so that the same command takes up an interrupted benchmark.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import numpy as np
import torch
import tyro
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from vlmenv.agents.vlm import BUILTIN, find_model
from vlmenv.algos import ALGORITHMS
from vlmenv.training import AlgorithmName


@dataclass
class Args:
    """Train with every algorithm."""

    env: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Environment, VLM-REC-v0 where left out; may be repeated."""
    only: Annotated[tuple[AlgorithmName, ...], tyro.conf.UseAppendAction] = ()
    """Algorithm, all of them where left out; may be repeated."""
    seeds: int = 3
    """Runs of each."""
    steps: int = 300
    """Of each run."""
    prompts: int = 16
    """In a step, each answered by the algorithm's own number of completions."""
    limit: int = 512
    """Held-out samples to measure on."""
    runs: Path = Path("runs/algorithms")
    """Folder of the runs."""
    output: Path | None = None
    """Markdown file for the tables; the figure goes beside it, as .png."""


@dataclass
class Run:
    """What became of a run."""

    metric: str
    """the first of those of the environment"""
    before: float
    after: float
    rewards: np.ndarray
    """[steps], means over completions"""
    seconds: float
    """of all steps, without start and measuring"""

    @classmethod
    def read(cls, folder: Path) -> Run:
        measured = json.loads((folder / "evaluation.json").read_text())
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        metric = next(iter(measured["before"]))
        before, after = (measured[when][metric]["value"] for when in ("before", "after"))
        seconds = sum(value for step in steps for name, value in step.items() if name.startswith("time/"))
        return cls(metric, before, after, np.array([step["reward/mean"] for step in steps]), seconds)


Runs = Mapping[str, list[Run]]
"""By algorithm, one for each seed."""


def main(args: Args) -> None:
    check_model(args.runs)
    names = args.only or tuple(ALGORITHMS)
    found: dict[str, Runs] = {
        env: {name: [trained(env, name, seed, args) for seed in range(args.seeds)] for name in names}
        for env in args.env or ("VLM-REC-v0",)
    }
    text = "\n".join([*head(args), *(line for env, runs in found.items() for line in table(env, runs))]) + "\n"
    print(text)
    if args.output is not None:
        args.output.write_text(text, encoding="utf-8")
        draw(args.output.with_suffix(".png"), found)


def check_model(folder: Path) -> None:
    """Ends the program where the runs in a folder were begun with another model than the present one."""
    digest = hashlib.sha256((find_model(BUILTIN) / "model.safetensors").read_bytes()).hexdigest()
    note = folder / "model.sha256"
    folder.mkdir(parents=True, exist_ok=True)
    if note.exists() and note.read_text() != digest:
        raise SystemExit(f"the runs in {folder} are of another built-in model: choose another --runs, or remove it")
    note.write_text(digest)


def trained(env: str, name: str, seed: int, args: Args) -> Run:
    """A run's results; it is trained, or trained further, unless it is finished."""
    folder = args.runs / env / f"{name}-seed{seed}"
    options = {
        "env": env,
        "algo": name,
        "seed": seed,
        "steps": args.steps,
        "prompts_per_step": args.prompts,
        "eval_limit": args.limit,
        "checkpoint_every": max(1, args.steps // 5),
        "keep": 1,
        "device": "cpu",
    }
    if not (folder / "config.yaml").exists():
        given = [f"--{option.replace('_', '-')}={value}" for option, value in options.items()]
        train(*given, "--output", str(folder))
    check_options(folder, options)
    if not (folder / "evaluation.json").exists():
        train("--resume", str(folder))
    return Run.read(folder)


def train(*args: str) -> None:
    subprocess.run([sys.executable, "-m", "vlmenv", "train", *args], check=True)


def check_options(folder: Path, options: Mapping[str, Any]) -> None:
    """Ends the program where a run has other options."""
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    for name, value in options.items():
        if stored[name] != value:
            raise SystemExit(
                f"{folder} is a run with {name} {stored[name]}, not {value}: choose another --runs, or remove it"
            )


def head(args: Args) -> list[str]:
    repeated = [("env", env) for env in args.env] + [("only", name) for name in args.only]
    options = [
        *repeated,
        ("seeds", args.seeds),
        ("steps", args.steps),
        ("prompts", args.prompts),
        ("limit", args.limit),
    ]
    lines = [
        "# Algorithms",
        "",
        f"    python benchmarks/algorithms.py {' '.join(f'--{name} {value}' for name, value in options)}",
        "",
        f"The built-in model, {args.steps} steps of {args.prompts} prompts with each algorithm's own defaults, seeds "
        f"0 to {args.seeds - 1}; {os.cpu_count()} cores of {processor()}, float32, torch {torch.__version__}. The "
        f"metric is the first of `vlmenv eval`'s, greedy, on {args.limit} held-out samples; the reward is that of "
        "sampled answers, over the first and the last tenth of the steps. sft samples none. Seconds are those of the "
        "steps.",
    ]
    return lines if args.output is None else [*lines, "", f"![Rewards]({args.output.with_suffix('.png').name})"]


def table(env: str, runs: Runs) -> list[str]:
    metric = next(iter(runs.values()))[0].metric
    columns = f"| | {metric} before | after | reward at first | at last | seconds |"
    return ["", f"## {env}", "", columns, "|---" * 6 + "|", *(row(name, own) for name, own in runs.items())]


def row(name: str, runs: list[Run]) -> str:
    tenth = max(1, len(runs[0].rewards) // 10)
    figures = [
        [f"{run.before:.3f}" for run in runs],
        [f"{run.after:.3f}" for run in runs],
        ["–" if imitates(name) else f"{run.rewards[:tenth].mean():.3f}" for run in runs],
        ["–" if imitates(name) else f"{run.rewards[-tenth:].mean():.3f}" for run in runs],
        [f"{run.seconds:.0f}" for run in runs],
    ]
    cells = [own[0] if len(set(own)) == 1 else " / ".join(own) for own in figures]
    return f"| {name} | {' | '.join(cells)} |"


def imitates(name: str) -> bool:
    """Whether the completions of an algorithm are the true answers."""
    kind, config = ALGORITHMS[name]
    return kind(config).imitates


def draw(path: Path, found: Mapping[str, Runs]) -> None:
    """Draws the rewards over the steps: the mean of the seeds, and thin the seeds themselves; a panel for each env."""
    figure = Figure(figsize=(7, 3.4 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), squeeze=False)[:, 0]
    for axes, (env, runs) in zip(panels, found.items(), strict=True):
        draw_env(axes, runs)
        axes.set(title=env, xlabel="step", ylabel="reward")
    panels[0].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=100)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)  # a quarter of the size


def draw_env(axes: Axes, runs: Runs) -> None:
    for (name, own), colour in zip(runs.items(), mpl.color_sequences["tab10"] * 9, strict=False):
        if imitates(name):
            continue
        rewards = np.array([smooth(run.rewards) for run in own])
        steps = np.arange(1, rewards.shape[1] + 1)
        axes.plot(steps, rewards.T, color=colour, linewidth=0.5, alpha=0.5)
        axes.plot(steps, rewards.mean(axis=0), color=colour, linewidth=1.6, label=name)
    axes.grid(alpha=0.3)


def smooth(values: np.ndarray) -> np.ndarray:
    """The means over a twentieth of the steps around each; over as many as there are at the ends."""
    kernel = np.ones(max(1, len(values) // 20))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def processor() -> str:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return models[0].partition(":")[2].strip() if models else platform.machine()


if __name__ == "__main__":
    main(tyro.cli(Args))
