"""Dataclasses as options: from the command line, from YAML, and back to YAML.

A nested dataclass's fields are options like the others, under their own names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.resources import files
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


Rivals = Sequence[tuple[str, str]]
"""Pairs of options of which one takes the place of the other."""


def with_config_file(
    args: Sequence[str], known: Sequence[str], rivals: Rivals = (), passed_over: Collection[str] = ()
) -> list[str]:
    """Puts the options of the files that `--recipe` and `--config` name before the other arguments.

    What is given on the command line wins over the file of `--config`, and that over the recipe; so it is with rivals.

    Args:
        args: Command-line arguments.
        known: The names of the options.
        rivals: Options that are not given together.
        passed_over: Names of other options, which the file may hold for another command.

    Raises:
        ConfigError: A file cannot be read or holds an unknown option, there is no such recipe, or rivals are given
            together.
    """
    merged: dict[str, Any] = {}
    for path in _option_files(args):
        options = _known_options(read_options(path), path, known, passed_over)
        _displace(merged, {name for name, value in options.items() if value is not None}, rivals, str(path))
        merged |= options
    _displace(merged, {arg[2:].partition("=")[0].replace("-", "_") for arg in args if arg[:2] == "--"}, rivals, "")
    return [*as_arguments(merged), *args]


def _displace(options: dict[str, Any], given: set[str], rivals: Rivals, place: str) -> None:
    """Takes out of options those that rivals of theirs, given later, take the place of."""
    for pair in rivals:
        if given.issuperset(pair):
            raise ConfigError(f"{place}{': ' * bool(place)}{' and '.join(pair)} were both given: leave one of them out")
        for name, rival in (pair, pair[::-1]):
            if rival in given:
                options.pop(name, None)


def option_value(args: Sequence[str], name: str) -> str | None:
    """The value of an option on the command line, or else in the files that it names; None without one.

    Raises:
        ConfigError: A file cannot be read, or there is no such recipe.
    """
    found = [arg.partition("=")[2] for arg in args if arg.startswith(f"--{name}=")]
    found += [args[i + 1] for i, arg in enumerate(args[:-1]) if arg == f"--{name}"]
    if found:
        return found[-1]
    stored = [value for path in _option_files(args) if (value := read_options(path).get(name)) is not None]
    return str(stored[-1]) if stored else None


def packaged_file(kind: str, name: str) -> Path:
    """A YAML file that comes with the package: a "recipe" or a "pipeline" of this name.

    Raises:
        ConfigError: There is none.
    """
    folder = Path(str(files("vlmenv"))) / f"{kind}s"
    known = {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    if name not in known:
        raise ConfigError(f"unknown {kind} '{name}'. There are: {', '.join(known)} (in {folder})")
    return known[name]


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


def _option_files(args: Sequence[str]) -> list[Path]:
    """The recipe and the file of options that arguments name, as far as they do."""
    recipe, config = _only(args, "recipe"), _only(args, "config")
    recipes = [] if recipe is None else [packaged_file("recipe", recipe)]
    return recipes + ([] if config is None else [Path(config)])


def _only(args: Sequence[str], name: str) -> str | None:
    given = [arg.partition("=")[2] for arg in args if arg.startswith(f"--{name}=")]
    given += [args[i + 1] for i, arg in enumerate(args[:-1]) if arg == f"--{name}"]
    if len(given) > 1:
        raise ConfigError(f"--{name} was given {len(given)} times: {', '.join(given)}")
    return given[0] if given else None


def read_options(path: Path) -> dict[str, Any]:
    """What a YAML file of options holds.

    Raises:
        ConfigError: It cannot be read, or is no mapping.
    """
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


def _known_options(
    options: Mapping[str, Any], path: Path, known: Sequence[str], passed_over: Collection[str]
) -> dict[str, Any]:
    """A file's options by their names as fields."""
    named = {str(name).replace("-", "_"): value for name, value in options.items()}
    for name in named:
        if name in _NAMING:
            raise ConfigError(f"{path}: '{name}' has no place in a file of options: give it on the command line")
    found = {name: value for name, value in named.items() if name not in passed_over}
    for name in found:
        if name not in known:
            raise ConfigError(f"{path}: {unknown_name('option', name, set(known) - _NAMING)}")
    return found


_NAMING = {"config", "recipe", "resume"}
"""Options that name files of options, or a run with its own, and so cannot be among those of a file."""


def as_arguments(options: Mapping[str, Any]) -> Iterator[str]:
    """Options as they are given on the command line."""
    for name, value in options.items():
        flag = name.replace("_", "-")
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
