"""Runs of `vlmenv train` whose results are kept: an interrupted benchmark is taken up by the same command."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import matplotlib as mpl
import numpy as np
import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from vlmenv.agents.vlm import BUILTIN, find_model
from vlmenv.envs.base import VisualTaskEnv
from vlmenv.envs.data.source import Sample
from vlmenv.envs.export import export_sample

HERE = Path(__file__).parent


def check_model(folder: Path) -> None:
    """Ends the program where the runs in a folder were begun with another model than the present one."""
    digest = hashlib.sha256((find_model(BUILTIN) / "model.safetensors").read_bytes()).hexdigest()
    note = folder / "model.sha256"
    folder.mkdir(parents=True, exist_ok=True)
    if note.exists() and note.read_text() != digest:
        raise SystemExit(f"the runs in {folder} are of another built-in model: choose another --runs, or remove it")
    note.write_text(digest)


def trained(folder: Path, options: Mapping[str, Any]) -> Path:
    """A finished run; it is trained, or trained further, unless it is finished already."""
    if not (folder / "config.yaml").exists():
        _vlmenv("train", *arguments(options), "--output", str(folder))
    _check_options(folder, options)
    if not _is_finished(folder, options):
        _vlmenv("train", "--resume", str(folder))
    return folder


def _is_finished(folder: Path, options: Mapping[str, Any]) -> bool:
    saved = (folder / "checkpoints" / f"step-{options['steps']}" / "trainer.pt").exists()
    return saved and (options["eval_limit"] == 0 or (folder / "evaluation.json").exists())


def measured(folder: Path, options: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of `vlmenv eval`, kept in a folder."""
    if not (folder / "metrics.json").exists():
        _vlmenv("eval", *arguments(options), "--output", str(folder))
    return values(json.loads((folder / "metrics.json").read_text()))


def sampled(folder: Path, options: Mapping[str, Any]) -> Path:
    """A folder with the rows that `vlmenv sample` divides by difficulty."""
    if not (folder / "summary.json").exists():
        _vlmenv("sample", *arguments(options), "--output", str(folder))
    return folder


def piped(folder: Path, file: Path) -> dict[str, Any]:
    """The report of `vlmenv pipeline`, which is run, or goes on, unless it is finished."""
    if not (folder / "report.json").exists():
        _vlmenv("pipeline", str(file), "--output", str(folder))
    return dict(json.loads((folder / "report.json").read_text()))


def sight_of(folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """What `vlmenv eval --visual-dependence` measures, kept in a folder."""
    file = folder / "visual_dependence.json"
    if not file.exists():
        _vlmenv("eval", *arguments(options), "--visual-dependence", "--output", str(folder))
    return dict(json.loads(file.read_text()))


def arguments(options: Mapping[str, Any]) -> list[str]:
    """Options as the command line takes them; a mapping's or a sequence's parts one after the other."""
    found: list[str] = []
    for name, value in options.items():
        parts = [part for pair in value.items() for part in pair] if isinstance(value, Mapping) else value
        parts = parts if isinstance(parts, Sequence) and not isinstance(parts, str) else [parts]
        found += [f"--{name.replace('_', '-')}", *map(str, parts)]
    return found


def steps_of(folder: Path) -> list[dict[str, float]]:
    """The metrics of each step."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def evaluation_of(folder: Path, when: str = "after") -> dict[str, float]:
    """What was measured before or after training."""
    return values(json.loads((folder / "evaluation.json").read_text())[when])


def measurements_of(folder: Path, metric: str) -> list[tuple[int, float]]:
    """The steps at which a held-out metric was measured in training, and its values."""
    name = f"eval/{metric}"
    return [(int(step["step"]), step[name]) for step in steps_of(folder) if name in step]


def seconds_of(folder: Path) -> float:
    """Of all steps, without start and measuring."""
    return sum(value for step in steps_of(folder) for name, value in step.items() if name.startswith("time/"))


def values(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Metrics without their intervals."""
    return {name: metric["value"] for name, metric in metrics.items()}


def rows_file(env: str, samples: Iterable[Sample], folder: Path) -> Path:
    """Samples of a task as a file of rows with their images; it is written once."""
    file = folder / "rows.jsonl"
    if not file.exists():
        task = gymnasium.make(env).unwrapped
        assert isinstance(task, VisualTaskEnv)
        rows = [export_sample(task, sample, folder) for sample in samples]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file.absolute()


def last_model(folder: Path) -> Path:
    """The model after the last step."""
    return max((folder / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def tail(folder: Path, name: str) -> float:
    """The mean of a metric over the last tenth of the steps; NaN where none of them has it."""
    steps = steps_of(folder)
    return mean_of(steps[-max(1, len(steps) // 10) :], name)


def mean_of(steps: Sequence[Mapping[str, float]], name: str) -> float:
    """The mean of a metric over the steps that have it; NaN where none has."""
    found = [step[name] for step in steps if name in step]
    return float(np.mean(found)) if found else float("nan")


def hardware() -> str:
    """What this runs on. Another number of threads rounds otherwise, and so trains another model."""
    threads = torch.get_num_threads()
    return f"{os.cpu_count()} cores of {processor()}, threads of PyTorch: {threads}, float32, torch {torch.__version__}"


def processor() -> str:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return models[0].partition(":")[2].strip() if models else platform.machine()


def seeds_cell(values: Sequence[float], digits: int = 3) -> str:
    """The figures of several seeds, once where they are the same."""
    written = [f"{value:.{digits}f}" for value in values]
    return written[0] if len(set(written)) == 1 else " / ".join(written)


def spread_cell(values: Sequence[float], digits: int = 3) -> str:
    """The figures of several seeds after their mean and standard deviation; once where they are the same."""
    cell = seeds_cell(values, digits)
    if "/" not in cell:
        return cell
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f} ({cell})"


def draw_seeds(
    axes: Axes, lines: Mapping[str, Sequence[Sequence[float]]], width: int = 1, steps: Sequence[int] | None = None
) -> None:
    """Draws for each name the mean of its seeds' curves, and thin the seeds themselves.

    Args:
        axes: Where to draw.
        lines: By name, the values of each seed.
        width: Number of values that each curve is smoothed over. Default: 1, as they are.
        steps: The steps of the values. Default: from 1.
    """
    for (name, seeds), colour in zip(lines.items(), mpl.color_sequences["tab10"] * 9, strict=False):
        curves = np.array([smooth(np.asarray(one, dtype=float), width) for one in seeds])
        shown = np.arange(1, curves.shape[1] + 1) if steps is None else np.asarray(steps)
        axes.plot(shown, curves.T, color=colour, linewidth=0.5, alpha=0.5)
        axes.plot(shown, curves.mean(axis=0), color=colour, linewidth=1.6, label=name)
    axes.set(xlabel="step")
    axes.grid(alpha=0.3)


def draw_stages(path: Path, found: Mapping[str, Sequence[Sequence[Path]]], names: Sequence[str]) -> None:
    """Draws metrics side by side, over the steps of all stages; a gap where a stage did not reward one.

    Args:
        path: The figure's file.
        found: By way, for each seed the folders of its stages.
        names: Metrics of the steps, such as reward/accuracy.
    """
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names)), names, strict=True):
        curves = {
            way: [
                [step.get(name, float("nan")) for folder in folders for step in steps_of(folder)] for folders in seeds
            ]
            for way, seeds in found.items()
        }
        draw_seeds(axes, curves, width=10)
        axes.set(ylabel=f"{name.removeprefix('reward/')} of sampled answers")
        axes.legend(frameon=False)
    save(figure, path)


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """The means over `width` steps around each; over as many as there are at the ends."""
    kernel = np.ones(max(1, min(width, len(values))))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def publish(lines: Sequence[str], output: Path | None, draw: Callable[[Path], None]) -> None:
    """Prints a page; where asked, writes it, and draws its figure beside it."""
    text = "\n".join(lines) + "\n"
    print(text)
    if output is not None:
        output.write_text(text, encoding="utf-8")
        draw(output.with_suffix(".png"))


def tell_rows(head: Sequence[str], rows: Iterable[str], output: Path | None) -> None:
    """Prints each row of a table as soon as it is measured, and writes the table so far."""
    lines = list(head)
    for row in rows:
        lines.append(row)
        print(row, flush=True)
        if output is not None:
            output.write_text("\n".join(lines) + "\n", encoding="utf-8")


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=100)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)  # a quarter of the size


def draw_changes(path: Path, changes: Mapping[str, Mapping[str, Sequence[float]]], label: str) -> None:
    """Draws bars of mean changes, by way of training and then by place, with a dot for each run."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots()
    for i, (way, by_place) in enumerate(changes.items()):
        width = 0.9 / len(changes)
        places = np.arange(len(by_place)) + width * (i - (len(changes) - 1) / 2)
        runs = list(by_place.values())
        axes.bar(places, [np.mean(values) for values in runs], width=0.93 * width, color=f"C{i}", alpha=0.6, label=way)
        for x, values in zip(places, runs, strict=True):
            axes.plot([x] * len(values), values, ".", color="black")
        axes.set_xticks(range(len(by_place)), [name.replace(" ", "\n") for name in by_place], fontsize=8)
    axes.axhline(0, color="0.3", linewidth=1)
    axes.set(ylabel=label)
    axes.legend(frameon=False)
    save(figure, path)


def _vlmenv(*args: str) -> None:
    """Runs a command, which finds the tasks and rewards that stand beside the scripts."""
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-m", "vlmenv", *args], check=True, env=os.environ | {"PYTHONPATH": path})


def _check_options(folder: Path, options: Mapping[str, Any]) -> None:
    """Ends the program where a run has other options."""
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    stored |= stored.get(stored["algo"], {})  # the algorithm's own options are a group
    for name, value in options.items():
        if name not in stored or stored[name] != (dict(value) if isinstance(value, Mapping) else value):
            found = stored.get(name, "unset")
            raise SystemExit(f"{folder} is a run with {name} {found}, not {value}: choose another --runs, or remove it")
