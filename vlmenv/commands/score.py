"""`vlmenv score`: scores existing answers with every reward term."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import track
from rich.table import Table

from vlmenv.core.console import PlainTable, open_console, say
from vlmenv.core.errors import ConfigError, DataError, require
from vlmenv.core.files import parse_json, write_atomic
from vlmenv.core.loading import import_modules
from vlmenv.envs.base import VisualTaskEnv
from vlmenv.envs.data.source import Sample
from vlmenv.envs.making import make_envs
from vlmenv.envs.metrics.intervals import metric_interval
from vlmenv.envs.rewards.workers import LOSSES
from vlmenv.envs.scoring import Score
from vlmenv.options.parsing import parse_plain
from vlmenv.options.score import ScoreConfig

_ANSWERS: Final = ("completion", "response", "answer", "prediction", "output")
"""Names under which a line may hold its answer; the first one counts."""
_BATCH: Final = 256
_SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a file of answers."""

    place: str
    text: str
    content: Mapping[str, Any]


def parse(args: Sequence[str], program: str) -> ScoreConfig:
    """The options of a command line."""
    config: ScoreConfig = parse_plain(args, ScoreConfig(answers=Path()), program)
    if config.answers == Path():
        raise ConfigError("name the file of answers, as in `vlmenv score answers.jsonl --dataset rec.jsonl`")
    import_modules(config.imports)
    return config


def run(config: ScoreConfig) -> list[dict[str, Any]]:
    """Scores the answers, prints a table, and returns a record for each."""
    lines = _read(config)
    arguments = config.data.arguments() | config.prompts.task_arguments()
    if config.prompts.coordinates == "auto":
        arguments["coordinates"] = "original"
    console, former = open_console(), LOSSES.snapshot()
    with closing(make_envs(config.env, 1, extra_terms=config.scorers.terms(), **arguments)) as envs:
        require(
            envs.max_turns == 1,
            f"{config.env} has episodes of several turns, and a line is one answer: give --max-turns 1",
        )
        records = list(_scored(envs.task, lines, config, console))
    console.print(_table(config, records))
    if told := LOSSES.since(former).told():
        say(told, console)
    if config.verdict is not None:
        _compare(records, config.verdict, console)
    if config.output is not None:
        write_atomic(config.output, "".join(json.dumps(record) + "\n" for record in records))
        say(f"each answer's terms are in {config.output}", console)
    return records


def _read(config: ScoreConfig) -> list[Line]:
    try:
        rows = config.answers.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{config.answers}: cannot be read: {error}") from error
    return [_line(config, f"{config.answers}:{number}", row) for number, row in enumerate(rows, 1) if row.strip()]


def _line(config: ScoreConfig, place: str, row: str) -> Line:
    try:
        content = parse_json(row)
    except ValueError as error:
        raise DataError(f"{place}: the line is not JSON: {error}") from error
    if isinstance(content, str):
        content = {"completion": content}
    if not isinstance(content, dict):
        raise DataError(f"{place}: a line is an object with an answer, or a text")
    names = [config.column] if config.column is not None else _ANSWERS
    text = next((content[name] for name in names if isinstance(content.get(name), str)), None)
    if text is None:
        raise DataError(
            f"{place}: no answer under {', '.join(names)}; it has {', '.join(map(str, content))}: name one by --column"
        )
    if config.verdict is not None and not isinstance(content.get(config.verdict), bool | int | float):
        raise DataError(f"{place}: no verdict under '{config.verdict}': it must be true, false or a number")
    return Line(place, text, content)


def _scored(
    task: VisualTaskEnv, lines: Sequence[Line], config: ScoreConfig, console: Console
) -> Iterator[dict[str, Any]]:
    """A record for each line, in batches."""
    indices = _indices(task, lines)
    for start in track(range(0, len(lines), _BATCH), "scoring", transient=True, console=console):
        part = lines[start : start + _BATCH]
        samples = [task.source.get(index) for index in indices[start : start + _BATCH]]
        texts = [task.answer_format.write(line.text) if config.bare else line.text for line in part]
        for line, text, sample, score in zip(part, texts, samples, task.score_batch(texts, samples), strict=True):
            yield _record(task, line, text, sample, score, config)


def _record(
    task: VisualTaskEnv, line: Line, text: str, sample: Sample, score: Score, config: ScoreConfig
) -> dict[str, Any]:
    told = task.explain(score, sample)
    verdict = {} if config.verdict is None else {config.verdict: line.content[config.verdict]}
    parts = {"id": sample.id, "completion": text, "reward": score.reward, "rewards": told["rewards"]}
    return parts | {"prediction": _plain(told["prediction"]), "target": _plain(told["target"])} | verdict


def _plain(value: Any) -> Any:
    try:
        json.dumps(value)
    except TypeError:
        return str(value)
    return value


def _indices(task: VisualTaskEnv, lines: Sequence[Line]) -> list[int]:
    """The sample that each line answers: by index, by id, or line by line.

    Raises:
        DataError: A line names no sample of the data set, or the numbers of lines and samples differ.
    """
    if all("index" in line.content for line in lines):
        return [_checked(line, line.content["index"], task.source.size) for line in lines]
    size = task.source.size
    if size is None:
        raise DataError("the built-in samples have no end: give the 'index' of a sample in each line")
    if all("id" in line.content for line in lines):
        known = {task.source.get(index).id: index for index in range(size)}
        for line in lines:
            if str(line.content["id"]) not in known:
                raise DataError(f"{line.place}: no sample has the id '{line.content['id']}'")
        return [known[str(line.content["id"])] for line in lines]
    if len(lines) != size:
        raise DataError(f"{len(lines)} answers, but {size} samples: give the 'id' or 'index' of a sample in each line")
    return list(range(size))


def _checked(line: Line, index: Any, size: int | None) -> int:
    if not isinstance(index, int) or index < 0 or (size is not None and index >= size):
        raise DataError(f"{line.place}: there is no sample {index!r}")
    return index


def _table(config: ScoreConfig, records: Sequence[Mapping[str, Any]]) -> Table:
    title = f"{config.answers} for {config.env}, {len(records)} answers"
    table = PlainTable("term", "mean", "95 % interval", title=title)
    names = list(dict.fromkeys(name for record in records for name in record["rewards"]))
    for name in ["reward", *names]:
        values = [record["reward"] if name == "reward" else record["rewards"].get(name) for record in records]
        found = metric_interval([value for value in values if value is not None])
        table.add_row(name, f"{found.value:.4f}", f"{found.low:.4f} to {found.high:.4f}")
    return table


def _compare(records: Sequence[Mapping[str, Any]], verdict: str, console: Console) -> None:
    """Prints the agreement of a verdict with the first reward term, and the first answers in which they differ."""
    term = next(iter(records[0]["rewards"])) if records else ""
    other = [record for record in records if (record["rewards"].get(term, 0) >= 0.5) != (float(record[verdict]) >= 0.5)]
    share = 1 - len(other) / max(1, len(records))
    told = f"'{verdict}' agrees with {term} on {share:.1%} of {len(records)} answers"
    say(told, console)
    for record in other[:_SHOWN]:
        values = f"{term} {record['rewards'].get(term)}, {verdict} {record[verdict]}"
        told = f"  {record['id']}: {values}: {record['completion'][:200]}"
        say(told, console)
    if len(other) > _SHOWN:
        say(f"  … and {len(other) - _SHOWN} more; --output writes all", console)
