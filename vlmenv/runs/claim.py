"""Output folders of work that can be continued: each belongs to the options that it was begun with."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from vlmenv.core.errors import ConfigError
from vlmenv.core.files import write_atomic
from vlmenv.options.evaluate import AnswerConfig
from vlmenv.options.fields import flatten, options_of
from vlmenv.options.files import read_options, to_yaml
from vlmenv.options.names import own_name
from vlmenv.options.task import EngineOptions

_FREE: Final = ("recipe", "config", "output", "suite_data", "batch_size", "device", *options_of(EngineOptions()))
"""Options that may change while the work goes on."""


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
