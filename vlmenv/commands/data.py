"""`vlmenv data check`: reads a data set as training would, and lists its faults."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import track
from rich.table import Table

from vlmenv.core.answers import Detection
from vlmenv.core.console import PlainTable, open_console, say
from vlmenv.core.errors import ConfigError
from vlmenv.core.files import write_atomic
from vlmenv.core.loading import import_modules
from vlmenv.envs.base import NoRowsError, VisualTaskEnv
from vlmenv.envs.data.boxes import BoxForm, BoxOrientation
from vlmenv.envs.data.check import BoxedRow, Convention, LookedAt, likely_convention, look_at, share
from vlmenv.envs.data.coco import CocoInstances
from vlmenv.envs.data.dataset import Concatenated, TableSource
from vlmenv.envs.data.source import Source
from vlmenv.envs.data.tables import TextFile
from vlmenv.envs.making import make_envs
from vlmenv.envs.selfcheck import check_answers, describe, some_samples
from vlmenv.options.data import DataCheckConfig
from vlmenv.options.parsing import parse_plain
from vlmenv.options.task import PromptOptions, TaskConfig

_TOLD: Final = 20
"""Number of rows that are listed for each kind of fault."""
_THREADS: Final = 8


def parse(args: Sequence[str], program: str) -> DataCheckConfig:
    """The options of a command line."""
    config: DataCheckConfig = parse_plain(args, DataCheckConfig(dataset=()), program)
    if not config.dataset:
        raise ConfigError("name the data set to check, as in `vlmenv data check rec.jsonl --env VLM-REC-v0`")
    import_modules(config.imports)
    return config


@dataclass
class Findings:
    """Findings from the rows of a data set."""

    faults: dict[str, list[str]] = field(default_factory=dict)
    """faults by their kind, with the places of the rows"""
    good: list[list[int]] = field(default_factory=list)
    """for each source, the numbers of the good rows"""
    ids: Counter[str] = field(default_factory=Counter)
    """rows by their own id"""
    sizes: Counter[str] = field(default_factory=Counter)
    """images by their size"""
    labels: Counter[str] = field(default_factory=Counter)
    """true boxes by their label"""
    boxed: list[BoxedRow] = field(default_factory=list)
    prompts: Prompts | None = None
    """their lengths, if a model is named"""

    def add(self, kind: str, fault: str) -> None:
        """Notes a fault, which names its line."""
        self.faults.setdefault(kind, []).append(fault)


def run(config: DataCheckConfig) -> None:
    """Checks a data set; ends the process with status 1 if it has a fault."""
    console = open_console()
    task, source, counted = _opened(config, console)
    found = Findings(prompts=counted)
    for fault in source.faults:
        found.add("broken", fault)
    form, orientation = config.data.boxes_in, config.data.box_orientation
    given = Convention(None if form is None else BoxForm(form), BoxOrientation(orientation))
    parts, start = _parts(source), 0
    for part in parts:
        found.good.append(list(_look_through(part, start, config, found, given, console)))
        start += part.size or 0
    _tell_faults(found, console)
    likely = likely_convention(found.boxed, given)
    _tell_boxes(found, given, likely, any(isinstance(part.table, CocoInstances) for part in parts), console)
    console.print(_summary(config, source, found))
    if config.write is not None:
        _write(config.write, parts, found.good, config.data.image_root is None, console)
    samples = some_samples(source)
    misjudged = [] if task is None else check_answers(task, samples)
    if misjudged:
        say(describe(misjudged, len(samples)), console, "red")
    if found.faults or misjudged or likely is not None:
        sys.exit(1)


@dataclass(frozen=True)
class Prompts:
    """What a model makes of the prompts."""

    told: str
    """their lengths in words"""
    faults: Mapping[int, str]
    """by sample, its place and why the model cannot take its prompt"""


def _opened(
    config: DataCheckConfig, console: Console
) -> tuple[VisualTaskEnv | None, TableSource | Concatenated, Prompts | None]:
    """The task with the data, its source, and what a model makes of the prompts if one is named.

    Without any good row there is no task, because none can be made.
    """
    arguments, count = (None, None) if config.model is None else _of_model(config)
    try:
        envs = make_envs(
            config.env,
            1,
            dataset=list(config.dataset),
            skip_broken=True,
            prompt_template=config.prompt_template,
            system_prompt=config.system_prompt,
            **config.data.reading_arguments(),
            **(arguments or {}),
        )
    except NoRowsError as error:
        return None, error.source, None
    with closing(envs):
        source = envs.task.source
        assert isinstance(source, TableSource | Concatenated)
        return envs.task, source, None if count is None else count(envs.task, console)


def _of_model(config: DataCheckConfig) -> tuple[dict[str, Any], Callable[[VisualTaskEnv, Console], Prompts]]:
    """Arguments of the environment for a model, and a function that counts the tokens of prompts."""
    from vlmenv.building import task_arguments
    from vlmenv.runs.fitting import Room, family_without_weights, prompt_faults
    from vlmenv.runs.lengths import count_tokens
    from vlmenv.runs.models import checkpoint_name

    assert config.model is not None
    prompts = PromptOptions(chat_template_kwargs=config.chat_template_kwargs)
    task = TaskConfig(env=config.env, model=checkpoint_name(config.model), prompts=prompts, pixels=config.pixels)
    family, own = family_without_weights(task), task_arguments(task)
    room = Room.of_model(family, config.max_new_tokens, config.engine_length)

    def count(task: VisualTaskEnv, console: Console) -> Prompts:
        lengths = count_tokens(task, family, console)
        return Prompts(f"{lengths}; there is room for {room.prompt:,}", dict(prompt_faults(task, lengths, room)))

    return {name: own[name] for name in ("coordinates", "resize", "image_bound")}, count


def _parts(source: Source) -> Sequence[TableSource]:
    if isinstance(source, Concatenated):
        return source.sources
    assert isinstance(source, TableSource)
    return [source]


def _look_through(
    source: TableSource, start: int, config: DataCheckConfig, found: Findings, given: Convention, console: Console
) -> Iterator[int]:
    """Checks all rows of a source, whose first sample is number `start`; returns the numbers of the good rows."""
    indices = {source.number(index): index for index in range(source.size or 0)}
    refused = {} if found.prompts is None else found.prompts.faults
    looked = _looked_at(source, indices, config.decode)
    for one in track(looked, "reading rows", source.total, transient=True, console=console):
        faults = [("image", fault) for fault in one.faults]
        if one.row is not None:
            _count(one, found)
        if one.boxed is not None and (misfit := given.misfit(one.boxed)):
            faults.append(("box", f"{one.boxed.place}: {misfit}"))
        elif one.beyond is not None:
            faults.append(("place", one.beyond))
        if one.number in indices and not one.faults and start + indices[one.number] in refused:
            faults.append(("prompt", refused[start + indices[one.number]]))
        for kind, fault in faults:
            found.add(kind, fault)
        if one.number in indices and not faults:
            yield one.number


def _looked_at(source: TableSource, indices: dict[int, int], decode: bool) -> Iterator[LookedAt]:
    """Rows in their order, several read at a time."""
    numbers = iter(range(source.total))
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="vlmenv-check") as pool:
        while some := list(islice(numbers, 4 * _THREADS)):
            yield from pool.map(lambda number: look_at(source, number, indices.get(number), decode=decode), some)


def _count(one: LookedAt, found: Findings) -> None:
    assert one.row is not None
    if any(part == "id" for part, _ in one.row.used):
        found.ids[one.row.id] += 1
    if one.sample is not None:
        found.sizes.update(f"{width} x {height}" for width, height in one.sample.full_sizes)
        truth = one.sample.target if isinstance(one.sample.target, tuple) else ()
        found.labels.update(box.label for box in truth if isinstance(box, Detection))
    if one.boxed is not None:
        found.boxed.append(one.boxed)


_KINDS: Final = {
    "broken": "cannot be read",
    "image": "image unusable",
    "box": "boxes beyond the image",
    "place": "points, corners or spans beyond the image or video",
    "prompt": "refused by the model",
}


def _tell_faults(found: Findings, console: Console) -> None:
    for kind, faults in found.faults.items():
        for fault in faults[:_TOLD]:
            say(fault, console, "red")
        if len(faults) > _TOLD:
            say(f"… and {len(faults) - _TOLD} more rows: {_KINDS[kind]}", console, "red")


def _tell_boxes(found: Findings, given: Convention, likely: Convention | None, is_coco: bool, console: Console) -> None:
    """Names the convention of the boxes, if it is not the given one."""
    rows = [row for row in found.boxed if row.numbers]
    if likely is None:
        return
    now, then = (round(len(rows) * share(rows, lambda row: one.misfit(row) is None)) for one in (given, likely))  # noqa: B023
    changes = []
    if likely.form != given.form:
        changes.append((_FORMS[likely.form or BoxForm.XYXY], f"--boxes-in {likely.form}"))
    if likely.orientation != given.orientation:
        of = f"the image as it is {likely.orientation}, where EXIF turns it"
        changes.append((of, f"--box-orientation {likely.orientation}"))
    what, how = (" and of ".join(parts) for parts in zip(*changes, strict=True))
    told = f"the boxes seem to be {'of ' if likely.form == given.form else ''}{what}: "
    told += f"{now} of {len(rows)} rows fit their image as they are read, {then} would then. "
    told += "COCO's boxes are x, y, width and height in pixels: rewrite them" if is_coco else f"Read them by {how}"
    say(told.replace(" and of --", " --"), console, "bold yellow")


_FORMS: Final = {
    BoxForm.XYXY: "edges in pixels",
    BoxForm.XYWH: "x, y, width and height in pixels",
    BoxForm.FRACTIONS: "fractions of the image",
    BoxForm.NORM1000: "thousandths of the image",
}


def _summary(config: DataCheckConfig, source: TableSource | Concatenated, found: Findings) -> Table:
    table = PlainTable(title=f"{', '.join(config.dataset)} for {config.env}", show_header=False)
    table.add_row("rows", str(sum(part.total for part in _parts(source))))
    table.add_row("good", str(sum(map(len, found.good))))
    for kind, faults in found.faults.items():
        table.add_row(_KINDS[kind], str(len(faults)))
    table.add_row("made of", str(source.usage))
    if repeated := {name: count for name, count in found.ids.items() if count > 1}:
        named = ", ".join(f"{name} ({count} rows)" for name, count in list(repeated.items())[:5])
        table.add_row("duplicate ids", f"{len(repeated)}: {named}")
    if found.sizes:
        table.add_row("images read", str(found.sizes.total()))
        table.add_row("most frequent sizes", _frequent(found.sizes))
    if found.prompts is not None:
        table.add_row("prompts", found.prompts.told)
    if found.labels:
        table.add_row("labels", f"{len(found.labels)}, of {found.labels.total()} boxes")
        table.add_row("most frequent labels", _frequent(found.labels))
    return table


def _frequent(counts: Counter[str]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in counts.most_common(5))


def _write(
    file: Path, parts: Sequence[TableSource], good: Sequence[Sequence[int]], own_root: bool, console: Console
) -> None:
    """Writes the good rows of all sources, in the format of each source."""
    tables = [part.table for part in parts]
    total = sum(map(len, good))
    if total == 0:
        raise ConfigError(f"no row is good: {file} is not written")
    if file.suffix == ".jsonl" and all(isinstance(table, TextFile) for table in tables):
        rows = (table.read(number) for table, own in zip(tables, good, strict=True) for number in own)
        write_atomic(file, "".join(json.dumps(row) + "\n" for row in rows))
    elif len(tables) == 1 and file.suffix == tables[0].suffix:
        tables[0].write(file, {number: {} for number in good[0]})
    else:
        suffixes = ", ".join(sorted({table.suffix for table in tables}))
        raise ConfigError(f"{file}: good rows are written in their own format, {suffixes}, or rows of JSON as .jsonl")
    say(f"{total} good rows are in {file}", console)
    if own_root and file.absolute().parent != Path(parts[0].root).absolute():
        say(f"their images are read by --image-root {parts[0].root}", console)
