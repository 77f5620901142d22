"""The folder of a run: options, metrics, completions, checkpoints."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vlmenv.algos.trainer import StepResult
from vlmenv.core.errors import ConfigError
from vlmenv.core.rollout import unbatch

_RECORDED = ("vlmenv", "torch", "transformers", "gymnasium", "accelerate")


class RunFolder:
    """Writes a run's files, each line as it happens.

    `config.yaml` holds all options, `metrics.jsonl` an object per step, `rollouts.jsonl` every
    completion with its reward terms, `checkpoints/step-N/` the model.

    Args:
        path: The folder; it must not hold another run.

    Raises:
        ConfigError: It does.
    """

    def __init__(self, path: Path) -> None:
        self.check_new(path)
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._metrics = (path / "metrics.jsonl").open("w", encoding="utf-8", buffering=1)
        self._rollouts = (path / "rollouts.jsonl").open("w", encoding="utf-8", buffering=1)

    @staticmethod
    def check_new(path: Path) -> None:
        """Raises ConfigError where the folder holds a run."""
        if (path / "metrics.jsonl").exists():
            raise ConfigError(f"{path} already holds a run: choose another --output, or remove it")

    @staticmethod
    def default_path(env: str, algo: str) -> Path:
        """`runs/<date>-<time>-<environment>-<algorithm>`."""
        return Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{env}-{algo}"

    def checkpoint(self, step: int) -> Path:
        """The folder of the model after a step."""
        return self.path / "checkpoints" / f"step-{step}"

    def write_config(self, options: str) -> None:
        """Writes config.yaml, with the versions of what ran it as comments."""
        versions = [f"# python {platform.python_version()}", *(f"# {name} {version(name)}" for name in _RECORDED)]
        text = (
            f"{options}# Repeat with: vlmenv train --config {self.path / 'config.yaml'}\n" + "\n".join(versions) + "\n"
        )
        (self.path / "config.yaml").write_text(text, encoding="utf-8")

    def write_step(self, result: StepResult) -> None:
        """Appends a step's metrics and completions."""
        self._metrics.write(json.dumps({"step": result.step} | result.metrics) + "\n")
        self._rollouts.writelines(json.dumps(row) + "\n" for row in _completions(result))

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a JSON file."""
        (self.path / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def close(self) -> None:
        """Closes the files."""
        self._metrics.close()
        self._rollouts.close()


def _completions(result: StepResult) -> Iterator[dict[str, Any]]:
    terms = {name: values for name, values in result.infos.get("rewards", {}).items() if not name.startswith("_")}
    prompts = [observation["prompt"] for observation in unbatch(result.observations)]
    for i, completion in enumerate(result.rollout.completions):
        yield {
            "step": result.step,
            "id": result.infos["id"][i],
            "prompt": prompts[i],
            "completion": completion.text,
            "finish_reason": completion.finish_reason,
            "rewards": {name: float(values[i]) for name, values in terms.items()},
        }
