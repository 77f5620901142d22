"""Measuring how well an agent answers."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from vlmenv.agents.base import Agent
from vlmenv.core.console import PlainConsole, PlainTable, open_console, say, styled
from vlmenv.core.errors import DataError, PromptError, SampleError
from vlmenv.core.files import read_object, read_objects, write_atomic
from vlmenv.core.rollout import Observation, Rollout, next_turns, told_turns, unbatch
from vlmenv.envs.base import VisualTaskEnv
from vlmenv.envs.metrics.intervals import Interval, metric_interval, paired_interval, wilson_interval
from vlmenv.envs.rewards.workers import LOSSES
from vlmenv.envs.vector import VisualTaskVectorEnv
from vlmenv.processes import Processes
from vlmenv.processes.failures import shared_failure

DEFAULT_LIMIT = 512
_COLUMNS: Final = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
_LINE_EVERY: Final = 30.0
"""Seconds between two lines about progress where the output is no terminal."""


@dataclass(slots=True)
class Evaluation:
    """Answers to a fixed set of samples."""

    metrics: dict[str, Interval]
    """each with its 95 % interval"""
    answers: list[dict[str, Any]]
    """one each, with `id`, `index`, `prompt`, `completion`, `prediction`, `target`, `rewards`, `reward` and
    `measures`, and `subject` where a sample has one"""
    skipped: Mapping[Any, str] = field(default_factory=dict)
    """by index, or TASK/INDEX of a mix, the place and fault of each sample that could not be shown"""

    def as_json(self) -> dict[str, Any]:
        """The metrics as JSON can hold them; None for what is not a number."""
        metrics: dict[str, Any] = as_json(self.metrics)
        if (unparsable := self.unparsable) is not None and "unparsable" in metrics:
            metrics["unparsable"] |= {"count": unparsable, "answers": len(self.answers)}
        return metrics

    def values(self) -> dict[str, float]:
        """The metrics without their intervals."""
        return {name: metric.value for name, metric in self.metrics.items()}

    @property
    def unparsable(self) -> int | None:
        """How many answers could not be read; None where the task does not say."""
        counts = [answer["measures"].get("unparsable") for answer in self.answers]
        return None if None in counts else int(sum(count for count in counts if count))


def as_json(metrics: Mapping[str, Interval]) -> dict[str, dict[str, float | None]]:
    """Metrics as JSON can hold them; None for what is not a number."""
    return {
        name: {part: None if math.isnan(number) else number for part, number in metric._asdict().items()}
        for name, metric in metrics.items()
    }


def evaluate(
    agent: Agent,
    envs: VisualTaskVectorEnv,
    count: int,
    *,
    greedy: bool,
    title: str,
    console: Console | None = None,
    processes: Processes | None = None,
    check: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Answers the first `count` samples of an environment's source.

    Args:
        agent: Who answers.
        envs: Their groups are filled with the answers to one sample each.
        count: Number of samples.
        greedy: Whether to take the likeliest tokens or to sample.
        title: What the progress bar says.
        console: Where it is shown.
        processes: Divide the samples between them, and have the answers of all; one does everything where left out.
        check: Called before each batch; an error that it raises ends the evaluation.

    Raises:
        ConfigError: Episodes have more images than the agent's engine takes, or videos, and it takes none.
        SampleError: A sample cannot be shown, and is not to be left out.
        DataError: None of the samples can be shown.
    """
    agent.check_episodes(envs.max_turns, envs.max_images, videos=envs.takes_videos)
    starts = range(0, count, envs.num_groups)
    own = starts if processes is None else processes.share(starts)
    batches = [range(start, min(start + envs.num_groups, count)) for start in own]
    answers: list[dict[str, Any]] = []
    former, total = LOSSES.snapshot(), sum(map(len, batches))
    with _generating(agent, len(batches) * envs.max_turns, processes), progress(title, total, console) as advance:
        for batch in batches:
            check()
            answers += answer_samples(agent, envs, batch, greedy)
            advance(len(batch))
    return _evaluation(envs, count, answers, LOSSES.since(former).answers, processes)


def _evaluation(
    envs: VisualTaskVectorEnv,
    count: int,
    answers: list[dict[str, Any]],
    unscored: int,
    processes: Processes | None,
) -> Evaluation:
    """The answers of all ranks, of which so many of this one could not be scored, with their metrics.

    Raises:
        DataError: There are none.
    """
    skipped = skipped_samples(envs, count, processes)
    if processes is not None:
        unscored = sum(processes.collect([unscored]))
        answers = sorted(processes.collect(answers), key=lambda answer: answer["index"])
    if not answers:
        raise DataError(f"none of the {count} samples can be shown; the first: {next(iter(skipped.values()))}")
    metrics = summarise(envs.task, answers)
    if unscored:
        metrics[UNSCORED] = wilson_interval(min(unscored, len(answers)), len(answers))
    return Evaluation(metrics, answers, skipped)


@contextmanager
def _generating(agent: Agent, batches: int, processes: Processes | None) -> Iterator[None]:
    """Prepares an agent for this rank's batches. With several ranks, weights are gathered, and all fail together."""
    if processes is None:
        with agent.generating(batches):
            yield
        return
    held = processes.gathered() if agent.generates_itself else nullcontext()
    most = max(processes.collect([batches]))
    with held, shared_failure(processes.accelerator), processes.autocast(), agent.generating(most):
        yield


UNSCORED = "unscored"
"""The share of answers that could not be compared with the truth, because others ended the processes that do so; a
metric only if there are any."""


@contextmanager
def progress(title: str, total: int, console: Console | None = None, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Shows how many samples are answered: by a bar on terminals and in notebooks, else by a line every half minute.

    Args:
        title: What is done.
        total: Number of samples.
        console: Where it is shown. Default: a new one.
        done: Samples that were answered before.

    Yields:
        A function that takes the number of samples answered since the last call.
    """
    console = console or open_console()
    if not (console.is_terminal or console.is_jupyter):
        yield _Lines(title, total, console, done).advance
        return
    with Progress(*_COLUMNS, transient=True, console=console) as bars:
        bar = bars.add_task(title, total=total, completed=done)
        yield lambda count: bars.advance(bar, count)


class _Lines:
    """Prints a line about progress once some time has passed since the last."""

    def __init__(self, title: str, total: int, console: Console, done: int) -> None:
        self._title, self._total, self._console = title, total, console
        self._first = self._done = done
        self._began = self._told = time.monotonic()

    def advance(self, count: int) -> None:
        """Counts answered samples."""
        self._done += count
        now = time.monotonic()
        if now - self._told < _LINE_EVERY or self._done >= self._total:
            return
        self._told = now
        left = (now - self._began) * (self._total - self._done) / (self._done - self._first)
        line = f"{self._title}: {self._done} of {self._total} samples, about {timedelta(seconds=round(left))} left"
        say(line, self._console)


def skipped_samples(envs: VisualTaskVectorEnv, count: int, processes: Processes | None) -> dict[int, str]:
    """What was left out of the first `count` samples, by index, with place and reason; of all processes together."""
    own = [(index, reason) for index, reason in envs.skipped.items() if index < count]
    return dict(sorted(own if processes is None else processes.collect(own)))


def summarise(task: VisualTaskEnv, answers: Sequence[Mapping[str, Any]]) -> dict[str, Interval]:
    """The metrics of answers: means of what the task measures of each, its ratios, and those of the whole set.

    Where samples have subjects, the accuracy on each of them follows, as `accuracy/SUBJECT`.
    """
    clusters = [answer["index"] for answer in answers]
    measures = {name: np.array([answer["measures"][name] for answer in answers]) for name in answers[0]["measures"]}
    metrics = {name: metric_interval(values, clusters=clusters) for name, values in measures.items()}
    for name, (over, under) in task.ratios.items():
        metrics[name] = metric_interval(measures[over], measures[under], clusters=clusters)
    metrics |= task.summarise([a["prediction"] for a in answers], [a["target"] for a in answers], clusters)
    for subject in sorted({answer.get("subject", "") for answer in answers} - {""}):
        own = [i for i, answer in enumerate(answers) if answer.get("subject", "") == subject]
        if "accuracy" in measures:
            found = metric_interval(measures["accuracy"][own], clusters=[clusters[i] for i in own])
            metrics[f"accuracy/{subject}"] = found
    return metrics


def answer_samples(agent: Agent, envs: VisualTaskVectorEnv, indices: range, greedy: bool) -> Iterator[dict[str, Any]]:
    """Answers some samples, no more than the environments have groups; see `Evaluation.answers`.

    Samples that cannot be shown are left out, if the task leaves broken rows out. Environments beyond the samples are
    left with empty answers.
    """
    played: Played | None = None
    while played is None:
        shown = [index for index in indices if index not in envs.skipped]
        if not shown:
            return
        try:
            played = _played(agent, envs, shown, greedy)
        except SampleError as error:
            envs.skip(error)
    observations, infos = played.observations, played.infos
    for i, text in enumerate(played.texts):
        target, rewards = infos["target"][i], infos["rewards"]
        terms = {name: float(rewards[name][i]) for name in rewards if name[0] != "_" and rewards[f"_{name}"][i]}
        subject = {"subject": str(infos["subject"][i])} if "subject" in infos and infos["_subject"][i] else {}
        yield {
            "id": infos["id"][i],
            "index": int(infos["index"][i]),
            **subject,
            **told_turns(observations[i]),
            "prompt": observations[i]["prompt"],
            "completion": text,
            "prediction": infos["prediction"][i],
            "target": target,
            "rewards": terms,
            "reward": float(played.rewards[i]),
            "measures": envs.task.measure(text, target, terms),
        }


@dataclass(slots=True)
class Played:
    """Episodes that have ended, N."""

    observations: list[Observation]
    """what was answered last"""
    texts: list[str]
    """the last answers"""
    rewards: NDArray[np.float64]
    """of whole episodes"""
    infos: dict[str, Any]
    """of the last step, also of environments beyond N"""


def _played(agent: Agent, envs: VisualTaskVectorEnv, indices: Sequence[int], greedy: bool) -> Played:
    """Shows some samples, and plays their episodes to the end.

    Raises:
        SampleError: One cannot be shown.
    """
    filled = [indices[min(i, len(indices) - 1)] for i in range(envs.num_groups)]
    batch, _ = envs.reset(options={"index": filled})
    observations = unbatch(batch)[: len(indices) * envs.group_size]
    try:
        if envs.max_turns > 1 or not greedy:
            rollout = agent.rollout(observations, greedy=True) if greedy else agent.rollout(observations)
            return play(agent, envs, observations, rollout, greedy=greedy)
        texts = agent.act(observations)
    except PromptError as error:
        raise envs.fault(error.index, error.reason) from error
    _, rewards, _, _, infos = _stepped(envs, texts)
    return Played(observations, texts, rewards[: len(texts)], infos)


def play(
    agent: Agent,
    envs: VisualTaskVectorEnv,
    observations: Sequence[Observation],
    rollout: Rollout,
    *,
    greedy: bool = False,
) -> Played:
    """Plays episodes to their ends.

    Args:
        agent: Who answers.
        envs: The environments after a reset. Those beyond the observations get empty answers.
        observations: What the first of them show.
        rollout: The agent's first answers.
        greedy: Whether to take the likeliest tokens or to sample.

    Raises:
        PromptError: A turn cannot be encoded.
    """
    count, rewards = len(observations), np.zeros(len(observations))
    while True:
        batch, reward, terminated, truncated, infos = _stepped(envs, rollout.texts)
        rewards += reward[:count]
        shown, ended = unbatch(batch)[:count], (terminated | truncated)[:count]
        if ended.all():
            return Played(shown, rollout.texts, rewards, infos)
        rollout = agent.proceed(rollout, next_turns(shown, ended), greedy=greedy)


def _stepped(envs: VisualTaskVectorEnv, texts: Sequence[str]) -> Any:
    """One step, with empty answers for the environments beyond the texts."""
    return envs.step([*texts, *[""] * (envs.num_envs - len(texts))])


def sample_count(envs: VisualTaskVectorEnv, limit: int | None) -> int:
    """How many samples to measure on: all of a file, 512 of an endless stream, or `limit` if that is less."""
    size = envs.task.source.size
    if size is None:
        return limit or DEFAULT_LIMIT
    return size if limit is None else min(limit, size)


Answers = Sequence[Mapping[str, Any]]


def differences(task: VisualTaskEnv | None, before: Answers, after: Answers) -> dict[str, Interval]:
    """Paired differences of metrics between two evaluations, over the samples that both have answered.

    Metrics of the set as a whole, such as average precision, have those that the task's `compare` gives.

    Args:
        task: The task. None: only means of measures are compared.
        before: `Evaluation.answers`; without a task `index`, `measures` and `subject` are enough.
        after: Those of the other evaluation, with their targets.
    """
    pairs = _paired(before, after)
    names = [name for name in pairs[0][0]["measures"] if name in pairs[0][1]["measures"]] if pairs else []
    found = {name: _difference(pairs, name) for name in names}
    for name, (over, under) in (task.ratios if task is not None else {}).items():
        if over in found and under in found:
            found[name] = _difference(pairs, over, under)
    for subject in sorted({first.get("subject", "") for first, _ in pairs} - {""}):
        if "accuracy" in found:
            own = [pair for pair in pairs if pair[0].get("subject", "") == subject]
            found[f"accuracy/{subject}"] = _difference(own, "accuracy")
    if task is not None and pairs:
        earlier, later = ([pair[which]["prediction"] for pair in pairs] for which in (0, 1))
        found |= task.compare(earlier, later, [one["target"] for _, one in pairs], [one["index"] for _, one in pairs])
    return found


def _paired(before: Answers, after: Answers) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """The answers of two evaluations to the same samples, in order."""
    waiting: dict[int, deque[Mapping[str, Any]]] = defaultdict(deque)
    for answer in before:
        waiting[answer["index"]].append(answer)
    return [(waiting[answer["index"]].popleft(), answer) for answer in after if waiting[answer["index"]]]


def _difference(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], over: str, under: str = "") -> Interval:
    """The paired difference of a mean, or of a ratio of two measures."""

    def rows(which: int) -> tuple[list[float], list[float]]:
        measures = [pair[which]["measures"] for pair in pairs]
        return [one[over] for one in measures], [one[under] if under else 1.0 for one in measures]

    return paired_interval(rows(0), rows(1), clusters=[first["index"] for first, _ in pairs])


INTERVALS = "95 % intervals: Wilson's for proportions, else by bootstrap over samples"
"""What tables say of their intervals."""


def metrics_table(
    title: str,
    columns: dict[str, Evaluation],
    changes: Mapping[str, Interval] | None = None,
    width: int | None = None,
) -> Table:
    """A table of metrics with their 95 % intervals: a row each, and a column for each evaluation.

    Args:
        title: Its title.
        columns: The evaluations by name.
        changes: Paired differences for a last column. Default: no such column.
        width: Width of the console. A wider table has its intervals below their values. Default: any width.
    """
    table = _metrics_table(title, columns, changes, " ")
    wide = PlainConsole(width=10_000)
    fits = width is None or Measurement.get(wide, wide.options, table).maximum <= width
    return table if fits else _metrics_table(title, columns, changes, "\n")


def _metrics_table(
    title: str, columns: Mapping[str, Evaluation], changes: Mapping[str, Interval] | None, gap: str
) -> Table:
    paired = "; the change is of the same samples" if changes is not None else ""
    caption = f"{INTERVALS}{paired}" + "".join(
        f"; {name}: {one.unparsable} of {len(one.answers)} answers unparsable"
        for name, one in columns.items()
        if one.unparsable is not None
    )
    last = [] if changes is None else ["change"]
    whole = changes is not None  # else the columns' names may be long folders
    values = [Column(styled(name), no_wrap=whole) for name in (*columns, *last)]
    table = PlainTable("metric", *values, title=title, caption=caption)
    for name in dict.fromkeys(name for one in columns.values() for name in one.metrics):
        cells = [written(one.metrics[name], gap=gap) if name in one.metrics else "" for one in columns.values()]
        table.add_row(name, *cells, *[_change(name, columns, changes or {}, gap) for _ in last])
    return table


def _change(name: str, columns: Mapping[str, Evaluation], changes: Mapping[str, Interval], gap: str) -> str:
    """The paired difference with its interval; without one, the plain difference of the last from the first column."""
    if name in changes:
        return written(changes[name], "+.3f", gap)
    first, *_, last = columns.values()
    if name in first.metrics and name in last.metrics:
        return f"{last.metrics[name].value - first.metrics[name].value:+.3f}"
    return ""


def written(metric: Interval, form: str = ".3f", gap: str = " ") -> str:
    """A metric with its interval, for tables."""
    if math.isnan(metric.low):
        return format(metric.value, form)
    return f"{metric.value:{form}}{gap}({metric.low:{form}} to {metric.high:{form}})"


_SKIPPED = "skipped.json"


def write_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Writes answers.jsonl and then metrics.json, so that where the latter is there all is.

    Samples that were left out stand in skipped.json, with place and reason by index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if evaluation.skipped:
        write_atomic(folder / _SKIPPED, json.dumps(dict(evaluation.skipped), indent=2) + "\n")
    write_atomic(folder / "answers.jsonl", "".join(json.dumps(answer) + "\n" for answer in evaluation.answers))
    write_atomic(folder / "metrics.json", json.dumps(evaluation.as_json(), indent=2) + "\n")


def read_evaluation(folder: Path, task: VisualTaskEnv) -> Evaluation:
    """The inverse of `write_evaluation`, without targets. Predictions are read from the completions again.

    Raises:
        DataError: A file is damaged.
        OSError: A file cannot be read.
    """
    answers = read_objects(folder / "answers.jsonl")
    for number, answer in enumerate(answers, 1):
        if not {"completion", "index", "measures"} <= answer.keys():
            raise DataError(f"{folder / 'answers.jsonl'}:{number} is damaged: it is no answer")
        answer["prediction"] = task.parse(answer["completion"])
        answer.pop("target", None)  # JSON is not what a task compares with
    file = folder / _SKIPPED
    skipped = read_object(file) if file.is_file() else {}
    by_index = {int(index) if index.isdecimal() else index: reason for index, reason in skipped.items()}
    return Evaluation(read_metrics(folder), answers, by_index)


def read_metrics(folder: Path) -> dict[str, Interval]:
    """The metrics that `write_evaluation` has written into a folder.

    Raises:
        DataError: The file is damaged.
        OSError: It cannot be read.
    """
    file = folder / "metrics.json"
    try:
        numbers = {
            name: [math.nan if metric[part] is None else float(metric[part]) for part in Interval._fields]
            for name, metric in read_object(file).items()
        }
    except (TypeError, KeyError, ValueError) as error:
        raise DataError(f"{file} is damaged: it holds no metrics") from error
    return {name: Interval(*parts) for name, parts in numbers.items()}
