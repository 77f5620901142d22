"""TRL: a data set and a reward function for `GRPOTrainer`, `RLOOTrainer` and their kin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vlmenv.adapters.task import PortableTask, completion_text, imported, messages, picture

RewardFunction = Callable[..., list[float]]


@dataclass(frozen=True)
class TRLSpec:
    """What a TRL trainer takes, by the names of its arguments."""

    train_dataset: Any
    """a `datasets.Dataset` with `prompt` (messages), `images` and `index`; images are loaded when a row is read"""
    reward_funcs: list[RewardFunction]
    """one function: the weighted reward of each completion; it logs each term as a metric"""


def trl(env: str, *, rows: int | None = None, seed: int = 0, **arguments: Any) -> TRLSpec:
    """Hands a task to TRL.

    Example::

        spec = vlmenv.adapters.trl("VLM-REC-v0", rows=2048, coordinates="norm1000")
        GRPOTrainer(model, args=args, train_dataset=spec.train_dataset, reward_funcs=spec.reward_funcs)

    Args:
        env: Id of a visual task.
        rows: Number of rows. Default: all of a data set.
        seed: Seed of the samples and their order.
        arguments: The task's own arguments, as for `gymnasium.make`. `coordinates` is the model's convention.

    Raises:
        ConfigError: `datasets` is not installed, or an argument does not fit.
        DataError: The data set cannot be read.
    """
    datasets = imported("datasets", "datasets", "trl")
    task = PortableTask(env, **arguments)
    indices = task.indices(rows, seed)
    if task.task.skip_broken:
        indices = [index for index, _ in task.readable(indices)]
    rows_by_index = datasets.Dataset.from_dict({"index": indices})
    return TRLSpec(rows_by_index.with_transform(_Rows(task)), [_reward(task)])


class _Rows:
    """Makes rows of sample numbers when they are read."""

    def __init__(self, task: PortableTask) -> None:
        self._task = task

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        seen = [self._task.observation(index) for index in batch["index"]]
        return {
            "prompt": [messages(one, lambda _: {"type": "image"}) for one in seen],
            "images": [[picture(image) for image in one["images"]] for one in seen],
            "index": batch["index"],
        }


def _reward(task: PortableTask) -> RewardFunction:
    def reward(
        completions: Sequence[Any],
        index: Sequence[int],
        log_metric: Callable[[str, float], None] | None = None,
        **_: Any,
    ) -> list[float]:
        scores = task.score([completion_text(one) for one in completions], index)
        if log_metric is not None:
            for name in scores[0].terms if scores else ():
                values = [score.terms[name] for score in scores if name in score.terms]
                log_metric(f"rewards/{name}", sum(values) / len(values))
        return [score.reward for score in scores]

    reward.__name__ = task.env.rpartition(":")[2]
    return reward
