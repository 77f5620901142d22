"""Output folders of work that can be continued: each belongs to the options that it was begun with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from accelerate import Accelerator
from rich.console import Console

from vlmenv.core.console import say
from vlmenv.core.errors import ConfigError
from vlmenv.core.files import write_atomic
from vlmenv.options.evaluate import AnswerConfig
from vlmenv.options.fields import flatten, options_of
from vlmenv.options.files import read_options, to_yaml
from vlmenv.options.names import own_name
from vlmenv.options.task import EngineOptions
from vlmenv.processes.failures import shared_failure
from vlmenv.runs.lock import locked

_FREE: Final = (
    "recipe",
    "config",
    "output",
    "data_changed",
    "suite_data",
    "batch_size",
    "device",
    *options_of(EngineOptions()),
)
"""Options that may change while the work goes on."""


@contextmanager
def alone_in(folder: Path | None, accelerator: Accelerator, console: Console) -> Iterator[None]:
    """Locks an output folder for the block, on the main rank. A collective. None: there is nothing to lock.

    Raises:
        ConfigError: Another process writes into the folder.
    """
    with ExitStack() as opened:
        with shared_failure(accelerator):
            if accelerator.is_main_process and folder is not None:
                opened.enter_context(locked(folder, lambda line: say(f"warning: {line}", console)))
        yield


def claim(folder: Path, config: AnswerConfig, begun: bool) -> None:
    """Binds an output folder to its options, or checks that it was begun with the same ones.

    Args:
        folder: The folder, which need not exist. It gets a config.yaml.
        config: The options. Engine, device and batch size may differ between calls.
        begun: True if the folder holds results already; only then its options count.

    Raises:
        ConfigError: The folder holds results of other options.
    """
    file = folder / "config.yaml"
    new = {name: value for name, value in flatten(config.located()).items() if name not in _FREE}
    if begun and file.is_file():
        old = {own_name(name, new): value for name, value in read_options(file).items()}
        names = [name for name in {**old, **new} if name not in _FREE]
        if other := [name for name in names if old.get(name) != new.get(name)]:
            raise ConfigError(
                f"{folder} holds results with another {', '.join(other)}, see {file}: give another --output"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(file, to_yaml(new))
