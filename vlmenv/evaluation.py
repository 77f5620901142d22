"""Measures how well an agent answers: `vlmenv eval`, and the tables before and after training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from vlmenv.agents.base import Agent
from vlmenv.algos.trainer import names_sample
from vlmenv.core.errors import ConfigError
from vlmenv.core.rollout import unbatch
from vlmenv.envs.base import mean_metrics
from vlmenv.envs.vector import VisualTaskVectorEnv
from vlmenv.tasks import TaskConfig, check_device, load_agent, make_envs

DEFAULT_LIMIT = 512


@dataclass(frozen=True)
class EvalConfig(TaskConfig):
    """Measure how well a model answers."""

    config: Path | None = None
    """YAML file of options; those on the command line win."""
    split: Literal["train", "eval"] | None = None
    """Of the built-in samples; "eval" where left out. A data set file has none."""
    limit: int | None = None
    """At most so many samples, the first ones; of the built-in ones 512 where left out."""
    samples: int | None = None
    """So many sampled answers to each question, at `temperature`, instead of one greedy one."""
    batch_size: int = 64
    """Answers generated at a time."""
    output: Path | None = None
    """Folder for metrics.json and answers.jsonl."""

    def __post_init__(self) -> None:
        for name in ("limit", "samples", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        super().__post_init__()
        if self.samples is not None and self.temperature <= 0:
            raise ConfigError(
                f"temperature must be above 0, not {self.temperature}: sampled answers would all be alike"
            )


@dataclass(slots=True)
class Evaluation:
    """Answers to a fixed set of samples."""

    metrics: dict[str, float]
    answers: list[dict[str, Any]]
    """one each, with `id`, `index`, `prompt`, `completion`, `prediction`, `target` and `measures`"""


def evaluate(
    agent: Agent, envs: VisualTaskVectorEnv, count: int, *, greedy: bool, title: str, console: Console | None = None
) -> Evaluation:
    """Answers the first `count` samples of an environment's source.

    Args:
        agent: Who answers.
        envs: Their groups are filled with the answers to one sample each.
        count: Number of samples.
        greedy: Whether to take the likeliest tokens or to sample.
        title: What the progress bar says.
        console: Where it is shown.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    answers: list[dict[str, Any]] = []
    with Progress(*columns, transient=True, console=console) as progress:
        bar = progress.add_task(title, total=count)
        for start in range(0, count, envs.num_groups):
            stop = min(start + envs.num_groups, count)
            answers += _answer(agent, envs, range(start, stop), greedy)
            progress.advance(bar, stop - start)
    return Evaluation(mean_metrics([answer["measures"] for answer in answers]), answers)


def _answer(agent: Agent, envs: VisualTaskVectorEnv, indices: range, greedy: bool) -> Iterator[dict[str, Any]]:
    """Answers some samples; environments beyond them are left with empty answers."""
    filled = [indices[min(i, len(indices) - 1)] for i in range(envs.num_groups)]
    batch, infos = envs.reset(options={"index": filled})
    observations = unbatch(batch)[: len(indices) * envs.group_size]
    with names_sample(infos):
        texts = agent.act(observations) if greedy else agent.rollout(observations).texts
    _, _, _, _, infos = envs.step(texts + [""] * (envs.num_envs - len(texts)))
    for i, text in enumerate(texts):
        target, prediction = infos["target"][i], infos["prediction"][i]
        yield {
            "id": infos["id"][i],
            "index": int(infos["index"][i]),
            "prompt": observations[i]["prompt"],
            "completion": text,
            "prediction": prediction,
            "target": target,
            "measures": envs.task.measure(text, target),
        }


def sample_count(envs: VisualTaskVectorEnv, limit: int | None) -> int:
    """How many samples to measure on: all of a file, 512 of an endless stream, or `limit` if that is less."""
    size = envs.task.source.size
    if size is None:
        return limit or DEFAULT_LIMIT
    return size if limit is None else min(limit, size)


def metrics_table(title: str, columns: dict[str, dict[str, float]]) -> Table:
    """A table of metrics, a row each, with a column for each of several evaluations."""
    table = Table("metric", *columns, title=title, title_justify="left")
    for name in next(iter(columns.values())):
        table.add_row(name, *(f"{metrics[name]:.3f}" for metrics in columns.values()))
    return table


def write_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Writes metrics.json and answers.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(evaluation.metrics, indent=2) + "\n", encoding="utf-8")
    with (folder / "answers.jsonl").open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(answer) + "\n" for answer in evaluation.answers)


def run_evaluation(config: EvalConfig) -> Evaluation:
    """`vlmenv eval`."""
    check_device(config.device)
    split = config.split if config.dataset is not None else config.split or "eval"
    group_size = config.samples or 1
    envs = make_envs(
        config.env,
        max(1, config.batch_size // group_size) * group_size,
        group_size=group_size,
        dataset=config.dataset,
        image_root=config.image_root,
        split=split,
        **config.env_arguments(),
    )
    device = Accelerator(cpu=config.device == "cpu").device
    agent = load_agent(config.model, device, config.temperature, config.max_new_tokens)
    agent.seed(config.seed)
    count = sample_count(envs, config.limit)
    evaluation = evaluate(agent, envs, count, greedy=config.samples is None, title="evaluating")
    envs.close()
    if config.output is not None:
        write_evaluation(evaluation, config.output)
    how = "greedy" if config.samples is None else f"{config.samples} sampled answers each"
    Console().print(metrics_table(f"{config.env}, {count} samples, {how}", {config.model: evaluation.metrics}))
    return evaluation
