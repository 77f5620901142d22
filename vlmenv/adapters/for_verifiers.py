"""verifiers: a task as a taskset, whose tasks are its samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vlmenv.adapters.task import PortableTask, image_url, imported, messages


def verifiers(env: str, *, rows: int | None = None, seed: int = 0, **arguments: Any) -> type:
    """A `Taskset` class of verifiers' v1 interface.

    Args:
        env: Id of a visual task.
        rows: Number of samples. Default: all of a data set.
        seed: Seed of the samples and their order.
        arguments: The task's own arguments, as for `gymnasium.make`.

    Raises:
        ConfigError: verifiers is not installed, an argument does not fit, or the task has episodes of several turns.
        DataError: The data set cannot be read.
    """
    vf: Any = imported("verifiers.v1", "verifiers", "verifiers")
    task = PortableTask(env, **arguments)
    task.require_one_turn("a taskset of verifiers asks for a single reply")

    class Data(vf.TaskData):  # type: ignore[misc]
        """A sample's prompt, and its number."""

        index: int

    class Sample(vf.Task[Data]):  # type: ignore[misc]
        """A sample."""

        @vf.reward  # type: ignore[untyped-decorator]
        async def score(self, trace: Any) -> float:
            """The weighted reward of the last reply."""
            return task.score([trace.last_reply or ""], [self.data.index])[0].reward

    class Samples(vf.Taskset[Sample, vf.TasksetConfig]):  # type: ignore[misc]
        """Samples of the task."""

        def load(self) -> Iterator[Any]:
            for index, observation in task.readable(task.indices(rows, seed)):
                yield Sample(Data(prompt=messages(observation, image_url), index=index), self.config.task)

    return Samples
