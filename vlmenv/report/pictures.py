"""The pictures of a run: how its rewards rose, and what it answers before and after."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from vlmenv.algos.batch import NO_TERMS
from vlmenv.envs.vector import VisualTaskVectorEnv
from vlmenv.evaluation import Evaluation

_SHOWN = 8


def draw_curve(path: Path, history: Sequence[dict[str, float]]) -> None:
    """Draws each reward term over the steps, smoothed over a twentieth of the run."""
    every = dict.fromkeys(name for metrics in history for name in metrics)
    names = [name for name in every if name.startswith("reward/") and name not in NO_TERMS]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    width = max(1, len(history) // 20)
    for colour, name in zip(mpl.color_sequences["tab10"] * 9, names, strict=False):
        steps = np.array([step for step, metrics in enumerate(history, 1) if name in metrics])
        values = np.array([metrics[name] for metrics in history if name in metrics])
        kernel = np.ones(width)
        smooth = np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
        axes.plot(steps, smooth, color=colour, label=name.removeprefix("reward/"))
    axes.set(xlabel="step", ylabel="mean over completions")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def draw_samples(path: Path, envs: VisualTaskVectorEnv, before: Evaluation, after: Evaluation) -> None:
    """Draws the first evaluation samples with the true and the answered boxes, before and after."""
    rows: list[tuple[str, Sequence[dict[str, Any]]]] = [("before", before.answers), ("after", after.answers)]
    columns = min(_SHOWN, len(after.answers))
    figure = Figure(figsize=(2 * columns, 4.6), layout="constrained")
    grid = figure.subplots(2, columns, squeeze=False)
    for row, (name, answers) in enumerate(rows):
        for column in range(columns):
            answer, axes = answers[column], grid[row, column]
            sample = envs.task.source.get(answer["index"])
            axes.imshow(envs.task.draw(sample, answer["prediction"]))
            axes.set(xticks=[], yticks=[])
            said = envs.task.answer_format.extract(answer["completion"])
            axes.set_xlabel(_wrapped(said or "no answer", lines=2), fontsize=7, parse_math=False)
            if row == 0:
                axes.set_title(_wrapped(sample.question), fontsize=8, parse_math=False)
            if column == 0:
                axes.set_ylabel(name)
    figure.suptitle("before and after training; of boxes, true ones green and answered ones red", fontsize=9)
    figure.savefig(path, dpi=100)


def _wrapped(text: str, width: int = 24, lines: int = 3) -> str:
    return textwrap.fill(text, width, max_lines=lines, placeholder=" …")
