"""Private parts of TensorBoard: the records of its table of hyperparameters, which PyTorch makes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from vlmenv.compat import Use


def hyperparameters(options: Mapping[str, float | str], metrics: Mapping[str, float]) -> tuple[Any, ...]:
    """The records of a run's row, for a writer's `file_writer.add_summary`; empty if they cannot be made.

    Args:
        options: Options by name.
        metrics: The table's metrics by tag. Empty: the run goes on, and its metrics are not known yet.
    """
    with suppress(Exception):  # `USES` tells
        return _records(options, metrics)
    return ()


def _records(options: Mapping[str, float | str], metrics: Mapping[str, float]) -> tuple[Any, ...]:
    from torch.utils.tensorboard.summary import hparams  # here, as it imports TensorBoard

    make: Any = hparams
    experiment, begin, end = make(dict(options), dict(metrics))
    return (experiment, begin, end) if metrics else (begin,)


def _check_records() -> str | None:
    tags = [one.value[0].tag for one in _records({"lr": 0.1, "algo": "grpo"}, {"after": 1.0})]
    return None if tags[0] == "_hparams_/experiment" else f"the records are {tags}"


USES: Final = (Use("hyperparameters", _check_records, "TensorBoard has no table of hyperparameters"),)
