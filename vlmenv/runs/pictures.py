"""Pictures of a run: its reward curves, and answers before and after training."""

from __future__ import annotations

import os
import textwrap
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from vlmenv.algos.batch import NO_TERMS
from vlmenv.core.text import visible
from vlmenv.envs.base import VisualTaskEnv
from vlmenv.envs.geometry import places
from vlmenv.envs.vector import VisualTaskVectorEnv
from vlmenv.evaluation import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Answer = Mapping[str, Any]
"""An answer of an evaluation; see `Evaluation.answers`."""

_NUM_COLUMNS: Final = 8
_OF_A_KIND: Final = 2
_WIDTH: Final = 26  # characters of a line
_FEW: Final = 40  # values whose points are marked
_COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#333333")
"""Of Okabe and Ito, which colour-blind eyes tell apart."""
_DASHES: Final = ("-", "--", ":", "-.")
_NAMES: Final = 3  # names of lines side by side
_DRIFTING: Final = ("completion/length", "completion/repetition", "completion/box_ratio")


def _matplotlib() -> Any:
    """Imports matplotlib. Pictures need no backend, so an MPLBACKEND that is absent here must not fail the import."""
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib.figure
        import matplotlib.ticker
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return matplotlib


def draw_curve(
    path: Path, history: Sequence[dict[str, float]], warned: Sequence[int] = (), title: str = "training"
) -> None:
    """Draws the metrics of training over the steps, smoothed over a twentieth of the run.

    There is a panel each for the mean reward, the reward terms, the held-out metric, signs of reward hacking relative
    to their first values, the loss, entropy, KL divergence and length, as far as the run has them.

    Args:
        path: Picture file to write.
        history: Metrics of each step.
        warned: Steps with a warning, counted from 1, drawn as dashed lines.
        title: Title of the picture.
    """
    every = dict.fromkeys(name for metrics in history for name in metrics)
    panels = [(told, own) for told, wanted in _panels(every) if (own := [name for name in wanted if name in every])]
    columns = min(2, len(panels))
    rows, lines = -(-len(panels) // columns), max(-(-len(own) // _NAMES) for _, own in panels)
    figure, grid = _grid(rows, columns, above=0.2 * lines)
    for axes, (label, names) in zip(grid, panels, strict=False):
        _draw_lines(axes, history, names, relative=label == _RELATIVE)
        axes.set(ylabel=label, xlabel="step")
        axes.xaxis.set_major_locator(_matplotlib().ticker.MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        for step in warned:
            axes.axvline(step, color="0.3", linestyle="--", linewidth=1)
        _name_lines(axes)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle(visible(title), y=1 - 0.08 / figure.get_figheight(), va="top", fontsize=11, parse_math=False)
    _save(figure, path, dpi=120)


def _grid(rows: int, columns: int, above: float) -> tuple[Figure, np.ndarray[Any, Any]]:
    """A figure with panels of a fixed size, and its panels row by row. A layout by contents takes twice as long.

    Args:
        rows: Rows of panels.
        columns: Columns of panels.
        above: Room for names above each panel, in inches.
    """
    width, height, left, below, title = 4.5, 2.0, 0.85, 0.55, 0.35
    size = (columns * (left + width) + 0.15, title + rows * (above + height + below))
    figure = _matplotlib().figure.Figure(figsize=size)
    edges = {"left": left / size[0], "right": 1 - 0.15 / size[0], "bottom": below / size[1]}
    spaces = {"top": 1 - (title + above) / size[1], "wspace": left / width, "hspace": (above + below) / height}
    return figure, figure.subplots(rows, columns, squeeze=False, gridspec_kw=edges | spaces).ravel()


_RELATIVE: Final = "multiple of the first value"


def _panels(every: Collection[str]) -> list[tuple[str, list[str]]]:
    """Labels with units, and the metrics of each panel."""
    terms = [name for name in every if name.startswith("reward/") and name not in ("reward/mean", *NO_TERMS)]
    held_out = [name for name in every if name.startswith("eval/")][:1]
    return [
        ("mean reward", ["reward/mean"]),
        ("reward terms, unweighted", terms),
        (f"held-out {visible(held_out[0][5:])}" if held_out else "", held_out),
        (_RELATIVE, [*held_out, *_DRIFTING] if held_out else []),
        ("loss", ["loss"]),
        ("entropy, nats per token", ["policy/entropy"]),
        ("KL divergence, nats per token", ["policy/kl"]),
        ("length, tokens", ["completion/length"]),
    ]


def _name_lines(axes: Axes) -> None:
    """Names the lines above the panel, where the legend hides none of them."""
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=_NAMES, fontsize=8, frameon=False)


def _draw_lines(axes: Axes, history: Sequence[dict[str, float]], names: Sequence[str], relative: bool = False) -> None:
    """Draws metrics over the steps that have them, and their moving means as thicker lines."""
    width = max(1, len(history) // 20)
    for number, name in enumerate(names):
        colour, dash = _COLOURS[number % len(_COLOURS)], _DASHES[number // len(_COLOURS) % len(_DASHES)]
        steps = np.array([step for step, metrics in enumerate(history, 1) if name in metrics])
        values = np.array([metrics[name] for metrics in history if name in metrics])
        values = values / (values[0] or 1) if relative else values
        kernel = np.ones(min(width, len(values)))
        smooth = np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
        label = name.removeprefix("reward/").removeprefix("completion/").replace("eval/", "held-out ")
        label = visible(label).replace("$", r"\$")  # which would begin a formula
        shown = values if name.startswith("eval/") else smooth
        marker = "o" if len(values) < _FEW else None
        axes.plot(steps, shown, color=colour, linestyle=dash, marker=marker, markersize=3, label=label)


def draw_samples(path: Path, envs: VisualTaskVectorEnv, before: Evaluation, after: Evaluation) -> None:
    """Draws evaluation samples before and after training: fixed, broken and unreadable ones first, then others.

    Each has its question, true and answered places, and below its answer, its truth if that is no place, and its score.
    """
    pairs = chosen(envs.task, before.answers, after.answers)
    columns = len(pairs)
    figure = _matplotlib().figure.Figure(figsize=(2.3 * columns, 6.4), layout="constrained")
    grid = figure.subplots(2, columns, squeeze=False)
    for column, (kind, *answers) in enumerate(pairs):
        for row, (when, answer) in enumerate(zip(("before", "after"), answers, strict=True)):
            axes, sample = grid[row, column], envs.task.source.get(answer["index"])
            axes.imshow(envs.task.draw(sample, answer["prediction"]))
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel(_told(envs.task, answer, answers[1]["target"]), fontsize=7, parse_math=False)
            if row == 0:
                question = _wrapped_end(sample.question, _WIDTH, 4)
                axes.set_title(f"{kind}\n{question}", fontsize=8, parse_math=False)
            if column == 0:
                axes.set_ylabel(when)
    colours = "" if envs.task.geometry is None else "; true places are blue, answered ones orange"
    figure.suptitle(f"before and after training{colours}", fontsize=9)
    _save(figure, path, dpi=100)


def chosen(task: VisualTaskEnv, before: Sequence[Answer], after: Sequence[Answer]) -> list[tuple[str, Answer, Answer]]:
    """Pairs of answers to show, each with its kind: up to two fixed, two broken, two unreadable, and then the first.

    Answers are paired by their sample.
    """
    earlier = {one["index"]: one for one in before}
    pairs = [
        (_kind(task, earlier[one["index"]], one), earlier[one["index"]], one)
        for one in after
        if one["index"] in earlier
    ]
    shown = [
        pair for kind in ("fixed", "broken", "unreadable") for pair in [p for p in pairs if p[0] == kind][:_OF_A_KIND]
    ]
    others = [pair for pair in pairs if not any(pair is one for one in shown)]
    return [*shown, *others][:_NUM_COLUMNS]


def _kind(task: VisualTaskEnv, before: Answer, after: Answer) -> str:
    name, least = task.right
    was, now = (one["measures"].get(name, 0.0) >= least for one in (before, after))
    if after["prediction"] is None:
        return "unreadable"
    return {(False, True): "fixed", (True, False): "broken", (True, True): "right both times"}.get(
        (was, now), "still wrong"
    )


def _told(task: VisualTaskEnv, answer: Answer, target: Any) -> str:
    """An answer with its truth, if that is no place, and its score."""
    said = task.answer_format.extract(answer["completion"])
    lines = [_wrapped(said or "no readable answer", _WIDTH, 3)]
    if task.geometry is None or not any(places(target)):
        lines.append(_wrapped(f"truth: {target}", _WIDTH, 2))
    name = task.right[0]
    if name in answer["measures"]:
        lines.append(f"{visible(name)} {answer['measures'][name]:.2f}")
    return "\n".join(lines)


def _save(figure: Figure, path: Path, dpi: int) -> None:
    """Writes a picture. A character that the font lacks is a box in it, which needs no warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(path, dpi=dpi)


def _wrapped(text: str, width: int, lines: int) -> str:
    """The beginning of a text in so many lines."""
    return textwrap.fill(visible(text.replace("\n", " ")), width, max_lines=lines, placeholder=" …")


def _wrapped_end(text: str, width: int, lines: int) -> str:
    """The end of a text in so many lines: what is asked for stands there."""
    found = textwrap.wrap(visible(text.replace("\n", " ")), width)
    return "\n".join(found if len(found) <= lines else ["…", *found[-lines + 1 :]])
