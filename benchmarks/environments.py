"""Observations and scored answers per second of every task, on one core and on two.

Half of the answers are right, half are the right ones of other samples. Prints a table, and writes it on request.
Built-in samples are drawn in Python, which threads do not quicken; what they help with is reading image files.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import tyro

import vlmenv  # noqa: F401 (registers the environments)
from vlmenv.envs.making import visual_tasks

NUM_ENVS = 64


@dataclass
class Args:
    """Measure the environments."""

    seconds: float = 2.0
    """Time for each figure; of scoring, no more than 40 batches."""
    output: Path | None = None
    """Markdown file for the table."""
    measure: str | None = None
    """Measure this environment alone, in this process, and print its figures as JSON."""


def main(args: Args) -> None:
    if args.measure is not None:
        print(json.dumps(measure(args.measure, args.seconds)))
        return
    cores = sorted(os.sched_getaffinity(0))
    table = "\n".join([*head(len(cores)), *(row(name, cores, args.seconds) for name in visual_tasks())]) + "\n"
    print(table)
    if args.output is not None:
        args.output.write_text(table, encoding="utf-8")


def measure(name: str, seconds: float) -> tuple[float, float]:
    """Samples shown and answers scored per second, with one sample an environment."""
    envs = gymnasium.make_vec(name, num_envs=NUM_ENVS)
    task = envs.task
    _, infos = envs.reset(seed=0)
    right = [task.write_answer(task.source.get(index)) for index in infos["index"]]
    answers = right[: NUM_ENVS // 2] + right[: NUM_ENVS // 2]
    envs.step(answers)  # loads what is loaded once
    shown = scored = 0
    time_shown = time_scored = 0.0
    while time_shown < seconds:
        started = time.perf_counter()
        envs.reset()
        time_shown, shown = time_shown + time.perf_counter() - started, shown + NUM_ENVS
    while time_scored < seconds and scored < 40 * NUM_ENVS:
        _, infos = envs.reset()
        right = [task.write_answer(task.source.get(index)) for index in infos["index"]]
        started = time.perf_counter()
        envs.step(right[: NUM_ENVS // 2] + right[: NUM_ENVS // 2])
        time_scored, scored = time_scored + time.perf_counter() - started, scored + NUM_ENVS
    return shown / time_shown, scored / time_scored


def row(name: str, cores: list[int], seconds: float) -> str:
    figures = []
    for own in (cores[:1], cores[:2]):
        command = [sys.executable, __file__, "--measure", name, "--seconds", str(seconds)]
        environment = os.environ | {"OMP_NUM_THREADS": str(len(own))}
        done = subprocess.run(
            ["taskset", "--cpu-list", ",".join(map(str, own)), *command],
            check=True,
            capture_output=True,
            text=True,
            env=environment,
        )
        figures.append(json.loads(done.stdout.splitlines()[-1]))
    (shown, scored), (shown_on_two, scored_on_two) = figures
    return f"| {name} | {shown:,.0f} | {shown_on_two:,.0f} | {scored:,.0f} | {scored_on_two:,.0f} |"


def head(cores: int) -> list[str]:
    return [
        "# Observations and scored answers per second",
        "",
        "    python benchmarks/environments.py --output benchmarks/environments.md",
        "",
        f"Built-in samples, {NUM_ENVS} environments, the default rewards; {cores} cores of {processor()}, "
        f"Python {platform.python_version()}.",
        "",
        "| | observations/s, one core | two cores | answers/s, one core | two cores |",
        "|---|---|---|---|---|",
    ]


def processor() -> str:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return models[0].partition(":")[2].strip() if models else platform.machine()


if __name__ == "__main__":
    main(tyro.cli(Args))
