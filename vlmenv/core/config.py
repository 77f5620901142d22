"""Dataclasses as options: from the command line, from YAML, and back to YAML.

A nested dataclass's fields are options like the others, under their own names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vlmenv.core.errors import ConfigError, unknown_name


def flatten(config: Any) -> dict[str, Any]:
    """The options of a dataclass instance, nested ones included, as values that YAML can hold."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flat |= flatten(value) if dataclasses.is_dataclass(value) else {field.name: _plain(value)}
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return str(value.absolute()) if isinstance(value, Path) else value


def to_yaml(config: Any, without: Sequence[str] = ()) -> str:
    """The options of a dataclass instance as YAML, one a line."""
    kept = {name: value for name, value in flatten(config).items() if name not in without}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)


def with_config_file(args: Sequence[str], known: Sequence[str]) -> list[str]:
    """Puts the options of the file that `--config` names before the other arguments, which then win.

    Args:
        args: Command-line arguments.
        known: The names of the options.

    Raises:
        ConfigError: The file cannot be read, or holds an unknown option.
    """
    path = _config_path(args)
    return list(args) if path is None else [*_as_arguments(_read(path), path, known), *args]


def option_value(args: Sequence[str], name: str) -> str | None:
    """The value of an option on the command line, or else in the file that `--config` names; None without one.

    Raises:
        ConfigError: The file cannot be read.
    """
    found = [arg.partition("=")[2] for arg in args if arg.startswith(f"--{name}=")]
    found += [args[i + 1] for i, arg in enumerate(args[:-1]) if arg == f"--{name}"]
    path = _config_path(args)
    stored = None if found or path is None else _read(path).get(name)
    return found[-1] if found else None if stored is None else str(stored)


def gathered(args: Sequence[str], name: str) -> list[str]:
    """The same arguments, with all values of an option that is given several times behind one."""
    values: list[str] = []
    others: list[str] = []
    into = others
    for arg in args:
        flag, _, value = arg.partition("=")
        if flag == f"--{name}":
            into = values
            into += [value] if value else []
            continue
        into = others if arg.startswith("-") else into
        into.append(arg)
    return [*others, f"--{name}", *values] if values else list(args)


def _config_path(args: Sequence[str]) -> Path | None:
    paths = [arg.partition("=")[2] for arg in args if arg.startswith("--config=")]
    paths += [args[i + 1] for i, arg in enumerate(args[:-1]) if arg == "--config"]
    if len(paths) > 1:
        raise ConfigError(f"--config was given {len(paths)} times: {', '.join(paths)}")
    return Path(paths[0]) if paths else None


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the options cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a file of options holds 'name: value' lines, not a {type(content).__name__}")
    return content


def _as_arguments(options: Mapping[str, Any], path: Path, known: Sequence[str]) -> Iterator[str]:
    for name, value in options.items():
        if name == "config" or str(name).replace("-", "_") not in known:
            raise ConfigError(f"{path}: {unknown_name('option', str(name), set(known) - {'config'})}")
        flag = str(name).replace("_", "-")
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        elif isinstance(value, dict):
            yield f"--{flag}"
            yield from (str(part) for item in value.items() for part in item)
        elif isinstance(value, list):
            yield f"--{flag}"
            yield from map(str, value)
        else:
            yield f"--{flag}={value}"
