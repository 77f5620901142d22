"""What a run on several tasks does task by task: evaluation, its files, and what has changed.

A run on a single task is the case of one task without a name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from vlmenv.algos import Trainer
from vlmenv.core.errors import DataError
from vlmenv.envs.base import VisualTaskEnv
from vlmenv.envs.metrics.intervals import Interval
from vlmenv.envs.mixed import MixedVectorEnv, by_task
from vlmenv.envs.vector import VisualTaskVectorEnv
from vlmenv.evaluation import Answers, Evaluation, differences, evaluate, read_evaluation, sample_count

Envs = VisualTaskVectorEnv | MixedVectorEnv

MEAN: Final = "mean of tasks"
"""The first metric of a mix: the mean of the tasks' first metrics, by the weights of the mix."""


def labelled(name: str, what: str) -> str:
    """A metric or file of a task with the task's name before it."""
    return f"{name}/{what}" if name else what


def told_of(name: str) -> str:
    """The beginning of a message about a task of a mix."""
    return f"{name}: " if name else ""


def picture_of(name: str, picture: str) -> str:
    """The file of a task's picture: samples.png, or samples-NAME.png in a mix."""
    stem, _, kind = picture.partition(".")
    return f"{stem}-{name}.{kind}" if name else picture


def history_of(history: Sequence[Mapping[str, float]], name: str) -> list[dict[str, float]]:
    """The metrics of one task of a mix by the names that they have in a run on it alone."""
    starts = {f"task/{name}/": "", f"eval/{name}/": "eval/"}
    return [
        {
            own + metric.removeprefix(start): value
            for start, own in starts.items()
            for metric, value in one.items()
            if metric.startswith(start)
        }
        for one in history
    ]


def evaluate_tasks(
    trainer: Trainer,
    envs: Envs,
    limit: int,
    *,
    title: str,
    console: Console,
    check: Callable[[], None],
) -> Evaluation:
    """Measures the present weights on each task.

    Args:
        trainer: The trainer, whose agent answers greedily.
        envs: Environments to measure in.
        limit: Largest number of samples of each task.
        title: Title of the progress bar.
        console: Console of the bar.
        check: Called before each batch; an error that it raises ends the evaluation.
    """
    found = {
        name: evaluate(
            trainer.agent,
            own,
            sample_count(own, limit),
            greedy=True,
            title=f"{title}, {name}" if name else title,
            console=console,
            processes=trainer.processes,
            check=check,
        )
        for name, own in by_task(envs).items()
    }
    return joined(found, envs) if isinstance(envs, MixedVectorEnv) else found[""]


def joined(found: Mapping[str, Evaluation], envs: MixedVectorEnv) -> Evaluation:
    """The evaluations of a mix's tasks as one: metrics by TASK/METRIC, after the mean of the tasks' first ones."""
    metrics = {MEAN: _mean({name: next(iter(one.metrics.values())) for name, one in found.items()}, envs.weights)}
    answers: list[dict[str, Any]] = []
    skipped: dict[int | str, str] = {}
    for name, one in found.items():
        metrics |= {labelled(name, metric): value for metric, value in one.metrics.items()}
        answers += [{"task": name, **answer, **_judged(envs.tasks[name].task, answer)} for answer in one.answers]
        skipped |= {labelled(name, str(index)): reason for index, reason in one.skipped.items()}
    return Evaluation(metrics, answers, skipped)


def _mean(firsts: Mapping[str, Interval], weights: Mapping[str, float]) -> Interval:
    """The weighted mean of independent figures, with the interval that theirs give."""
    whole = sum(weights[name] for name in firsts)
    shares = {name: weights[name] / whole for name in firsts}
    value = sum(shares[name] * one.value for name, one in firsts.items())
    below = sum((shares[name] * (one.value - one.low)) ** 2 for name, one in firsts.items()) ** 0.5
    above = sum((shares[name] * (one.high - one.value)) ** 2 for name, one in firsts.items()) ** 0.5
    return Interval(value, value - below, value + above)


def _judged(task: VisualTaskEnv, answer: Mapping[str, Any]) -> dict[str, Any]:
    """What a report asks of an answer, and knows of a single task."""
    name, least = task.right
    measured = answer["measures"].get(name)
    reward = sum(weight * answer["rewards"].get(term, 0.0) for term, weight in task.rewards.items())
    return {"reward": reward, "right": None if measured is None else bool(measured >= least)}


def answers_to(evaluation: Evaluation, name: str) -> Evaluation:
    """The evaluation with the answers to one task alone."""
    return replace(evaluation, answers=[one for one in evaluation.answers if one.get("task", "") == name])


def read_tasks(folder: Path, envs: Envs) -> Evaluation:
    """Reads an evaluation again, each task its own answers; see `read_evaluation`.

    Raises:
        DataError: A file is damaged, or of other tasks.
    """
    tasks = {name: own.task for name, own in by_task(envs).items()}
    found = read_evaluation(folder, next(iter(tasks.values())))
    if others := {one.get("task", "") for one in found.answers} - tasks.keys():
        raise DataError(f"{folder} has answers to other tasks: {', '.join(sorted(map(str, others)))}")
    for answer in found.answers if isinstance(envs, MixedVectorEnv) else ():
        answer["prediction"] = tasks[answer["task"]].parse(answer["completion"])
    return found


def differences_by_task(envs: Envs, before: Answers, after: Answers) -> dict[str, Interval]:
    """Paired differences of metrics on each task."""
    found: dict[str, Interval] = {}
    for name, own in by_task(envs).items():
        mine = [[one for one in answers if one.get("task", "") == name] for answers in (before, after)]
        found |= {labelled(name, metric): value for metric, value in differences(own.task, *mine).items()}
    return found
