"""The folder of a run: options, metrics, completions, checkpoints."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import vlmenv
from vlmenv.algos.trainer import StepResult
from vlmenv.core.errors import ConfigError
from vlmenv.core.rollout import unbatch

_RECORDED = ("torch", "transformers", "gymnasium", "accelerate")


class RunFolder:
    """Writes a run's files, each line as it happens.

    `config.yaml` holds all options, `metrics.jsonl` an object per step, `rollouts.jsonl` every
    completion with its reward terms, `checkpoints/step-N/` the model.

    Nothing is written before `create`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def check_new(self) -> None:
        """Raises ConfigError where the folder already holds a run."""
        if (self.path / "metrics.jsonl").exists():
            raise ConfigError(f"{self.path} already holds a run: choose another --output, or remove it")

    def create(self, options: str) -> None:
        """Makes the folder, with the run's options (YAML) and, as comments, the versions of what runs it."""
        self.path.mkdir(parents=True, exist_ok=True)
        versions = [
            f"# vlmenv {vlmenv.__version__}, python {platform.python_version()}",
            *(f"# {name} {version(name)}" for name in _RECORDED),
        ]
        lines = [f"# Repeat with: vlmenv train --config {self.path / 'config.yaml'}", *versions, options]
        (self.path / "config.yaml").write_text("\n".join(lines), encoding="utf-8")

    @staticmethod
    def default_path(env: str, algo: str) -> Path:
        """`runs/<date>-<time>-<environment>-<algorithm>`."""
        return Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{env.rpartition(':')[2]}-{algo}"

    def checkpoint(self, step: int) -> Path:
        """The folder of the model after a step."""
        return self.path / "checkpoints" / f"step-{step}"

    def write_step(self, result: StepResult) -> None:
        """Appends a step's metrics and completions."""
        self._append("metrics.jsonl", [{"step": result.step} | result.metrics])
        self._append("rollouts.jsonl", _completions(result))

    def _append(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        with (self.path / name).open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a JSON file."""
        (self.path / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _completions(result: StepResult) -> Iterator[dict[str, Any]]:
    scored = result.infos.get("rewards", {})
    terms = [name for name in scored if not name.startswith("_")]
    prompts = [observation["prompt"] for observation in unbatch(result.observations)]
    for i, completion in enumerate(result.rollout.completions):
        yield {
            "step": result.step,
            "id": result.infos["id"][i],
            "prompt": prompts[i],
            "completion": completion.text,
            "finish_reason": completion.finish_reason,
            "rewards": {name: float(scored[name][i]) for name in terms if scored[f"_{name}"][i]},
        }
