"""Model folders whose image processor has other limits of pixels."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from vlmenv.agents.families import family_of
from vlmenv.agents.families.base import read_json
from vlmenv.core.errors import ModelError
from vlmenv.core.pixels import PixelLimits

_FILES: Final = ("preprocessor_config.json", "processor_config.json")


def with_limits(folder: Path, limits: PixelLimits) -> Path:
    """A folder of the same model whose image processor has the given limits; without limits the folder itself.

    All that read it see images alike: the trainer, the published processor, vLLM, and who loads a saved checkpoint. Its
    files are links but for the processor's configuration. It lasts as long as this process.

    Raises:
        ConfigError: The model's family has no such limits, or they contradict the processor's others.
        ModelError: The configuration cannot be read.
    """
    return _linked(folder, limits) if limits.given else folder


@functools.cache
def _linked(folder: Path, limits: PixelLimits) -> Path:
    changed = dict(_changed(folder, limits))
    copy = Path(tempfile.mkdtemp(prefix="vlmenv-model-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    for file in folder.iterdir():
        if file.name not in changed:
            (copy / file.name).symlink_to(file.absolute())
    for name, settings in changed.items():
        (copy / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return copy


def _changed(folder: Path, limits: PixelLimits) -> Iterator[tuple[str, dict[str, Any]]]:
    """The processor's configuration files with the limits."""
    try:
        family = family_of(read_json(folder / "config.json").get("model_type", ""))
        stored = {name: read_json(folder / name) for name in _FILES if (folder / name).is_file()}
    except OSError as error:
        raise ModelError(f"{folder}: the model's configuration cannot be read: {error}") from error
    for name, settings in stored.items():
        if name == "preprocessor_config.json":
            yield name, family.limited(settings, limits)
        elif "image_processor" in settings:
            yield name, settings | {"image_processor": family.limited(settings["image_processor"], limits)}
