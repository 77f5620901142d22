"""The folder of a run: options, metrics, completions and checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import vlmenv
from vlmenv.algos.trainer import StepResult
from vlmenv.core.errors import ConfigError
from vlmenv.core.files import write_atomic


class RunFolder:
    """The files of a run.

    - `config.yaml`: the options that were asked for.
    - `resolved.yaml`: all options and values that are used.
    - `metrics.jsonl`: one object per step.
    - `rollouts.jsonl`: each completion with its reward terms.
    - `checkpoints/step-N/`: the model and the trainer's state.
    - `warnings.jsonl`: steps with a sign of reward hacking.
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
        if (self.path / "metrics.jsonl").exists():
            raise ConfigError(f"{self.path} already holds a run: choose another --output, or remove it")

    def create(self, asked: str, resolved: str) -> None:
        """Makes the folder, and writes the options that were asked for and all that are used, both as YAML."""
        self.path.mkdir(parents=True, exist_ok=True)
        repeat = f"# Repeat with: vlmenv train --config {self.path}/resolved.yaml\n"
        write_atomic(self.path / "resolved.yaml", repeat + resolved)
        heading = f"# What was asked. What was used: resolved.yaml. Version {vlmenv.__version__}\n"
        write_atomic(self.path / "config.yaml", heading + asked)

    @staticmethod
    def default_path(env: str, algo: str) -> Path:
        """`runs/<date>-<time>-<environment>-<algorithm>`."""
        return Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{env.rpartition(':')[2]}-{algo.rpartition(':')[2]}"

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after a step."""
        return self.path / "checkpoints" / f"step-{step}"

    def nonfinite(self, step: int) -> Path:
        """The folder of a step's non-finite batch."""
        return self.path / "nonfinite" / f"step-{step}"

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

    def write_warning(self, step: int, message: str) -> None:
        """Appends a warning about a step."""
        _append(self.path / "warnings.jsonl", [{"step": step, "message": message}])

    def warned(self) -> list[int]:
        """The steps with a warning."""
        return [row["step"] for row in self._rows("warnings.jsonl")] if self._has("warnings.jsonl") else []

    def checkpoints(self) -> list[Path]:
        """The folders of complete checkpoints, the newest last."""
        found = (self.path / "checkpoints").glob("step-*/trainer.pt")
        return sorted((file.parent for file in found), key=self.step_of)

    @staticmethod
    def step_of(checkpoint: Path) -> int:
        """The step of a checkpoint."""
        return int(checkpoint.name.removeprefix("step-"))

    def history(self, steps: int | None = None) -> list[dict[str, float]]:
        """The metrics of the first `steps` steps. Default: of all."""
        rows = self._rows("metrics.jsonl") if steps != 0 else []
        return [{name: value for name, value in row.items() if name != "step"} for row in rows[:steps]]

    def cut(self, step: int) -> None:
        """Removes the records of all steps after `step`, from which training continues."""
        for name in ("metrics.jsonl", "rollouts.jsonl", "warnings.jsonl"):
            if self._has(name):
                kept = [row for row in self._rows(name) if row["step"] <= step]
                write_atomic(self.path / name, "".join(json.dumps(row) + "\n" for row in kept))

    def best(self) -> dict[str, Any]:
        """The record of the best model so far; empty if there is none."""
        return self.read_json("best.json")

    def _has(self, name: str) -> bool:
        return (self.path / name).exists()

    def _rows(self, name: str) -> list[dict[str, Any]]:
        """The objects of a file of JSON lines, without an incomplete last line."""
        lines = (self.path / name).read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]

    def read_json(self, name: str) -> dict[str, Any]:
        """The content of a JSON file; empty if there is none."""
        file = self.path / name
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a JSON file atomically."""
        write_atomic(self.path / name, json.dumps(content, indent=2) + "\n")


def _append(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
