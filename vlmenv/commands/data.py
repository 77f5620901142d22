"""`vlmenv data check`: reads a data set as training would, and lists its faults."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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
from vlmenv.core.errors import ConfigError
from vlmenv.core.files import write_atomic
from vlmenv.core.loading import import_modules
from vlmenv.core.rollout import Observation
from vlmenv.core.text import printable
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

    def add(self, kind: str, fault: str) -> None:
        self.faults.setdefault(kind, []).append(fault)


def run(config: DataCheckConfig) -> None:
    """Checks a data set; ends the process with status 1 if it has a fault."""
    task, source, is_taken = _opened(config)
    found = Findings()
    for fault in source.faults:
        found.add("broken", fault)
    form, orientation = config.data.boxes_in, config.data.box_orientation
    given = Convention(None if form is None else BoxForm(form), BoxOrientation(orientation))
    parts = _parts(source)
    for part in parts:
        found.good.append(list(_look_through(part, config, found, given, task, is_taken)))
    console = Console(soft_wrap=True)
    _tell_faults(found, console)
    likely = likely_convention(found.boxed, given)
    _tell_boxes(found, given, likely, any(isinstance(part.table, CocoInstances) for part in parts), console)
    console.print(_summary(config, source, found))
    if config.write is not None:
        _write(config.write, parts, found.good, config.data.image_root is None, console)
    samples = some_samples(source)
    misjudged = [] if task is None else check_answers(task, samples)
    if misjudged:
        console.print(printable(describe(misjudged, len(samples))), style="red", highlight=False, emoji=False)
    if found.faults or misjudged or likely is not None:
        sys.exit(1)


def _opened(
    config: DataCheckConfig,
) -> tuple[VisualTaskEnv | None, TableSource | Concatenated, Callable[[Observation], str | None]]:
    """The task with the data, its source, and a function that says why a model cannot take an observation.

    Without any good row there is no task, because none can be made.
    """
    arguments, is_taken = _of_model(config) if config.model is not None else ({}, _takes_all)
    try:
        envs = make_envs(
            config.env,
            1,
            dataset=list(config.dataset),
            skip_broken=True,
            prompt_template=config.prompt_template,
            system_prompt=config.system_prompt,
            **config.data.reading_arguments(),
            **arguments,
        )
    except NoRowsError as error:
        return None, error.source, is_taken
    with closing(envs):
        source = envs.task.source
        assert isinstance(source, TableSource | Concatenated)
        return envs.task, source, is_taken


def _takes_all(_: Observation) -> str | None:
    return None


def _of_model(config: DataCheckConfig) -> tuple[dict[str, Any], Callable[[Observation], str | None]]:
    """Arguments of the environment for a model, and a function that says why its processor cannot take an
    observation."""
    from vlmenv.agents.families import weightless_family
    from vlmenv.agents.vlm import check_length
    from vlmenv.building import task_arguments
    from vlmenv.runs.models import model_folder

    assert config.model is not None
    folder = model_folder(config.model)
    prompts = PromptOptions(chat_template_kwargs=config.chat_template_kwargs)
    family = weightless_family(folder, prompts.template_switches())
    most = int(family.model.config.get_text_config().max_position_embeddings)

    def fault(observation: Observation) -> str | None:
        try:
            check_length(len(family.encode(observation).input_ids), config.max_new_tokens, most)
        except ValueError as error:
            return str(error)
        return None

    own = task_arguments(TaskConfig(env=config.env, model=str(folder)))
    return {name: own[name] for name in ("coordinates", "resize")}, fault


def _parts(source: Source) -> Sequence[TableSource]:
    if isinstance(source, Concatenated):
        return source.sources
    assert isinstance(source, TableSource)
    return [source]


def _look_through(
    source: TableSource,
    config: DataCheckConfig,
    found: Findings,
    given: Convention,
    task: VisualTaskEnv | None,
    is_taken: Callable[[Observation], str | None],
) -> Iterator[int]:
    """Checks all rows of a source, and returns the numbers of the good ones."""
    indices = {source.number(index): index for index in range(source.size or 0)}
    decode = config.decode or config.model is not None
    for one in track(_looked_at(source, indices, decode), "reading rows", source.total, transient=True):
        faults = [("image", fault) for fault in one.faults]
        if one.row is not None:
            _count(one, found)
        if one.boxed is not None and (misfit := given.misfit(one.boxed)):
            faults.append(("box", f"{one.boxed.place}: {misfit}"))
        if one.sample is not None and task is not None and (refusal := is_taken(task.observe(one.sample))):
            faults.append(("prompt", f"{source.place(indices[one.number], one.sample.id)}: {refusal}"))
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
    "prompt": "refused by the model",
}


def _tell_faults(found: Findings, console: Console) -> None:
    for kind, faults in found.faults.items():
        for fault in faults[:_TOLD]:
            console.print(printable(fault), style="red", highlight=False, emoji=False)
        if len(faults) > _TOLD:
            console.print(f"… and {len(faults) - _TOLD} more rows: {_KINDS[kind]}", style="red", highlight=False)


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
    console.print(told.replace(" and of --", " --"), style="bold yellow", highlight=False)


_FORMS: Final = {
    BoxForm.XYXY: "edges in pixels",
    BoxForm.XYWH: "x, y, width and height in pixels",
    BoxForm.FRACTIONS: "fractions of the image",
    BoxForm.NORM1000: "thousandths of the image",
}


def _summary(config: DataCheckConfig, source: TableSource | Concatenated, found: Findings) -> Table:
    title = printable(f"{', '.join(config.dataset)} for {config.env}")
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_row("rows", str(sum(part.total for part in _parts(source))))
    table.add_row("good", str(sum(map(len, found.good))))
    for kind, faults in found.faults.items():
        table.add_row(_KINDS[kind], str(len(faults)))
    table.add_row("made of", "\n".join(map(printable, str(source.usage).splitlines())))
    if repeated := {name: count for name, count in found.ids.items() if count > 1}:
        named = ", ".join(f"{name} ({count} rows)" for name, count in list(repeated.items())[:5])
        table.add_row("duplicate ids", printable(f"{len(repeated)}: {named}"))
    if found.sizes:
        table.add_row("images read", str(found.sizes.total()))
        table.add_row("most frequent sizes", _frequent(found.sizes))
    if found.labels:
        table.add_row("labels", f"{len(found.labels)}, of {found.labels.total()} boxes")
        table.add_row("most frequent labels", _frequent(found.labels))
    return table


def _frequent(counts: Counter[str]) -> str:
    return printable(", ".join(f"{name} ({count})" for name, count in counts.most_common(5)))


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
    console.print(printable(f"{total} good rows are in {file}"), highlight=False)
    if own_root and file.absolute().parent != Path(parts[0].root).absolute():
        console.print(printable(f"their images are read by --image-root {parts[0].root}"), highlight=False)
