"""The folder of a run: options, metrics, completions and checkpoints."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any, Final

import vlmenv
from vlmenv.algos.trainer import StepResult
from vlmenv.core.errors import ConfigError, DataError
from vlmenv.core.files import flush_file, read_object, write_atomic
from vlmenv.core.text import visible
from vlmenv.options.files import read_options
from vlmenv.options.mixing import MIX
from vlmenv.options.resolve import RECORD

_STEP: Final = re.compile(r"step-(0|[1-9][0-9]*)", re.ASCII)
LOGS: Final = ("metrics.jsonl", "rollouts.jsonl", "warnings.jsonl", "changes.jsonl")
"""Files with an object per line, each with its `step`."""


class RunFolder:
    """The files of a run.

    - `config.yaml`: the options that were asked for.
    - `resolved.yaml`: all options and values that are used.
    - `metrics.jsonl`: one object per step.
    - `rollouts.jsonl`: each completion with its reward terms, prediction, truth and advantage.
    - `before/`, `after/`, `evaluations/step-N/`: answers and metrics of evaluations.
    - `samples/`: small pictures and true places of the samples that the report shows.
    - `report.html`: the report.
    - `checkpoints/step-N/`: the model and the trainer's state.
    - `warnings.jsonl`: steps with a sign that training goes wrong.
    - `changes.jsonl`: options, data and ranks that changed when the run was resumed.
    - `nonfinite/step-N/`: the batch whose non-finite gradients ended the run.

    Nothing is written before `create`.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._written = 0  # steps

    def check_new(self) -> None:
        """Raises ConfigError if the folder already holds a run."""
        if (self.path / "metrics.jsonl").exists() or self.checkpoints():
            raise ConfigError(f"{self.path} already holds a run: choose another --output, or remove it")
        self._check_logs()

    def write_mix(self, sections: str) -> Path:
        """Makes the folder, and writes the options of a mix's tasks as YAML. Returns the file."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path / MIX, f"# The tasks of the mix, with what was used\n{sections}")
        return self.path / MIX

    def create(self, asked: str, resolved: str) -> None:
        """Makes the folder, and writes the options that were asked for and all that are used, both as YAML."""
        self.path.mkdir(parents=True, exist_ok=True)
        repeat = f"# Repeat with: vlmenv train --config {visible(shlex.quote(f'{self.path}/resolved.yaml'))}\n"
        write_atomic(self.path / "resolved.yaml", repeat + resolved)
        heading = f"# What was asked. What was used: resolved.yaml. Version {vlmenv.__version__}\n"
        write_atomic(self.path / "config.yaml", heading + asked)

    def identity(self) -> str | None:
        """The run's id, which its checkpoints carry; None for a run of an earlier version."""
        for name in ("resolved.yaml", "config.yaml"):
            record = read_options(self.path / name).get(RECORD) if self._has(name) else None
            if isinstance(record, dict) and record.get("run"):
                return str(record["run"])
        return None

    @staticmethod
    def default_path(env: str, algo: str) -> Path:
        """`runs/<date>-<time>-<environment>-<algorithm>`."""
        return Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{env.rpartition(':')[2]}-{algo.rpartition(':')[2]}"

    @classmethod
    def make_default(cls, env: str, algo: str) -> Path:
        """Makes the folder of `default_path`, with a number behind its name if another run has it already."""
        path = cls.default_path(env, algo)
        for number in count(1):
            own = path if number == 1 else path.with_name(f"{path.name}-{number}")
            try:
                own.mkdir(parents=True)
            except FileExistsError:
                continue
            return own
        raise AssertionError  # a count has no end

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after a step."""
        return self.path / "checkpoints" / f"step-{step}"

    def nonfinite(self, step: int) -> Path:
        """The folder of a step's non-finite batch."""
        return self.path / "nonfinite" / f"step-{step}"

    def evaluation(self, step: int) -> Path:
        """The folder of the evaluation after a step."""
        return self.path / "evaluations" / f"step-{step}"

    def write_step(self, result: StepResult) -> None:
        """Appends a step's metrics and completions, unless they are written already.

        Raises:
            OSError: They cannot be written. The files stay unchanged.
        """
        if result.step <= self._written:
            return
        files = [self.path / name for name in ("rollouts.jsonl", "metrics.jsonl")]
        sizes = [file.stat().st_size if file.exists() else 0 for file in files]
        try:
            _append(files[0], ({"step": result.step} | record for record in result.rollouts.records))
            _append(files[1], [{"step": result.step} | result.metrics])
        except OSError as error:
            for file, size in zip(files, sizes, strict=True):
                if file.exists():
                    os.truncate(file, size)
            error.filename = error.filename or str(files[1])
            raise
        self._written = result.step

    def write_warning(self, step: int, message: str, kind: str = "drift") -> None:
        """Appends a warning about a step."""
        _append(self.path / "warnings.jsonl", [{"step": step, "kind": kind, "message": message}])

    def write_change(self, step: int, what: Mapping[str, Any]) -> None:
        """Appends what is different from the step on that the run was resumed at."""
        _append(self.path / "changes.jsonl", [{"step": step, "time": f"{datetime.now():%Y-%m-%d %H:%M:%S}", **what}])

    def changed_options(self, step: int | None = None) -> dict[str, Any]:
        """The options that changed when the run was resumed, up to a step, with their last values. Default: all."""
        rows = [row for row in self._rows("changes.jsonl") if step is None or row["step"] < step]
        return {name: now for row in rows for name, (_, now) in (row.get("options") or {}).items()}

    def warned(self, kind: str | None = None) -> list[int]:
        """The steps with a warning; of one kind, if one is given."""
        rows = self._rows("warnings.jsonl") if self._has("warnings.jsonl") else []
        return [row["step"] for row in rows if kind in (None, row.get("kind"))]

    def checkpoints(self) -> list[Path]:
        """The folders of complete checkpoints, the newest last. Folders with other names are no checkpoints."""
        found = (self.path / "checkpoints").glob("step-*/trainer.pt")
        return sorted((file.parent for file in found if _STEP.fullmatch(file.parent.name)), key=self.step_of)

    @staticmethod
    def step_of(folder: Path) -> int:
        """The step of the folder of a checkpoint or an evaluation."""
        return int(folder.name.removeprefix("step-"))

    def rests(self, before: int | None = None) -> list[Path]:
        """Folders of checkpoints that were not written to their end, or are older than step `before`."""
        folders = sorted((self.path / "checkpoints").glob("*"))
        partial = [one for one in folders if _STEP.fullmatch(one.name.removeprefix(".").removesuffix(".partial"))]
        if before is None:
            return [one for one in partial if not _STEP.fullmatch(one.name)]
        return [one for one in partial if _STEP.fullmatch(one.name) and self.step_of(one) < before]

    def history(self, steps: int | None = None) -> list[dict[str, float]]:
        """The metrics of the first `steps` steps. Default: of all. A step whose line is lost has none."""
        if steps == 0:
            return []
        rows = {row["step"]: row for row in self._rows("metrics.jsonl")}
        last = max(rows, default=0) if steps is None else steps
        return [{n: v for n, v in rows.get(step, {}).items() if n != "step"} for step in range(1, last + 1)]

    def flush_logs(self) -> dict[str, int]:
        """Writes the logs to the disk, and returns their lengths in bytes."""
        files = [self.path / name for name in LOGS if self._has(name)]
        for file in files:
            flush_file(file)
        return {file.name: file.stat().st_size for file in files}

    def cut(self, step: int, lengths: Mapping[str, int] | None = None) -> list[str]:
        """Removes the records of all steps after `step`, from which training continues.

        Args:
            step: The step.
            lengths: Lengths of the logs after that step, in bytes. None: they are searched for.

        Returns:
            What is wrong with the logs: lines that are lost or cannot be read.
        """
        told: list[str] = []
        self._check_logs()
        for folder in (self.path / "evaluations").glob("step-*"):
            if _STEP.fullmatch(folder.name) and self.step_of(folder) > step:
                shutil.rmtree(folder)
        self._reopen_end(step)
        for file in (self.path / name for name in LOGS):
            if not file.is_file():
                told += [f"{file} is gone"] if (lengths or {}).get(file.name) else []
                continue
            found = _end_of(file, step) if lengths is None else lengths.get(file.name, 0)
            if file.stat().st_size < found:
                told.append(f"{file} has lost lines: {file.stat().st_size} bytes are left of {found}")
            _truncate(file, found)
            told += [f"{file}:{line}: the line cannot be read and is passed over" for line in _broken(file)]
        return told

    def _reopen_end(self, step: int) -> None:
        """Takes back what an earlier end of the run has measured: that step is on the way now, or after `step`."""
        after, last = self.path / "after", max((row["step"] for row in self._rows("metrics.jsonl")), default=0)
        (self.path / "evaluation.json").unlink(missing_ok=True)
        if after.is_dir() and last == step and not self.evaluation(step).exists():
            self.evaluation(step).parent.mkdir(exist_ok=True)
            after.rename(self.evaluation(step))
        shutil.rmtree(after, ignore_errors=True)

    def _check_logs(self) -> None:
        """Raises ConfigError if a folder, a pipe or a device has the name of a log: to open one may take for ever."""
        for file in (self.path / name for name in LOGS):
            if file.exists() and not file.is_file():
                raise ConfigError(f"{file} is no regular file: remove it")

    def best(self, name: str = "best") -> dict[str, Any]:
        """The record of the best model so far; empty if there is none.

        Args:
            name: The model's folder, best-TASK for one task of a mix.

        Raises:
            DataError: The file is damaged. Without it, the next measuring makes a new best model.
        """
        try:
            return self.read_json(f"{name}.json")
        except DataError as error:
            raise DataError(f"{error}: remove it, and the model that is measured next is the best again") from error

    def _has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def _rows(self, name: str) -> Sequence[dict[str, Any]]:
        """The objects of a file of JSON lines, without lines that cannot be read."""
        if not self._has(name):
            return []
        with (self.path / name).open("rb") as stream:
            rows = (_row(line) for line in stream)
            return [row for row in rows if row is not None]

    def read_json(self, name: str) -> dict[str, Any]:
        """The content of a JSON file; empty if there is none.

        Raises:
            DataError: The file is damaged.
        """
        file = self.path / name
        return read_object(file) if file.is_file() else {}

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a JSON file atomically."""
        write_atomic(self.path / name, json.dumps(content, indent=2) + "\n")


def _append(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def _row(line: bytes) -> dict[str, Any] | None:
    """The object of a line that was written to its end; None for any other line."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _end_of(file: Path, step: int) -> int:
    """The length in bytes of a log's lines up to a step."""
    end = 0
    with file.open("rb") as stream:
        for line in stream:
            row = _row(line)
            if (row is None and not line.endswith(b"\n")) or (row is not None and row["step"] > step):
                break
            end += len(line)
    return end


def _truncate(file: Path, length: int) -> None:
    """Cuts a file down to a length, and then to the end of its last whole line."""
    if file.stat().st_size > length:
        os.truncate(file, length)
    with file.open("rb") as stream:
        end = size = file.stat().st_size
        while end:
            start = max(0, end - _CHUNK)
            stream.seek(start)
            if (at := stream.read(end - start).rfind(b"\n")) >= 0:
                end = start + at + 1
                break
            end = start
    if end < size:
        os.truncate(file, end)


_CHUNK: Final = 1 << 16


def _broken(file: Path) -> Iterator[int]:
    """Numbers of the lines that are no objects with a step. Of the long rollouts.jsonl it looks at lines' ends only."""
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            whole = line.startswith(b'{"step": ') and line.endswith(b"}\n") and b"\0" not in line
            if not (whole if file.name == "rollouts.jsonl" else _row(line)):
                yield number
