"""Trackers, TensorBoard or Weights & Biases, where metrics and example completions are logged."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image as PILImage

from vlmenv.algos.trainer import StepResult
from vlmenv.core.errors import ConfigError, TrainingError
from vlmenv.core.spaces import Image
from vlmenv.envs.base import VisualTaskEnv
from vlmenv.runs.run_folder import RunFolder

_NUM_SAMPLES = 4  # samples, one answer to each
_LONGEST_SIDE = 768  # pixels of a picture


def require_tracker(name: str) -> None:
    """Raises ConfigError if a tracker is not installed."""
    try:
        if name == "wandb":
            version(name)  # an import would also find a folder `wandb` of earlier runs
    except PackageNotFoundError:
        raise ConfigError('tracker wandb needs the extra "tracking": pip install "vlmenv[tracking]"') from None


class Tracking:
    """Logs a run to a tracker, through accelerate.

    TensorBoard's files are in the run's folder. Weights & Biases gets a run with the folder's name, in the project
    WANDB_PROJECT. Default: `vlmenv`. The folder keeps its id, so that a resumed run continues there.

    Args:
        accelerator: Accelerator made with `log_with` the same tracker.
        name: The tracker.
        run: The run's folder.
        options: The run's options.
        step: Step that a resumed run continues after; 0 for a new run. TensorBoard hides its records of later steps.
            Weights & Biases keeps them, and ignores new records of the same steps.

    Raises:
        ConfigError: The tracker cannot be started.
    """

    def __init__(
        self, accelerator: Accelerator, name: str, run: RunFolder, options: Mapping[str, Any], step: int
    ) -> None:
        self._accelerator, self._name, self._run = accelerator, name, run
        if name == "none":
            return
        told = None if step else {option: str(value) for option, value in options.items()}
        if name == "wandb":
            self._start_wandb(told)
        else:
            threading.excepthook = _tell_of_a_thread
            # TensorBoard hides what is beyond the start of a session, but not beyond that of the first one.
            accelerator.init_trackers("tensorboard", told, {"tensorboard": {"purge_step": step + 1}})

    def log(self, result: StepResult, task: VisualTaskEnv, *, samples: bool) -> None:
        """Logs a step's metrics.

        Args:
            result: The step.
            task: The environment that draws samples.
            samples: If true, also logs the first completions of a few samples.

        Raises:
            TrainingError: TensorBoard's files cannot be written.
        """
        if self._name == "none" or not self._accelerator.is_main_process:
            return
        try:
            self._accelerator.log(result.metrics, step=result.step)
            if samples:
                show = self._show_in_wandb if self._name == "wandb" else self._show_in_tensorboard
                show(shown_samples(result, task), result.step)
        except OSError as error:
            raise TrainingError(f"{self._run.path}: the tracker {self._name} cannot write: {error}") from error

    def close(self, *, failed: bool = False) -> None:
        """Ends the tracker's run. Weights & Biases marks it as failed if `failed`."""
        if failed and self._name == "wandb" and self._accelerator.is_main_process:
            self._accelerator.get_tracker("wandb", unwrap=True).finish(exit_code=1)
        for tracker in self._accelerator.trackers:
            tracker.finish()
        threading.excepthook = threading.__excepthook__

    def _start_wandb(self, options: dict[str, str] | None) -> None:
        from wandb.errors import Error

        how = {"dir": str(self._run.path), "name": self._run.path.name, "id": self._wandb_id(), "resume": "allow"}
        try:
            self._accelerator.init_trackers(os.environ.get("WANDB_PROJECT", "vlmenv"), options, {"wandb": how})
        except Error as error:
            raise ConfigError(f"tracker wandb cannot start, and WANDB_MODE=offline is not set: {error}") from error

    def _wandb_id(self) -> str:
        known = self._run.read_json("wandb.json").get("id")
        if known is None and self._accelerator.is_main_process:
            known = secrets.token_hex(4)
            self._run.write_json("wandb.json", {"id": known})
        return str(known)

    def _show_in_tensorboard(self, shown: Sequence[tuple[dict[str, Any], Image]], step: int) -> None:
        writer = self._accelerator.get_tracker("tensorboard", unwrap=True)
        for i, (record, picture) in enumerate(shown, 1):
            writer.add_image(f"samples/{i}", picture, step, dataformats="HWC")
            writer.add_text(f"samples/{i}", _as_markdown(record), step)
        writer.flush()

    def _show_in_wandb(self, shown: Sequence[tuple[dict[str, Any], Image]], step: int) -> None:
        import wandb

        terms = list(dict.fromkeys(name for record, _ in shown for name in record["rewards"]))
        columns = ["step", "id", "picture", "prompt", "completion", "reward", *(f"reward/{name}" for name in terms)]
        rows = [
            [
                step,
                record["id"],
                wandb.Image(picture),
                *(record[name] for name in ("prompt", "completion", "reward")),
                *(record["rewards"].get(name) for name in terms),
            ]
            for record, picture in shown
        ]
        self._accelerator.get_tracker("wandb").log_table("samples", columns, rows, step=step)


def shown_samples(result: StepResult, task: VisualTaskEnv) -> list[tuple[dict[str, Any], Image]]:
    """Records of the first completion of each of the first samples, with the task's picture of sample and answer."""
    firsts = {record["index"]: record for record in reversed(result.rollouts.records)}
    records = list(reversed(firsts.values()))[:_NUM_SAMPLES]
    return [(record, _picture(task, record)) for record in records]


def _picture(task: VisualTaskEnv, record: dict[str, Any]) -> Image:
    whole = PILImage.fromarray(task.draw(task.source.get(record["index"]), task.parse(record["completion"])))
    whole.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    return np.asarray(whole)


def _as_markdown(record: dict[str, Any]) -> str:
    """Prompt and completion as code blocks, which show any text unchanged."""
    terms = ", ".join(f"{name} {value:.3f}" for name, value in record["rewards"].items())
    blocks = [f"**{part}**\n\n{_indented(record[part])}" for part in ("prompt", "completion")]
    return "\n\n".join([f"sample {record['id']}: **reward {record['reward']:.3f}** ({terms})", *blocks])


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.split("\n"))


def _tell_of_a_thread(args: threading.ExceptHookArgs) -> None:
    """Reports errors of threads, except TensorBoard's writer, whose errors the next call raises."""
    if type(args.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(args)
