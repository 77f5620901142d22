"""`vlmenv sample`: sorts the samples of a data set into easy, medium and hard for a model."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table

from vlmenv.agents.base import Agent
from vlmenv.building import (
    DTYPES,
    load_agent,
    prepared,
    report_broken_rows,
    report_skipped,
    report_untaught,
    task_arguments,
)
from vlmenv.core.console import PlainTable, say
from vlmenv.core.errors import ConfigError, DataError, require
from vlmenv.core.files import read_objects, write_atomic
from vlmenv.envs.data.dataset import Concatenated, TableSource
from vlmenv.envs.data.tables import Rows
from vlmenv.envs.export import export_sample
from vlmenv.envs.making import make_envs
from vlmenv.envs.rewards.workers import LOSSES, Losses
from vlmenv.envs.vector import VisualTaskVectorEnv
from vlmenv.evaluation import answer_samples, progress, sample_count
from vlmenv.options.command_line import Asked, parse_with_files
from vlmenv.options.evaluate import SampleConfig
from vlmenv.processes import Processes, leave
from vlmenv.processes.failures import shared_failure
from vlmenv.runs.claim import alone_in, claim
from vlmenv.runs.data import row_digests
from vlmenv.runs.fitting import fit_prompts
from vlmenv.runs.models import with_checkpoint

LEVELS: Final = ("easy", "medium", "hard")


def parse(args: Sequence[str], program: str) -> Asked:
    """The options of a command line."""
    return parse_with_files(args, lambda algo: SampleConfig(), program)


def run(asked: Asked) -> Path:
    """Samples completions, and returns the folder with the files."""
    config: SampleConfig = asked.config
    if config.output is None:
        raise ConfigError("output is missing: name the folder for the files")
    processes, console = prepared(config, asked.notes)
    with alone_in(config.output, processes.accelerator, console):
        return _sample(config, processes, console)


def _sample(config: SampleConfig, processes: Processes, console: Console) -> Path:
    config = with_checkpoint(config, console)
    assert config.output is not None
    accelerator, parts = processes.accelerator, config.output / "parts"
    groups = max(1, config.batch_size // config.n)
    data = config.data.arguments()
    envs = make_envs(config.env, groups * config.n, group_size=config.n, **data, **task_arguments(config))
    require(not envs.task.unrepeatable, f"{envs.task.unrepeatable}, so no data set can hold its samples")
    fit_prompts(config, envs, accelerator, console, first=config.eval_limit)
    report_broken_rows(envs, console)
    report_untaught(config, console)
    count = sample_count(envs, config.eval_limit)
    with shared_failure(accelerator):
        if accelerator.is_main_process:
            claim(config.output, config, begun=any(parts.glob("[0-9]*.jsonl")))
            parts.mkdir(exist_ok=True)
            _check_data(envs, _parts(count, config.part_size), config, console)
    former = LOSSES.snapshot()
    with closing(load_agent(config, accelerator.device, DTYPES[config.weights])) as agent, shared_failure(accelerator):
        _sample_parts(agent, envs, count, config, processes, console)
    envs.close()
    if told := Losses(answers=sum(processes.collect([LOSSES.since(former).answers]))).told():
        say(f"warning: {told}, into another folder", console)
    with shared_failure(accelerator):
        if accelerator.is_main_process:
            rates, skipped = _read_parts(config.output, _parts(count, config.part_size))
            report_skipped(skipped, count, console)
            if not rates:
                raise DataError(f"none of the {count} samples can be shown; the first: {next(iter(skipped.values()))}")
            _write_levels(envs, rates, config)
            counts = Counter(dict.fromkeys(LEVELS, 0) | Counter(map(level_of, rates.values())))
            write_atomic(config.output / "summary.json", json.dumps(counts) + "\n")
            console.print(_summary(config, envs, rates))
    leave()
    return config.output


def _parts(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _part_file(folder: Path, part: range) -> Path:
    return folder / "parts" / f"{part.start}-{part.stop}.jsonl"


def _check_data(envs: VisualTaskVectorEnv, parts: Sequence[range], config: SampleConfig, console: Console) -> None:
    """Compares the rows of parts that are there with those that they were made of, and removes parts of others.

    Raises:
        DataError: Rows have changed, and `data_changed` is not given.
    """
    assert config.output is not None
    digests = row_digests(envs.task.source)
    changed, due = list[Path](), dict[Path, str]()
    for part in parts:
        file = _part_file(config.output, part)
        kept, now = file.with_suffix(".rows"), hashlib.sha256(b"".join(islice(digests, len(part)))).hexdigest()
        if file.is_file() and kept.is_file() and kept.read_text(encoding="utf-8") != now:
            changed.append(file)
        if not file.is_file() or file in changed:
            due[kept] = now
    if changed and not config.data_changed:
        raise DataError(
            f"the data set has changed: {changed[0]} and {len(changed) - 1} other parts were made of other rows. Put "
            "it back, give another --output, or answer those samples anew with --data-changed"
        )
    for file in changed:
        file.unlink()
        say(f"the rows of {file.stem} have changed: they are answered anew", console)
    for kept, now in due.items():
        write_atomic(kept, now)


def _sample_parts(
    agent: Agent,
    envs: VisualTaskVectorEnv,
    count: int,
    config: SampleConfig,
    processes: Processes,
    console: Console,
) -> None:
    """Writes this process's share of the missing parts.

    Each part has its own seed, so neither the number of processes nor interruptions change the results.
    """
    assert config.output is not None
    own = processes.share(_parts(count, config.part_size))
    missing = [part for part in own if not _part_file(config.output, part).exists()]
    total = sum(map(len, own))
    batches = sum(-(-len(part) // envs.num_groups) for part in missing)
    most = max(processes.collect([batches * envs.max_turns]))
    done = total - sum(map(len, missing))
    with agent.generating(most), progress("sampling", total, console, done) as advance:
        for part in missing:
            agent.seed(int(np.random.SeedSequence([config.seed, part.start]).generate_state(1)[0]))
            rows: list[dict[str, Any]] = []
            for start in range(part.start, part.stop, envs.num_groups):
                indices = range(start, min(start + envs.num_groups, part.stop))
                rows += _rated(list(answer_samples(agent, envs, indices, greedy=False)), envs, config)
                advance(len(indices))
            rows += [{"index": index, "skipped": envs.skipped[index]} for index in part if index in envs.skipped]
            write_atomic(_part_file(config.output, part), "".join(json.dumps(row) + "\n" for row in rows))


def _rated(
    answers: Sequence[Mapping[str, Any]], envs: VisualTaskVectorEnv, config: SampleConfig
) -> Iterator[dict[str, Any]]:
    """The pass rate of each sample over its `n` neighbouring answers."""
    name, threshold = _right(envs, config)
    for start in range(0, len(answers), config.n):
        own = answers[start : start + config.n]
        if name not in own[0]["measures"]:
            known = ", ".join(own[0]["measures"])
            raise ConfigError(f"{config.env} has no measure '{name}': choose by --measure among {known}")
        values = [answer["measures"][name] for answer in own]
        rate = sum(value >= threshold for value in values) / config.n
        yield {"index": own[0]["index"], "id": own[0]["id"], "pass_rate": rate, name: values}


def _right(envs: VisualTaskVectorEnv, config: SampleConfig) -> tuple[str, float]:
    """The measure that decides whether an answer is right, and its least value."""
    name, threshold = envs.task.right
    return config.measure or name, threshold if config.threshold is None else config.threshold


def _read_parts(folder: Path, parts: Sequence[range]) -> tuple[dict[int, float], dict[int, str]]:
    """Pass rates by index of the sample, and the reasons why samples were left out."""
    rows = [row for part in parts for row in read_objects(_part_file(folder, part))]
    skipped = {row["index"]: row["skipped"] for row in rows if "skipped" in row}
    return {row["index"]: row["pass_rate"] for row in rows if "pass_rate" in row}, skipped


def level_of(rate: float) -> str:
    """The level of a question with this share of right answers."""
    return "easy" if rate == 1 else "hard" if rate == 0 else "medium"


def _write_levels(envs: VisualTaskVectorEnv, rates: Mapping[int, float], config: SampleConfig) -> None:
    """Writes the rows of each level in their own format; rows of built-in samples as JSONL, with their images."""
    assert config.output is not None
    source = envs.task.source
    if isinstance(source, TableSource):
        _write_rows(source, rates, config.output, "")
    elif isinstance(source, Concatenated):
        first = 0
        for number, one in enumerate(source.sources, 1):
            own = {i: rates[first + i] for i in range(one.size or 0) if first + i in rates}
            _write_rows(one, own, config.output, f"-{number}")
            first += one.size or 0
    else:
        plain = make_envs(config.env, 1, split=config.data.split).task  # whose boxes are in pixels of the images
        table = Rows([export_sample(plain, source.get(index), config.output) for index in rates])
        for level in LEVELS:
            added = {i: {"pass_rate": rate} for i, rate in enumerate(rates.values()) if level_of(rate) == level}
            table.write(config.output / f"{level}{table.suffix}", added)


def _write_rows(source: TableSource, rates: Mapping[int, float], folder: Path, mark: str) -> None:
    for level in LEVELS:
        added = {source.number(i): {"pass_rate": rate} for i, rate in rates.items() if level_of(rate) == level}
        source.table.write(folder / f"{level}{mark}{source.table.suffix}", added)


def _summary(config: SampleConfig, envs: VisualTaskVectorEnv, rates: Mapping[int, float]) -> Table:
    name, threshold = _right(envs, config)
    counts = Counter(map(level_of, rates.values()))
    caption = f"right from {name} {threshold} on; mean pass rate {np.mean(list(rates.values())):.3f}"
    title = f"{config.env}, {len(rates)} samples, {config.n} answers each at temperature {config.sampling.temperature}"
    table = PlainTable("level", "samples", "share", title=title, caption=caption)
    for level in LEVELS:
        table.add_row(level, str(counts[level]), f"{counts[level] / len(rates):.3f}")
    return table
