"""On-policy distillation beside GRPO: how soon a small student reaches its teacher's metric.

    python benchmarks/findings/distillation.py --output benchmarks/findings/distillation.md

The teacher scores each token of the student's own answers (https://thinkingmachines.ai/blog/on-policy-distillation,
arXiv 2306.13649); a rule scores a whole answer. The student is a model like the built-in one of a quarter of its size,
taught referring expressions for some minutes. One teacher is the built-in model after GRPO on exact boxes, the other
the student itself after more of GRPO.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from bases import taught
from matplotlib.figure import Figure
from runs import (
    check_model,
    draw_seeds,
    evaluation_of,
    hardware,
    last_model,
    measured,
    measurements_of,
    publish,
    save,
    seconds_of,
    seeds_cell,
    spread_cell,
    trained,
)

METRIC = "iou/mean"
ANSWERS = 8
"""Completions to a prompt, in both algorithms."""
LARGER, EQUAL = "larger", "equal"
"""The teachers, by their size beside the student's."""


@dataclass
class Args:
    """Teach a student by a teacher, and by rewards."""

    seeds: int = 3
    """Runs of each algorithm."""
    steps: int = 150
    """Of each run."""
    prompts: int = 8
    """In a step, with eight answers each."""
    lr: float = 1e-3
    """Peak learning rate of both algorithms."""
    teaching: int = 3000
    """Supervised steps of the student before, of 16 scenes with four expressions."""
    teacher_steps: int = 150
    """Steps of GRPO that make the larger teacher of the built-in model."""
    equal_steps: int = 300
    """Steps of GRPO that make the equal teacher of the student."""
    every: int = 20
    """Steps between measurements."""
    limit: int = 256
    """Held-out samples to measure on."""
    runs: Path = Path("runs/findings/distillation")
    """Folder of the models and the runs."""
    output: Path | None = None
    """Markdown file for the table; the figure goes beside it, as .png."""


def main(args: Args) -> None:
    check_model(args.runs)
    student = taught(args.runs / "student", 64, args.teaching)
    teachers = {LARGER: larger_teacher(args), EQUAL: equal_teacher(student, args)}
    own = common(args) | {"model": str(student), "eval_every": args.every, "lr": args.lr}
    ways = {way(size): {"algo": "opd", "teacher": str(folder)} for size, folder in teachers.items()}
    found = {
        name: [trained(args.runs / f"{name}-seed{seed}", own | more | {"seed": seed}) for seed in range(args.seeds)]
        for name, more in (ways | {"grpo": {"algo": "grpo"}}).items()
    }
    asked = {"env": "VLM-REC-v0", "eval_limit": args.limit, "device": "cpu"}
    goals = {
        size: measured(args.runs / f"teacher-{size}-measured", asked | {"model": str(folder)})[METRIC]
        for size, folder in teachers.items()
    }
    publish([*head(args), *table(found, goals, args)], args.output, lambda path: draw(path, found, goals, args))


def larger_teacher(args: Args) -> Path:
    return last_model(trained(args.runs / f"teacher-{LARGER}", common(args) | {"steps": args.teacher_steps})).absolute()


def equal_teacher(student: Path, args: Args) -> Path:
    own = {"model": str(student), "steps": args.equal_steps, "lr": args.lr, "seed": args.seeds}
    return last_model(trained(args.runs / f"teacher-{EQUAL}", common(args) | own)).absolute()


def way(size: str) -> str:
    return f"opd-{size}"


def common(args: Args) -> dict[str, Any]:
    return {
        "env": "VLM-REC-v0",
        "steps": args.steps,
        "prompts_per_step": args.prompts,
        "group_size": ANSWERS,
        "eval_limit": args.limit,
        "seed": 0,
        "checkpoint_every": max(1, args.steps // 4),
        "keep": 1,
        "device": "cpu",
    }


def head(args: Args) -> list[str]:
    options = ("seeds", "steps", "prompts", "lr", "teaching", "teacher_steps", "equal_steps", "every", "limit")
    given = " ".join(f"--{name.replace('_', '-')} {getattr(args, name)}" for name in options)
    lines = [
        "# On-policy distillation",
        "",
        f"    python benchmarks/findings/distillation.py {given}",
        "",
        f"Referring expressions on the built-in scenes; a student of 0.4 million parameters, {args.steps} steps of "
        f"{args.prompts} prompts with {ANSWERS} answers, seeds 0 to {args.seeds - 1}; {hardware()}. "
        "The larger teacher is the built-in model (1.6 million) after "
        f"{args.teacher_steps} steps of GRPO, the equal one the student after {args.equal_steps} steps of GRPO with "
        f"seed {args.seeds}. Mean IoU of greedy answers to {args.limit} held-out samples, every {args.every} steps. "
        "Answers are those that were sampled until the metric was reached.",
    ]
    return lines if args.output is None else [*lines, "", f"![Mean IoU over sampled answers]({args.output.stem}.png)"]


def table(found: Mapping[str, list[Path]], goals: Mapping[str, float], args: Args) -> list[str]:
    before = evaluation_of(found["grpo"][0], "before")[METRIC]
    end = float(np.mean([evaluation_of(run)[METRIC] for run in found["grpo"]]))
    told = ", ".join(f"the {size} teacher: {goal:.3f}" for size, goal in goals.items())
    until = ("where GRPO ends", *(f"the {size} teacher's" for size in goals))
    return [
        "",
        f"Before: {before:.3f}; {told}; where GRPO ends, the mean of its runs: {end:.3f}.",
        "",
        f"| | mean IoU after | {' | '.join(f'answers until {goal}' for goal in until)} | seconds |",
        "|---" * (3 + len(until)) + "|",
        *(row(name, runs, (end, *goals.values()), args) for name, runs in found.items()),
    ]


def row(name: str, runs: list[Path], goals: Sequence[float], args: Args) -> str:
    after = spread_cell([evaluation_of(run)[METRIC] for run in runs])
    reached = [reached_cell(runs, goal, args) for goal in goals]
    return f"| {name} | {after} | {' | '.join(reached)} | {seeds_cell([seconds_of(run) for run in runs], 0)} |"


def reached_cell(runs: list[Path], goal: float, args: Args) -> str:
    """How many answers had been sampled when a metric was first measured, by seed and in the mean of their curves."""
    curves = [curve(run, args) for run in runs]
    means = [(one[0][0], float(np.mean([value for _, value in one]))) for one in zip(*curves, strict=True)]
    seeds = " / ".join(answers_until(one, goal, args) for one in curves)
    return f"{seeds}; mean {answers_until(means, goal, args)}"


def answers_until(measured: Sequence[tuple[int, float]], goal: float, args: Args) -> str:
    step = next((step for step, value in measured if value >= goal), None)
    return "–" if step is None else f"{step * args.prompts * ANSWERS:,}"


def draw(path: Path, found: Mapping[str, list[Path]], goals: Mapping[str, float], args: Args) -> None:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots()
    curves = {name: [curve(run, args) for run in runs] for name, runs in found.items()}
    answers = [step * args.prompts * ANSWERS for step, _ in next(iter(curves.values()))[0]]
    draw_seeds(
        axes, {name: [[value for _, value in one] for one in own] for name, own in curves.items()}, steps=answers
    )
    for (size, goal), style in zip(goals.items(), (":", "--"), strict=True):
        axes.axhline(goal, color="black", linestyle=style, label=f"the {size} teacher")
    axes.set(xlabel="sampled answers", ylabel="held-out mean IoU")
    axes.legend(frameon=False)
    save(figure, path)


def curve(run: Path, args: Args) -> list[tuple[int, float]]:
    """The held-out metric of each measurement and after the last step, by step."""
    found = dict(measurements_of(run, METRIC)) | {args.steps: evaluation_of(run)[METRIC]}
    return sorted(found.items())


if __name__ == "__main__":
    main(tyro.cli(Args))
