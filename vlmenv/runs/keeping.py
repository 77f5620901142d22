"""Keeps what a run's report shows, while the run goes on, and writes the report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from rich.console import Console

from vlmenv.core.console import warn
from vlmenv.core.errors import VLMEnvError
from vlmenv.envs.mixed import by_task
from vlmenv.evaluation import Evaluation
from vlmenv.runs.album import Album, Part, groups_shown, is_right
from vlmenv.runs.by_task import Envs
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
        envs: Envs,
        held_out: Envs | None,
        steps: int,
        console: Console,
        *,
        active: bool,
    ) -> None:
        self._run, self._envs, self._held_out = run, envs, held_out
        self._steps, self._console, self._active = steps, console, active
        self._albums: dict[tuple[str, str], Album] = {}

    def completions(self, step: int, records: list[dict[str, Any]]) -> None:
        """Keeps the samples of a step's first groups, and sets `right` in the records of their completions."""
        if not self._active:
            return
        size = self._envs.group_size
        for name, envs in by_task(self._envs).items():
            shown = [one for one in records if one.get("task", "") == name]
            shown = shown[: size * groups_shown(step, self._steps, size)]
            with self._harmless():
                indices = [one["index"] for one in shown if one["index"] is not None]
                samples = self._album("train", name).keep(indices, envs.shown)
                for one in shown:
                    if (sample := samples.get(one["index"])) is not None:
                        one["right"] = is_right(envs.task, sample, one["completion"], one["rewards"])

    def evaluation(self, evaluation: Evaluation) -> None:
        """Keeps the samples of an evaluation."""
        for name in by_task(self._held_out) if self._active else ():
            with self._harmless():
                answers = [one for one in evaluation.answers if one.get("task", "") == name][:MOST_MEASURED]
                album = self._album("eval", name)
                album.keep([one["index"] for one in answers if album.lacks(one["index"], one["id"])])

    def report(self) -> bool:
        """Writes report.html anew. Returns false if it is not kept."""
        if self._active:
            with self._harmless():
                write_report([self._run.path], self._run.path / "report.html")
        return self._active

    def _album(self, part: Part, name: str) -> Album:
        if (part, name) not in self._albums:
            envs = by_task(self._envs if part == "train" else self._held_out)[name]
            self._albums[part, name] = Album(self._run.path / "samples", envs.task, part, name)
        return self._albums[part, name]

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
