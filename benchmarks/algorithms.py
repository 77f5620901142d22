"""Every algorithm on the built-in model: metrics before and after, and curves of the rewards.

    python benchmarks/algorithms.py --env VLM-REC-v0 --env VLM-VQA-v0 --output benchmarks/algorithms.md

Each run has a folder under `--runs`. One that is finished is read and not trained anew, and one that was cut off goes
on, so that the same command takes up an interrupted benchmark.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import numpy as np
import tyro
from findings.runs import check_model, draw_seeds, evaluation_of, hardware, publish, save, seconds_of, steps_of, trained
from matplotlib.figure import Figure

from vlmenv.algos import ALGORITHMS

CONTROLS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "entropy_bonus": {"algo": "grpo", "entropy_bonus": 0.01},
        "clip_cov": {"algo": "grpo", "entropy_control": "clip_cov"},
        "kl_cov": {"algo": "grpo", "entropy_control": "kl_cov", "minibatches": 2},
    }
)
"""Options of grpo that are measured like algorithms, if `--only` names them."""


@dataclass
class Args:
    """Train with every algorithm."""

    env: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Environment, VLM-REC-v0 where left out; may be repeated."""
    only: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Algorithm, all of them where left out, or a key of `CONTROLS`; may be repeated."""
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
    teacher: str | None = None
    """Model that teaches in opd, which is left out where there is none."""


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
        before, after = (evaluation_of(folder, when) for when in ("before", "after"))
        metric = next(iter(before))
        rewards = np.array([step["reward/mean"] for step in steps_of(folder)])
        return cls(metric, before[metric], after[metric], rewards, seconds_of(folder))


Runs = Mapping[str, list[Run]]
"""By algorithm, one for each seed."""


def main(args: Args) -> None:
    check_model(args.runs)
    names = args.only or tuple(name for name in ALGORITHMS if name != "opd" or args.teacher is not None)
    found: dict[str, Runs] = {
        env: {name: [run(env, name, seed, args) for seed in range(args.seeds)] for name in names}
        for env in args.env or ("VLM-REC-v0",)
    }
    lines = [*head(args), *(line for env, runs in found.items() for line in table(env, runs))]
    publish(lines, args.output, lambda path: draw(path, found))


def run(env: str, name: str, seed: int, args: Args) -> Run:
    """A run's results; it is trained, or trained further, unless it is finished."""
    options = {
        "env": env,
        **options_of(name),
        "seed": seed,
        "steps": args.steps,
        "prompts_per_step": args.prompts,
        "eval_limit": args.limit,
        "checkpoint_every": max(1, args.steps // 5),
        "keep": 1,
        "device": "cpu",
    } | ({"teacher": args.teacher} if name == "opd" else {})
    return Run.read(trained(args.runs / env / f"{name}-seed{seed}", options))


def options_of(name: str) -> Mapping[str, Any]:
    return CONTROLS.get(name, {"algo": name})


def head(args: Args) -> list[str]:
    repeated = [("env", env) for env in args.env] + [("only", name) for name in args.only]
    options = [
        *repeated,
        *([] if args.teacher is None else [("teacher", args.teacher)]),
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
        f"0 to {args.seeds - 1}; {hardware()}. The "
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
    kind, config = ALGORITHMS[str(options_of(name)["algo"])]
    return kind(config).imitates


def draw(path: Path, found: Mapping[str, Runs]) -> None:
    """Draws the rewards over the steps: the mean of the seeds, and thin the seeds themselves; a panel for each env."""
    figure = Figure(figsize=(7, 3.4 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), squeeze=False)[:, 0]
    for axes, (env, runs) in zip(panels, found.items(), strict=True):
        rewards = {name: [run.rewards for run in own] for name, own in runs.items() if not imitates(name)}
        draw_seeds(axes, rewards, max(1, len(next(iter(runs.values()))[0].rewards) // 20))
        axes.set(title=env, ylabel="reward")
    panels[0].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    save(figure, path)


if __name__ == "__main__":
    main(tyro.cli(Args))
