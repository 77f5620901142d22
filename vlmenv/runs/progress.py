"""The progress line of a training run."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vlmenv.algos.batch import NO_TERMS
from vlmenv.core.console import say

_EVERY = 10


class TrainingProgress:
    """Shows step, reward, tokens per second and remaining time. Every tenth step stays on the screen.

    Args:
        console: Console to write to.
        steps: Number of steps of the run.
    """

    def __init__(self, console: Console, steps: int) -> None:
        self._steps = steps
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("reward {task.fields[reward]:.3f}  {task.fields[speed]:.0f} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._bar = self._progress.add_task("training", total=steps, reward=float("nan"), speed=0.0)

    def __enter__(self) -> TrainingProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, step: int, metrics: dict[str, float]) -> None:
        """Updates the line after a step."""
        reward, speed = metrics["reward/mean"], metrics["tokens_per_second"]
        self._progress.update(self._bar, completed=step, reward=reward, speed=speed)
        if step == 1 or step % _EVERY == 0 or step == self._steps:
            terms = "  ".join(f"{name.removeprefix('reward/')} {metrics[name]:.3f}" for name in _terms(metrics))
            say(
                f"step {step:>4}/{self._steps}  reward {reward:.3f}  ({terms})  "
                f"length {metrics['completion/length']:.1f}  {speed:.0f} tokens/s",
                self._progress.console,
            )


def _terms(metrics: dict[str, float]) -> list[str]:
    return [n for n in metrics if n.startswith("reward/") and n not in ("reward/mean", *NO_TERMS)]
