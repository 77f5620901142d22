"""Model folders with another processor: that of adapters, or one with other limits of pixels."""

from __future__ import annotations

import atexit
import functools
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from vlmenv.agents.checkpoints import find_adapter, find_model
from vlmenv.agents.families import family_of
from vlmenv.agents.families.base import read_json
from vlmenv.core.errors import ModelError
from vlmenv.core.pixels import PixelLimits

_PROCESSOR: Final = re.compile(
    r"(?:(?:video_)?(?:pre)?processor_config|tokenizer|special_tokens_map|added_tokens|chat_template|vocab|merges)"
    r".*\.(?:json|jinja|txt|model)"
)
"""Names of a processor's files."""
_FILES: Final = ("preprocessor_config.json", "processor_config.json")


def with_limits(folder: Path, limits: PixelLimits) -> Path:
    """A folder of the same model whose image processor has the given limits; without limits the folder itself.

    All that read it see images alike: the trainer, the published processor, vLLM, and who loads a saved checkpoint. Its
    files are links but for the processor's configuration. It lasts as long as this process.

    Raises:
        ConfigError: The model's family has no such limits, or they contradict the processor's others.
        ModelError: The configuration cannot be read.
    """
    return _limited(folder, limits) if limits.given else folder


def prepared_folder(name_or_path: str | Path, limits: PixelLimits) -> Path:
    """The folder of a model that all read who show it prompts and images.

    Adapters whose folder has a processor of its own are shown images by that one, on their base model's weights.

    Args:
        name_or_path: See `find_model`.
        limits: Limits of pixels, or none.

    Raises:
        ConfigError: See `with_limits`.
        ModelError: There is no such model, or its configuration cannot be read.
    """
    base, adapter = find_model(name_or_path), find_adapter(name_or_path)
    return with_limits(base if adapter is None else _with_processor(base, adapter), limits)


@functools.cache
def _with_processor(base: Path, adapter: Path) -> Path:
    own = {file.name: file.read_text(encoding="utf-8") for file in adapter.iterdir() if _PROCESSOR.match(file.name)}
    same = (base / name for name in own)
    stored = {file.name: file.read_text(encoding="utf-8") for file in same if file.is_file()}
    return base if own == stored else _linked(base, own)


@functools.cache
def _limited(folder: Path, limits: PixelLimits) -> Path:
    return _linked(folder, {name: json.dumps(settings, indent=2) + "\n" for name, settings in _changed(folder, limits)})


def _linked(folder: Path, changed: Mapping[str, str]) -> Path:
    """A folder with links to a folder's files and some files of its own."""
    copy = Path(tempfile.mkdtemp(prefix="vlmenv-model-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    for file in folder.iterdir():
        if file.name not in changed:
            (copy / file.name).symlink_to(file.absolute())
    for name, text in changed.items():
        (copy / name).write_text(text, encoding="utf-8")
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
