"""The report of one or several runs: a self-contained HTML file, made of the files in the runs' folders."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, Final

import vlmenv
from vlmenv.core.errors import ConfigError, DataError
from vlmenv.core.files import read_object, readable_objects, write_atomic
from vlmenv.core.text import visible, visible_lines
from vlmenv.options.files import read_options
from vlmenv.runs.album import TASK
from vlmenv.runs.report_answers import Answers, Content, entries, items, number

MOST_COMPLETIONS: Final = 10_000
MOST_BYTES: Final = 5_000_000
"""Of a report. Completions are left out until it fits."""
MOST_TEXT: Final = 8_000_000
"""Bytes of completions in a report, before it is compressed."""
_LEAST_TEXT: Final = 100_000
MOST_PICTURES: Final = 1_100_000
"""Bytes of pictures in a report; as text they take a third more."""
MOST_POINTS: Final = 600
"""Points of a curve; fewer if more than four runs are reported. Longer runs have means over neighbouring steps."""
_MOST_METRICS: Final = 200
_MOST_NOTES: Final = 200
"""Warnings, and changes at resuming."""
_LONGEST: Final = 2000
"""Characters of an option, a warning or a change."""
WITHIN_A_GROUP: Final = ("seed",)
"""Options in which runs may differ that are drawn as one curve with a band."""
_RECORD: Final = "record"
Difference = tuple[str, list[str | None]]
"""An option, and its value in each run; None for a run without it."""


def write_report(runs: Sequence[Path], file: Path) -> None:
    """Writes the report of runs.

    Args:
        runs: Folders of runs.
        file: The file to write, atomically.

    Raises:
        ConfigError: A folder holds no run.
        OSError: The file cannot be written.
    """
    write_atomic(file, make_report(runs))


def make_report(runs: Sequence[Path], *, live: bool = False) -> str:
    """The HTML of a report; see `write_report`.

    Args:
        runs: Folders of runs.
        live: If true, the page asks its server for changes.
    """
    read = [RunFiles(run) for run in runs]
    for one in read:
        one.check()
    names, different, text = _names(runs), list(_differences(read)), MOST_TEXT
    head = {"version": vlmenv.__version__, "made": f"{datetime.now():%Y-%m-%d %H:%M:%S}", "live": live}
    head |= {"groups": _groups(read, names, different), "differences": different}
    while True:
        contents = [one.content(len(runs), text // len(runs)) for one in read]
        html = page(head | {"runs": [{"name": name} | one for name, one in zip(names, contents, strict=True)]})
        if len(html) <= MOST_BYTES or text <= _LEAST_TEXT:
            return html
        text //= 2


class RunFiles:
    """The files of a run's folder, as a report reads them. Files of any version, and damaged ones, give what they have.

    Args:
        run: The run's folder.
    """

    def __init__(self, run: Path) -> None:
        self.run = run

    def check(self) -> None:
        """Raises ConfigError if the folder holds no run."""
        if not self.metrics and not self.evaluations:
            raise ConfigError(
                f"{self.run} holds no run to report: it has neither steps in metrics.jsonl nor evaluations"
            )

    @cached_property
    def options(self) -> Content:
        """All options that are used; empty if the run has no record of them."""
        options = {name: value for name, value in self._yaml.items() if name != _RECORD}
        return options | entries(options.pop(str(options.get("algo")), None))

    @cached_property
    def origin(self) -> Content:
        """The programs, the device and the source of the run."""
        record = entries(self._yaml.get(_RECORD))
        versions = entries(record.get("versions"))
        told = {name: record.get(name) for name in ("device", "ranks", "threads", "git", "run")}
        return told | {name: versions.get(name) for name in ("vlmenv", "torch", "transformers", "python")}

    @cached_property
    def _yaml(self) -> Content:
        for name in ("resolved.yaml", "config.yaml"):
            try:
                return read_options(self.run / name)
            except ConfigError:
                continue
        return {}

    @cached_property
    def metrics(self) -> list[Content]:
        """The metrics of each step, in order."""
        rows = (row for row in readable_objects(self.run / "metrics.jsonl") if isinstance(row.get("step"), int))
        return [row for _, row in sorted({row["step"]: row for row in rows}.items())]

    @cached_property
    def evaluations(self) -> list[tuple[int, Path]]:
        """Steps and folders of the evaluations: step 0 before training, the last step after it."""
        last = self.metrics[-1]["step"] if self.metrics else 0
        found = {last: self.run / "after"} if last else {}
        for folder in (self.run / "evaluations").glob("step-*"):
            step = folder.name.removeprefix("step-")
            if step.isascii() and step.isdigit():
                found[int(step)] = folder
        found[0] = self.run / "before"
        return sorted((step, folder) for step, folder in found.items() if (folder / "metrics.json").is_file())

    def content(self, runs: int, text: int) -> Content:
        """What a report of `runs` runs tells of this one, with `text` bytes of completions, as JSON can hold it."""
        task = _object(self.run / "samples" / TASK)
        right = _right(task.get("right"))
        weights = entries(task.get("rewards")) or entries(self.options.get("rewards"))
        known = {str(name): weight for name, value in weights.items() if (weight := number(value)) is not None}
        answers = Answers(self.run, self.evaluations, right, known)
        warnings, changes = (readable_objects(self.run / f"{name}.jsonl") for name in ("warnings", "changes"))
        return {
            "options": {visible(name): _written(value) for name, value in self.options.items()},
            "origin": {name: _written(value) for name, value in self.origin.items()},
            "curves": thinned(self.metrics, max(100, min(MOST_POINTS, 4 * MOST_POINTS // runs))),
            "machine": _machine(self.metrics),
            "warnings": [
                [number(one.get("step")), visible(one.get("kind"))[:100], visible(one.get("message"))[:_LONGEST]]
                for one in islice(warnings, _MOST_NOTES)
            ],
            "changes": [visible(json.dumps(one))[:_LONGEST] for one in islice(changes, _MOST_NOTES)],
            "headline": self._headline(),
            "held_out": [[step, _intervals(_object(folder / "metrics.json"))] for step, folder in self.evaluations],
            "right": None if right is None else [visible(right[0]), right[1]],
        } | answers.content(MOST_COMPLETIONS // runs, text, MOST_PICTURES // runs)

    def _headline(self) -> list[list[Any]]:
        """Each metric by name: before, after (or last), and the paired change."""
        told = _object(self.run / "evaluation.json")
        if not told:
            ends = [(step, _object(folder / "metrics.json")) for step, folder in self.evaluations]
            told = {"before": ends[0][1] if ends and ends[0][0] == 0 else {}, "after": ends[-1][1] if ends[1:] else {}}
        parts = [_intervals(told.get(part)) for part in ("before", "after", "change")]
        names = dict.fromkeys(name for part in parts for name in part)
        return [[name, *(part.get(name) for part in parts)] for name in names]


def thinned(rows: Sequence[Mapping[str, Any]], most: int = MOST_POINTS) -> Content:
    """The curve of each metric: `step`, and `values` by name, None where a step has none.

    Args:
        rows: Metrics of each step.
        most: Points of a curve. Of more steps, neighbours are joined by their means, and have the last one's step.
    """
    size = -(-len(rows) // most) or 1
    parts = [rows[i : i + size] for i in range(0, len(rows), size)]
    names = list(dict.fromkeys(name for row in rows for name in row if name != "step"))[:_MOST_METRICS]
    values = {visible(name): [_mean(row.get(name) for row in part) for part in parts] for name in names}
    return {"step": [part[-1]["step"] for part in parts], "values": values}


def _mean(values: Iterator[Any]) -> float | None:
    known = [found for value in values if (found := number(value)) is not None]
    return number(sum(known) / len(known)) if known else None


def _machine(rows: Sequence[Mapping[str, Any]]) -> Content:
    """Seconds by phase, tokens per second and memory."""
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("time/"))
    sums = {name: sum(number(row.get(name)) or 0 for row in rows) for name in names}
    memory = [number(row.get("memory/peak")) or 0.0 for row in rows]
    return {
        "seconds": {visible(name.removeprefix("time/")): number(value) for name, value in sums.items()},
        "tokens_per_second": _mean(row.get("tokens_per_second") for row in rows),
        "memory": max(memory, default=0.0) or None,
    }


def _intervals(metrics: Any) -> dict[str, list[float | None]]:
    """Value, lower and upper bound of each metric."""
    found = {name: one for name, one in entries(metrics).items() if isinstance(one, dict)}
    return {visible(name): [number(one.get(part)) for part in ("value", "low", "high")] for name, one in found.items()}


def _right(value: Any) -> tuple[str, float] | None:
    name, least = (*items(value), None, None)[:2]
    bound = number(least)
    return (name, bound) if isinstance(name, str) and bound is not None else None


def _object(file: Path) -> Content:
    """The content of a JSON file; empty if there is none that can be read."""
    try:
        return read_object(file) if file.is_file() else {}
    except (DataError, OSError):
        return {}


def _written(value: Any) -> str:
    """An option's value in one or more lines of text."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return visible_lines(text[:_LONGEST])


def _names(runs: Sequence[Path]) -> list[str]:
    """The names of the runs' folders, with those of their parents as far as names are alike."""
    paths = [run.resolve() for run in runs]
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return [visible(name) for name in names]


def _differences(runs: Sequence[RunFiles]) -> Iterator[Difference]:
    """Options whose values differ between runs, with each run's value; None for a run without the option."""
    for name in dict.fromkeys(name for run in runs for name in run.options):
        values = [_written(run.options[name]) if name in run.options else None for run in runs]
        if len(set(values)) > 1:
            yield visible(name), values


def _groups(runs: Sequence[RunFiles], names: Sequence[str], differences: Sequence[Difference]) -> list[Content]:
    """Runs that differ in their seed alone, each with a name by what differs from other groups."""
    different = [(name, values) for name, values in differences if name not in WITHIN_A_GROUP]
    groups: dict[tuple[str | None, ...], list[int]] = {}
    for i, run in enumerate(runs):
        key = tuple(values[i] for _, values in different) if run.options else (names[i],)
        groups.setdefault(key, []).append(i)
    shown = different[:3]
    return [
        {
            "name": names[own[0]] if len(own) == 1 else _group_name([(n, v[own[0]]) for n, v in shown], len(own)),
            "runs": own,
        }
        for own in groups.values()
    ]


def _group_name(options: Sequence[tuple[str, str | None]], size: int) -> str:
    told = ", ".join(f"{name} {(value or 'none')[:40]}" for name, value in options)
    return f"{told or 'all runs'} ({size} seeds)"


def page(data: Mapping[str, Any]) -> str:
    """The page with its data.

    Scripts and styles run by their checksums alone, so that nothing in the data can run, wherever it stands.
    """
    style, script = (_asset(name) for name in ("report.css", "report.js"))
    connect = "connect-src 'self'; " if data["live"] else ""
    policy = (
        f"default-src 'none'; script-src '{_checksum(script)}'; style-src '{_checksum(style)}'; img-src data:; "
        f"{connect}base-uri 'none'; form-action 'none'"
    )
    parts = {"POLICY": policy, "STYLE": style, "DATA": packed(data), "SCRIPT": script}
    first, *rest = _asset("report.html").split("{{")
    pieces = [piece.partition("}}") for piece in rest]
    return first + "".join(parts[name] + after for name, _, after in pieces)


def packed(data: Any) -> str:
    """JSON, compressed by gzip, in Base64, which ends no script element, whatever is in it."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _asset(name: str) -> str:
    return (files("vlmenv.runs") / "page" / name).read_text(encoding="utf-8")


def _checksum(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
