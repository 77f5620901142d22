"""Trackers, TensorBoard or Weights & Biases, where metrics and example completions are logged."""

from __future__ import annotations

import os
import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import numpy as np
from accelerate import Accelerator
from PIL import Image as PILImage

from vlmenv.algos.trainer import StepResult
from vlmenv.compat.tensorboard import hyperparameters
from vlmenv.core.errors import ConfigError, TrainingError, unknown_name
from vlmenv.core.loading import load_name
from vlmenv.core.spaces import Image
from vlmenv.envs.base import VisualTaskEnv
from vlmenv.envs.rendering import picture_of
from vlmenv.runs.run_folder import RunFolder

_NUM_SAMPLES = 4  # samples, one answer to each
_LONGEST_SIDE = 768  # pixels of a picture


class Tracker(ABC):
    """Where a run's metrics and example completions are logged. Called on the main rank, but for `start`."""

    @abstractmethod
    def start(self, run: RunFolder, options: Mapping[str, str], step: int) -> None:
        """Begins, or continues after a step.

        Args:
            run: The run's folder.
            options: The run's options as texts.
            step: Step after which a resumed run continues; 0 for a new one.

        Raises:
            ConfigError: The tracker cannot be started.
        """

    @abstractmethod
    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Logs a step's metrics."""

    @abstractmethod
    def show(self, samples: Sequence[tuple[dict[str, Any], Image]], step: int) -> None:
        """Logs example completions.

        Args:
            samples: Records with `id`, `prompt`, `completion`, `reward` and `rewards` by term, each with a picture,
                uint8 [H, W, 3].
            step: Their step.
        """

    def compare(self, before: Mapping[str, float], after: Mapping[str, float], step: int) -> None:  # noqa: B027
        """Logs the held-out metrics before and after training. Default: nothing.

        Args:
            before: Metrics by name, before step 1.
            after: The same after training.
            step: The last step.
        """

    @abstractmethod
    def close(self, failed: bool) -> None:
        """Ends; `failed` tells if the run did."""


class TensorBoard(Tracker):
    """TensorBoard, through accelerate. Its files are in the run's folder.

    Its table of hyperparameters has a row for the run, with the held-out metrics before and after training.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._options: dict[str, float | str] = {}

    def start(self, run: RunFolder, options: Mapping[str, str], step: int) -> None:
        threading.excepthook = _tell_of_a_thread
        # TensorBoard hides what is beyond the start of a session, but not beyond that of the first one.
        self._accelerator.init_trackers("tensorboard", None, {"tensorboard": {"purge_step": step + 1}})
        self._options = {name: _number(value) for name, value in options.items()}
        if not step:
            self._tell_options({})

    def _tell_options(self, metrics: Mapping[str, float]) -> None:
        """Writes the options, and with metrics which columns the table of hyperparameters has."""
        if self._accelerator.is_main_process:
            file = self._accelerator.get_tracker("tensorboard", unwrap=True).file_writer
            for record in hyperparameters(self._options, metrics):
                file.add_summary(record)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._accelerator.log(dict(metrics), step=step)

    def show(self, samples: Sequence[tuple[dict[str, Any], Image]], step: int) -> None:
        writer = self._accelerator.get_tracker("tensorboard", unwrap=True)
        for i, (record, picture) in enumerate(samples, 1):
            writer.add_image(f"samples/{i}", picture, step, dataformats="HWC")
            writer.add_text(f"samples/{i}", _as_markdown(record), step)
        writer.flush()

    def compare(self, before: Mapping[str, float], after: Mapping[str, float], step: int) -> None:
        writer = self._accelerator.get_tracker("tensorboard", unwrap=True)
        told = _ends(before, after)
        for name, value in told.items():
            writer.add_scalar(name, value, 0 if name.startswith("before/") else step)
        self._tell_options(told)

    def close(self, failed: bool) -> None:
        for tracker in self._accelerator.trackers:
            tracker.finish()
        threading.excepthook = threading.__excepthook__


class WandB(Tracker):
    """Weights & Biases, through accelerate.

    Its run has the folder's name, in the project that WANDB_PROJECT names or else in `vlmenv`. Its id is kept in the
    folder, so that a resumed run continues it.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def start(self, run: RunFolder, options: Mapping[str, str], step: int) -> None:
        import wandb

        how = {"dir": str(run.path), "name": run.path.name, "id": self._id(run), "resume": "allow"}
        project, told = os.environ.get("WANDB_PROJECT", "vlmenv"), None if step else dict(options)
        try:
            self._accelerator.init_trackers(project, told, {"wandb": how})
        except wandb.Error as error:
            raise ConfigError(f"tracker wandb cannot start, and WANDB_MODE=offline is not set: {error}") from error

    def _id(self, run: RunFolder) -> str:
        known = run.read_json("wandb.json").get("id")
        if known is None and self._accelerator.is_main_process:
            known = secrets.token_hex(4)
            run.write_json("wandb.json", {"id": known})
        return str(known)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._accelerator.log(dict(metrics), step=step)

    def show(self, samples: Sequence[tuple[dict[str, Any], Image]], step: int) -> None:
        import wandb

        terms = list(dict.fromkeys(name for record, _ in samples for name in record["rewards"]))
        columns = ["step", "id", "picture", "prompt", "completion", "reward", *(f"reward/{name}" for name in terms)]
        rows = [
            [
                step,
                record["id"],
                wandb.Image(picture),
                *(record[name] for name in ("prompt", "completion", "reward")),
                *(record["rewards"].get(name) for name in terms),
            ]
            for record, picture in samples
        ]
        self._accelerator.get_tracker("wandb").log_table("samples", columns, rows, step=step)

    def compare(self, before: Mapping[str, float], after: Mapping[str, float], step: int) -> None:
        self._accelerator.get_tracker("wandb", unwrap=True).summary.update(_ends(before, after))

    def close(self, failed: bool) -> None:
        if failed and self._accelerator.is_main_process:
            self._accelerator.get_tracker("wandb", unwrap=True).finish(exit_code=1)
        for tracker in self._accelerator.trackers:
            tracker.finish()


def _ends(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """The metrics of both as `before/NAME` and `after/NAME`."""
    both = (("before", before), ("after", after))
    return {f"{when}/{name}": value for when, metrics in both for name, value in metrics.items()}


def _number(text: str) -> float | str:
    """A number where a text is one, so that TensorBoard orders by it."""
    try:
        return float(text)
    except ValueError:
        return text


MakeTracker = Callable[[Accelerator], Tracker]

TRACKERS: Final[dict[str, MakeTracker | None]] = {"tensorboard": TensorBoard, "wandb": WandB, "none": None}
"""By the name that `--tracker` takes. None: nothing is logged."""
THROUGH_ACCELERATE: Final = ("tensorboard", "wandb")
"""Trackers that an Accelerator has to be made with."""


def register_tracker(name: str, make: MakeTracker) -> None:
    """Makes a tracker known to `--tracker`.

    Args:
        name: Its name.
        make: Its class, or a function that makes it; gets the run's Accelerator.

    Raises:
        ConfigError: The name is taken.
    """
    if name in TRACKERS:
        raise ConfigError(f"a tracker '{name}' is registered already: choose another name")
    TRACKERS[name] = make


def find_tracker(name: str) -> MakeTracker | None:
    """What makes the tracker of a name; `module:Class` imports the module and takes its class.

    Raises:
        ConfigError: There is none, or it is not installed.
    """
    if name not in TRACKERS and ":" in name:
        register_tracker(name, load_name(name, "option tracker"))
    if name not in TRACKERS:
        raise ConfigError(unknown_name("tracker", name, TRACKERS))
    try:
        if name == "wandb":
            version(name)  # an import would also find a folder `wandb` of earlier runs
    except PackageNotFoundError:
        raise ConfigError('tracker wandb needs the extra "tracking": pip install "vlmenv[tracking]"') from None
    return TRACKERS[name]


class Tracking:
    """Keeps a tracker informed of a run.

    Args:
        accelerator: The run's.
        name: The tracker's name. TensorBoard and Weights & Biases need an accelerator made with `log_with`.
        run: The run's folder.
        options: The run's options.
        step: Step after which a resumed run continues; 0 for a new one. TensorBoard hides what it has of later steps.
            Weights & Biases keeps it, and takes those steps no second time.

    Raises:
        ConfigError: The tracker cannot be started.
    """

    def __init__(
        self, accelerator: Accelerator, name: str, run: RunFolder, options: Mapping[str, Any], step: int
    ) -> None:
        self._accelerator, self._name, self._run = accelerator, name, run
        make = find_tracker(name)
        self._tracker = None if make is None else make(accelerator)
        if self._tracker is not None and (name in THROUGH_ACCELERATE or accelerator.is_main_process):
            self._tracker.start(run, {option: str(value) for option, value in options.items()}, step)

    def log(self, result: StepResult, tasks: Mapping[str, VisualTaskEnv], *, samples: bool) -> None:
        """Logs a step's metrics and, with `samples`, the first answers to a few of its samples.

        Args:
            result: The step.
            tasks: The tasks of a mix by name, or a single task under the empty name.
            samples: Whether answers are logged too.

        Raises:
            TrainingError: The tracker's files cannot be written.
        """
        if self._tracker is None or not self._accelerator.is_main_process:
            return
        with self._writing():
            self._tracker.log(result.metrics, result.step)
            if samples:
                self._tracker.show(shown_samples(result, tasks), result.step)

    def compare(self, before: Mapping[str, float], after: Mapping[str, float], step: int) -> None:
        """Logs the held-out metrics before and after training; called on the main rank.

        Raises:
            TrainingError: The tracker's files cannot be written.
        """
        if self._tracker is not None:
            with self._writing():
                self._tracker.compare(before, after, step)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(f"{self._run.path}: the tracker {self._name} cannot write: {error}") from error

    def close(self, *, failed: bool = False) -> None:
        """Ends the tracker's run, once; `failed` marks it."""
        if self._tracker is not None and (self._name in THROUGH_ACCELERATE or self._accelerator.is_main_process):
            self._tracker.close(failed)
        self._tracker = None


def shown_samples(result: StepResult, tasks: Mapping[str, VisualTaskEnv]) -> list[tuple[dict[str, Any], Image]]:
    """Records of the first completion of each task's first samples, with the task's picture of sample and answer.

    Records are of all ranks, those of this one first, and images are of this rank alone.
    """
    records, images = result.rollouts.records, result.rollouts.images
    firsts = {(record.get("task", ""), record["index"]): i for i, record in reversed(list(enumerate(records)))}
    shown: list[tuple[dict[str, Any], Image]] = []
    for name, task in tasks.items():
        own = [i for (of, _), i in reversed(firsts.items()) if of == name]
        if task.unrepeatable:
            own = [i for i in own if i < len(images)]
        shown += [(records[i], _picture(task, records[i], images[i : i + 1])) for i in own[:_NUM_SAMPLES]]
    return shown


def _picture(task: VisualTaskEnv, record: dict[str, Any], episode: Sequence[tuple[Image, ...]]) -> Image:
    """The sample and the answer, or the episode's images if the task cannot show the sample again."""
    if task.unrepeatable:
        drawn = picture_of(episode[0])
    else:
        drawn = task.draw(task.source.get(record["index"]), task.parse(record["completion"]))
    whole = PILImage.fromarray(drawn)
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
