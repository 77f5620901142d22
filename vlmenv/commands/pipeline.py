"""`vlmenv pipeline`: stages of training and sampling, each of which uses the results of earlier ones."""

from __future__ import annotations

import gc
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console

from vlmenv.algos import ALGORITHMS
from vlmenv.commands import evaluate, sample, train
from vlmenv.compat import accelerate
from vlmenv.core.console import PlainTable, open_console, say
from vlmenv.core.errors import ConfigError, ModelError, unknown_name
from vlmenv.core.files import read_object, read_objects, write_atomic
from vlmenv.core.text import visible
from vlmenv.core.urls import MASK, hidden
from vlmenv.envs.metrics.intervals import Interval
from vlmenv.envs.rewards.judge import URL as JUDGE_URL
from vlmenv.evaluation import INTERVALS, differences, written
from vlmenv.options.command_line import Asked
from vlmenv.options.files import as_arguments, packaged_file, read_options
from vlmenv.options.parsing import parse_plain
from vlmenv.options.pipeline import PipelineConfig
from vlmenv.processes import end_with_parent
from vlmenv.runs.lock import locked
from vlmenv.runs.models import newest_model
from vlmenv.runs.run_folder import RunFolder

_REFERENCE = re.compile(r"\{(\w+)\}(/model$|/|$)")
_NAME = re.compile(r"\w+")
_BASE: Final = "base"
_TEMPLATES: Final = ("prompt_template", "system_prompt")
"""Options in which braces have another meaning."""


@dataclass(frozen=True, slots=True)
class Step:
    """A command that is run once."""

    name: str
    """also the name of its folder within the pipeline's"""
    command: str
    """`train`, `sample` or `eval`"""
    options: Mapping[str, Any]
    """options; `{NAME}` stands for the folder of an earlier stage, and `{NAME}/model` for its model"""


@dataclass(frozen=True, slots=True)
class Measuring:
    """A data set on which the model is measured, after each stage that trains it."""

    name: str
    folder: str
    """name of the evaluations; sets that differ only in the metrics share it"""
    options: Mapping[str, Any]
    metrics: Sequence[str] | None
    """metrics to show; None: all"""


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The content of a file of stages."""

    file: Path
    stages: Sequence[Step]
    measurings: Sequence[Measuring]

    @property
    def trained(self) -> list[str]:
        """The names of the stages that train a model."""
        return [stage.name for stage in self.stages if stage.command == "train"]


def read_pipeline(name: str) -> Pipeline:
    """Reads a file of stages.

    Args:
        name: A path, or the name of a packaged one.

    Raises:
        ConfigError: There is none, or it does not have the form of one.
    """
    file = Path(name) if Path(name).suffix in (".yaml", ".yml") else packaged_file("pipeline", name)
    content = read_options(file)
    for key in content:
        if key not in ("stages", "evaluate"):
            raise ConfigError(f"{file}: {unknown_name('part of a pipeline', str(key), ('stages', 'evaluate'))}")
    stages, sets = content.get("stages"), content.get("evaluate") or {}
    if not isinstance(stages, dict) or not stages or not isinstance(sets, dict):
        raise ConfigError(f"{file}: 'stages', and 'evaluate' if there is one, map names to what is done")
    listed = [_stage(file, *item) for item in stages.items()]
    _check_references(file, listed)
    return Pipeline(file, listed, list(_measurings(file, sets)))


def _stage(file: Path, name: Any, content: Any) -> Step:
    if not _NAME.fullmatch(str(name)) or name in (_BASE, "evaluation"):
        raise ConfigError(f"{file}: a stage cannot be called '{name}': take letters and digits, and another word")
    if not isinstance(content, dict) or len(content) != 1 or next(iter(content)) not in ("train", "sample"):
        raise ConfigError(f"{file}: the stage {name} must be one 'train' or 'sample' with its options")
    command, options = next(iter(content.items()))
    return Step(name, command, _checked(file, name, options))


def _check_references(file: Path, stages: Sequence[Step]) -> None:
    for number, stage in enumerate(stages):
        earlier = {one.name for one in stages[:number]}
        for name, value in stage.options.items():
            for part in value if isinstance(value, list) else [value]:
                found = _REFERENCE.match(part) if isinstance(part, str) and name not in _TEMPLATES else None
                if found and found[1] not in earlier:
                    raise ConfigError(f"{file}: {stage.name} refers to {{{found[1]}}}, but no stage before it is that")


def _measurings(file: Path, sets: Mapping[str, Any]) -> Iterator[Measuring]:
    folders: dict[str, str] = {}
    for name, content in sets.items():
        options = dict(_checked(file, name, content))
        metrics = options.pop("metrics", None)
        folder = folders.setdefault(json.dumps(options, sort_keys=True, default=str), name)
        yield Measuring(name, folder, options, metrics)


def _checked(file: Path, name: str, options: Any) -> Mapping[str, Any]:
    """The options of a stage, without those that the pipeline sets itself."""
    if not isinstance(options, dict):
        raise ConfigError(f"{file}: the options of {name} are 'name: value' lines, not {options!r}")
    for taken in ("output", "resume"):
        if taken in options:
            raise ConfigError(f"{file}: {name} has the option '{taken}', which the pipeline sets itself")
    return options


def parse(args: Sequence[str], program: str) -> PipelineConfig:
    """The options of a command line."""
    config: PipelineConfig = parse_plain(args, PipelineConfig(pipeline=""), program)
    return config


def run(config: PipelineConfig) -> Path:
    """Runs the stages, and returns the pipeline's folder."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("start a pipeline in one process; --launch starts its stages in several")
    pipeline = read_pipeline(config.pipeline)
    folder = config.output or Path("runs") / pipeline.file.stem
    steps = _steps(pipeline)
    for step in steps:
        _parsed(step, pipeline.file, folder)  # raises errors of later stages now
    console = open_console()
    with locked(folder, lambda line: say(f"warning: {line}", console)):
        _go_through(steps, pipeline, folder, config.launch, console)
    return folder


def _go_through(steps: Sequence[Step], pipeline: Pipeline, folder: Path, launch: str | None, console: Console) -> None:
    for number, step in enumerate(steps, 1):
        if step is pipeline.stages[0]:
            _found(pipeline, folder / "evaluation" / _BASE)  # raises now if a metric does not exist
        console.rule(f"{step.name} ({number} of {len(steps)})", align="left")
        _do(step, folder, launch, console)
    _report(pipeline, folder, console)


def _steps(pipeline: Pipeline) -> list[Step]:
    """All steps: the stages, and after each that trains the evaluation of its model."""
    first = next((stage for stage in pipeline.stages if stage.command == "train"), None)
    if first is None:
        raise ConfigError(f"{pipeline.file}: no stage trains a model")
    base = _parsed(first, pipeline.file, Path()).config.model
    steps = list(_measured(pipeline, _BASE, base))
    for stage in pipeline.stages:
        steps.append(stage)
        if stage.command == "train":
            steps += _measured(pipeline, stage.name, f"{{{stage.name}}}/model")
    return steps


def _measured(pipeline: Pipeline, stage: str, model: str) -> Iterator[Step]:
    for folder, measuring in {one.folder: one for one in reversed(pipeline.measurings)}.items():
        yield Step(f"evaluation/{stage}/{folder}", "eval", {**measuring.options, "model": model})


def _parsed(step: Step, file: Path, folder: Path) -> Asked:
    """The options of a step, before it can be run.

    Raises:
        ConfigError: Its options are invalid.
    """
    try:
        return _parse(_arguments(step, folder, finished=False))
    except ConfigError as error:
        raise ConfigError(f"{file}: {step.name}: {error}") from error
    except SystemExit:
        say(f"in {file}: {step.name}", open_console(stderr=True))
        raise


def _arguments(step: Step, folder: Path, finished: bool = True) -> list[str]:
    """A step's command line.

    Args:
        step: The step.
        folder: The pipeline's folder.
        finished: Whether earlier stages exist, so that options can refer to them.
    """
    options = {
        name: value if name in _TEMPLATES else _filled(value, folder, finished)
        for name, value in _without_group(step).items()
    }
    options |= {name: hidden(url) for name, url in _judges(step).items()}  # command lines are public
    return [step.command, *as_arguments(options), f"--output={folder / step.name}"]


def _judges(step: Step) -> dict[str, str]:
    """A step's option `judge_url`, as it is spelt."""
    return {name: str(step.options[name]) for name in ("judge_url", "judge-url") if name in step.options}


def _environment(step: Step) -> dict[str, str]:
    """The environment of a step in processes of its own: the judge's whole URL, if the file has it."""
    whole = [url for url in _judges(step).values() if MASK not in url]
    return os.environ | ({JUDGE_URL: whole[0]} if whole else {})


def _without_group(step: Step) -> Mapping[str, Any]:
    """A step's options with those of its algorithm's group beside the others.

    Raises:
        ConfigError: There is a group of another algorithm.
    """
    groups = {name: value for name, value in step.options.items() if name in ALGORITHMS and isinstance(value, dict)}
    if other := groups.keys() - {step.options.get("algo", next(iter(groups), None))}:
        raise ConfigError(f"{', '.join(sorted(other))} has options here, but algo is {step.options.get('algo')}")
    flat = {name: value for name, value in step.options.items() if name not in groups}
    return {**flat, **{name: value for group in groups.values() for name, value in group.items()}}


def _filled(value: Any, folder: Path, finished: bool) -> Any:
    """A value with the folder of a stage, or that of its model, in the place of a reference."""
    if isinstance(value, list):
        return [_filled(one, folder, finished) for one in value]
    if not isinstance(value, str) or not (found := _REFERENCE.match(value)):
        return value
    stage = folder / found[1]
    if found[2] != "/model" or not finished:
        return f"{stage}{value[found.end(1) + 1 :]}"
    try:
        return str(newest_model(RunFolder(stage))[0])
    except ModelError as error:
        raise ConfigError(f"'{value}': {error}") from error


_COMMANDS: Final[dict[str, Any]] = {"train": train, "sample": sample, "eval": evaluate}


def _parse(arguments: Sequence[str]) -> Asked:
    command, *rest = arguments
    asked: Asked = _COMMANDS[command].parse(rest, f"vlmenv {command}")
    return asked


def _do(step: Step, folder: Path, launch: str | None, console: Console) -> None:
    """Runs a step unless it is finished, and continues it after an interruption.

    Raises:
        ConfigError: It was begun with other options.
        SystemExit: It failed in its own processes, or a signal ended it.
    """
    own, args = folder / step.name, _arguments(step, folder)
    record = own / "stage.json"
    state: dict[str, Any] = {"arguments": args, "finished": False}
    if record.is_file():
        state = read_object(record)
    if state.get("arguments") != args:
        raise ConfigError(
            f"{own} was begun with other options: vlmenv {shlex.join(map(str, state.get('arguments') or ()))}\n"
            f"Remove that folder and those of the stages after it, or choose another --output"
        )
    if state.get("finished"):
        say("done before", console)
        return
    own.mkdir(parents=True, exist_ok=True)
    write_atomic(record, json.dumps({"arguments": args, "finished": False}) + "\n")
    begun = step.command == "train" and (own / "config.yaml").is_file()
    command = ["train", "--resume", str(own)] if begun else args
    if launch is None:
        _COMMANDS[command[0]].run(_parse(command))
        _free()
    else:
        _launch([*shlex.split(launch), *command], _environment(step))
    write_atomic(record, json.dumps({"arguments": args, "finished": True}) + "\n")


def _free() -> None:
    """Frees the resources of a stage in this process, so that the next may choose device and precision anew."""
    accelerate.forget()
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def _launch(command: list[str], environment: Mapping[str, str]) -> None:
    """Runs a command in its own processes. Signals to this process reach them, and they end with it.

    Raises:
        SystemExit: It failed.
    """
    with subprocess.Popen(command, env=environment, preexec_fn=end_with_parent) as child:
        former = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        try:
            code = _awaited(child)
        finally:
            signal.signal(signal.SIGTERM, former)
    if code:
        sys.exit(code if code > 0 else 128 - code)


def _awaited(child: subprocess.Popen[bytes]) -> int:
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            continue  # the terminal has told the child too, which may have something to save


def _report(pipeline: Pipeline, folder: Path, console: Console) -> None:
    """Shows and writes the metrics of each model, as report.md and report.json."""
    names = [_BASE, *pipeline.trained]
    columns = {name: _found(pipeline, folder / "evaluation" / name) for name in names}
    write_atomic(folder / "report.json", json.dumps(columns, indent=2) + "\n")
    rows = [[metric, *(_written(columns[name].get(metric)) for name in names)] for metric in columns[_BASE]]
    table = PlainTable("", *names, title=f"{pipeline.file.stem}: the model after each stage")
    for row in rows:
        table.add_row(*row)
    changes = _markdown(["change from the base", *pipeline.trained], _change_rows(pipeline, folder, columns))
    text = f"{_markdown(['', *names], rows)}\n{INTERVALS}.\n\n{changes}\nChanges are of the same samples.\n"
    write_atomic(folder / "report.md", text)
    console.print(table)
    say(f"the stages and this table are in {folder}", console)


def _markdown(head: list[str], rows: Sequence[list[str]]) -> str:
    """A table in Markdown."""
    lines = ([visible(cell).replace("|", "\\|") for cell in line] for line in (head, ["---"] * len(head), *rows))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _change_rows(pipeline: Pipeline, folder: Path, columns: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """The paired differences of each trained model from the base, by metric."""
    changes = {name: _changes(pipeline, folder / "evaluation", name) for name in pipeline.trained}
    return [
        [metric, *(written(own[metric], "+.3f") if metric in own else "-" for own in changes.values())]
        for metric in columns[_BASE]
    ]


def _changes(pipeline: Pipeline, folder: Path, name: str) -> dict[str, Interval]:
    """The paired differences of one model from the base, by set and metric."""
    found: dict[str, Interval] = {}
    for one in pipeline.measurings:
        base, own = folder / _BASE / one.folder, folder / name / one.folder
        for file in sorted(own.rglob("answers.jsonl")):
            place = file.relative_to(own)
            entry = "" if place.parent == Path() else f"{place.parent}: "
            changes = (
                differences(None, read_objects(base / place), read_objects(file)) if (base / place).is_file() else {}
            )
            found |= {f"{one.name}: {entry}{metric}": change for metric, change in changes.items()}
    return found


def _found(pipeline: Pipeline, folder: Path) -> dict[str, dict[str, float]]:
    """The metrics to show of one model, by set and name."""
    found: dict[str, dict[str, float]] = {}
    for one in pipeline.measurings:
        metrics = _by_name(read_object(folder / one.folder / "metrics.json"))
        for name in metrics if one.metrics is None else one.metrics:
            if name not in metrics:
                raise ConfigError(f"{pipeline.file}: {one.name}: {unknown_name('metric', name, metrics)}")
            found[f"{one.name}: {name}"] = metrics[name]
    return found


def _by_name(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    """Metrics as an evaluation writes them; those of a suite, a mapping for each data set, as `DATA SET: NAME`."""
    if all("value" in metric for metric in metrics.values()):
        return metrics
    return {f"{entry}: {name}": metric for entry, own in metrics.items() for name, metric in own.items()}


def _written(metric: Mapping[str, float | None] | None) -> str:
    if metric is None or metric["value"] is None:
        return "-"
    if metric["low"] is None:
        return f"{metric['value']:.3f}"
    return f"{metric['value']:.3f} ({metric['low']:.3f} to {metric['high']:.3f})"
