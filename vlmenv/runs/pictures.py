"""Pictures of a run: its reward curves, and answers before and after training."""

from __future__ import annotations

import os
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmenv.algos.batch import NO_TERMS
from vlmenv.core.text import visible
from vlmenv.envs.vector import VisualTaskVectorEnv
from vlmenv.evaluation import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NUM_COLUMNS = 8
_DRIFTING = ("completion/length", "completion/repetition", "completion/box_ratio")


def _matplotlib() -> Any:
    """Imports matplotlib. Pictures need no backend, so an MPLBACKEND that is absent here must not fail the import."""
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib.figure
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return matplotlib


def draw_curve(path: Path, history: Sequence[dict[str, float]], warned: Sequence[int] = ()) -> None:
    """Draws each reward term over the steps, smoothed over a twentieth of the run.

    If the run was evaluated in between, a second panel shows signs of reward hacking: the first held-out metric, and
    lengths, repetitions and box ratios of the completions. Each curve is relative to its first value.

    Args:
        path: Picture file to write.
        history: Metrics of each step.
        warned: Steps with a warning, counted from 1, drawn as dashed lines.
    """
    every = dict.fromkeys(name for metrics in history for name in metrics)
    terms = [name for name in every if name.startswith("reward/") and name not in NO_TERMS]
    held_out = [name for name in every if name.startswith("eval/")][:1]
    panels = 2 if held_out else 1
    figure = _matplotlib().figure.Figure(figsize=(7, 1 + 3 * panels), layout="constrained")
    grid = figure.subplots(panels, squeeze=False)[:, 0]
    _draw_lines(grid[0], history, terms)
    grid[0].set(ylabel="mean over completions")
    if held_out:
        _draw_lines(grid[1], history, [*held_out, *(name for name in _DRIFTING if name in every)], relative=True)
        grid[1].set(ylabel="multiple of the first value")
    for axes in grid:
        for step in warned:
            axes.axvline(step, color="0.3", linestyle="--", linewidth=1)
        axes.set(xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right" if axes is grid[0] else "upper left")
    _save(figure, path, dpi=120)


def _draw_lines(axes: Axes, history: Sequence[dict[str, float]], names: Sequence[str], relative: bool = False) -> None:
    """Draws metrics over the steps that have them, and their moving means as thicker lines."""
    width = max(1, len(history) // 20)
    for colour, name in zip(_matplotlib().color_sequences["tab10"] * 9, names, strict=False):
        steps = np.array([step for step, metrics in enumerate(history, 1) if name in metrics])
        values = np.array([metrics[name] for metrics in history if name in metrics])
        values = values / (values[0] or 1) if relative else values
        kernel = np.ones(min(width, len(values)))
        smooth = np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
        label = name.removeprefix("reward/").removeprefix("completion/").replace("eval/", "held-out ")
        label = visible(label).replace("$", r"\$")  # which would begin a formula
        axes.plot(steps, values if name.startswith("eval/") else smooth, color=colour, label=label)


def draw_samples(path: Path, envs: VisualTaskVectorEnv, before: Evaluation, after: Evaluation) -> None:
    """Draws the first evaluation samples with true and predicted boxes, before and after training."""
    rows: list[tuple[str, Sequence[dict[str, Any]]]] = [("before", before.answers), ("after", after.answers)]
    columns = min(_NUM_COLUMNS, len(after.answers))
    figure = _matplotlib().figure.Figure(figsize=(2 * columns, 4.6), layout="constrained")
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
    figure.suptitle("before and after training; true boxes are green, predicted boxes are red", fontsize=9)
    _save(figure, path, dpi=100)


def _save(figure: Figure, path: Path, dpi: int) -> None:
    """Writes a picture. A character that the font lacks is a box in it, which needs no warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(path, dpi=dpi)


def _wrapped(text: str, width: int = 24, lines: int = 3) -> str:
    return textwrap.fill(visible(text.replace("\n", " ")), width, max_lines=lines, placeholder=" …")
