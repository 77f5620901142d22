"""YAML files of options: recipes, pipelines, a run's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from vlmenv.core.errors import ConfigError, unknown_name


def to_yaml(options: Mapping[str, Any]) -> str:
    """Options as YAML, one a line."""
    return yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True)


def read_options(path: Path) -> dict[str, Any]:
    """The content of a YAML file of options, with underscores in its names.

    Raises:
        ConfigError: It cannot be read, or is no mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the options cannot be read: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that does not exist
        raise ConfigError(f"{path}: not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a file of options holds 'name: value' lines, not a {type(content).__name__}")
    return {str(name).replace("-", "_"): value for name, value in content.items()}


def packaged_files(kind: str) -> dict[str, Path]:
    """The YAML files that come with the package, by name.

    Args:
        kind: "recipe" or "pipeline".
    """
    folder = Path(str(files("vlmenv"))) / f"{kind}s"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def packaged_file(kind: str, name: str) -> Path:
    """The YAML file of a "recipe" or a "pipeline" that comes with the package.

    Raises:
        ConfigError: There is none of this name.
    """
    known = packaged_files(kind)
    if name not in known:
        raise ConfigError(unknown_name(kind, name, known))
    return known[name]


def as_arguments(options: Mapping[str, Any]) -> Iterator[str]:
    """Options in the form of a command line."""
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        elif isinstance(value, dict):
            yield f"--{flag}"
            yield from (str(part) for item in value.items() for part in item)
        elif isinstance(value, list | tuple):
            yield f"--{flag}"
            yield from map(str, value)
        else:
            yield f"--{flag}={value}"
