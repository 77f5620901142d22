"""Keeps what a run's report shows, while the run goes on, and writes the report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from rich.console import Console

from vlmenv.core.console import warn
from vlmenv.core.errors import VLMEnvError
from vlmenv.envs.vector import VisualTaskVectorEnv
from vlmenv.evaluation import Evaluation
from vlmenv.runs.album import Album, Part, groups_shown, is_right
from vlmenv.runs.report import write_report
from vlmenv.runs.run_folder import RunFolder

MOST_MEASURED: Final = 1000
"""Samples of an evaluation whose pictures are kept."""


class Keeping:
    """Keeps pictures and verdicts of completions, and writes RUN/report.html.

    Nothing that fails in this ends training: it is told once, and nothing more is kept.

    Args:
        run: The run's folder.
        envs: Environments of training.
        held_out: Environments of measuring. None: nothing is measured.
        steps: Steps of the run.
        console: Where a failure is told.
        active: If false, nothing is kept, as on ranks other than the main one.
    """

    def __init__(
        self,
        run: RunFolder,
        envs: VisualTaskVectorEnv,
        held_out: VisualTaskVectorEnv | None,
        steps: int,
        console: Console,
        *,
        active: bool,
    ) -> None:
        self._run, self._envs, self._held_out = run, envs, held_out
        self._steps, self._console, self._active = steps, console, active
        self._albums: dict[str, Album] = {}

    def completions(self, step: int, records: list[dict[str, Any]]) -> None:
        """Keeps the samples of a step's first groups, and sets `right` in the records of their completions."""
        if not self._active:
            return
        size, task = self._envs.group_size, self._envs.task
        shown = records[: size * groups_shown(step, self._steps, size)]
        with self._harmless():
            indices = [one["index"] for one in shown if one["index"] is not None]
            samples = self._album("train").keep(indices, self._envs.shown)
            for one in shown:
                if (sample := samples.get(one["index"])) is not None:
                    one["right"] = is_right(task, sample, one["completion"], one["rewards"])

    def evaluation(self, evaluation: Evaluation) -> None:
        """Keeps the samples of an evaluation."""
        if self._active:
            with self._harmless():
                album, answers = self._album("eval"), evaluation.answers[:MOST_MEASURED]
                album.keep([one["index"] for one in answers if album.lacks(one["index"], one["id"])])

    def report(self) -> bool:
        """Writes report.html anew. Returns false if it is not kept."""
        if self._active:
            with self._harmless():
                write_report([self._run.path], self._run.path / "report.html")
        return self._active

    def _album(self, part: Part) -> Album:
        if part not in self._albums:
            envs = self._envs if part == "train" else self._held_out
            assert envs is not None
            self._albums[part] = Album(self._run.path / "samples", envs.task, part)
        return self._albums[part]

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        """Tells of what fails in the block, and keeps nothing more."""
        try:
            yield
        except Exception as error:  # a task's own code may raise anything
            told = str(error) if isinstance(error, VLMEnvError) else f"{type(error).__name__}: {error}"
            self._active = False
            with suppress(OSError):  # what is printed may go to the disk that is full
                warn(f"the report is not kept any more, training goes on: {told}", self._console)
