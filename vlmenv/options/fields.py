"""Dataclasses of options: their fields by name, values of the right type, and how files write them.

Options form groups, which are nested dataclasses such as `TrainConfig.data`. Each option's name is unique over all
groups, so files, flags and keyword arguments need no group.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from vlmenv.core.errors import ConfigError
from vlmenv.options.names import unknown_option

T = TypeVar("T")

_KEYWORDS: Final = {"imports": "import"}
"""Fields whose option's name is a keyword of Python."""


@dataclass(frozen=True, slots=True)
class Option:
    """A field of a dataclass of options, or of one of its groups."""

    name: str
    path: tuple[str, ...]
    """names of its groups, from the outermost, and its own name as a field"""
    type: Any
    """as annotated"""


def options_of(config: Any) -> dict[str, Option]:
    """The options of a dataclass instance, those of its groups included, by name."""
    return {option.name: option for option in _options(config, ())}


def _options(config: Any, path: tuple[str, ...]) -> Iterator[Option]:
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, inner = getattr(config, field.name), (*path, field.name)
        if dataclasses.is_dataclass(value):
            yield from _options(value, inner)
        else:
            yield Option(_KEYWORDS.get(field.name, field.name), inner, hints[field.name])


def value_of(config: Any, option: Option) -> Any:
    """The value of an option."""
    for name in option.path:
        config = getattr(config, name)
    return config


def flatten(config: Any) -> dict[str, Any]:
    """The options of a dataclass instance by name, as values that YAML and JSON can hold."""
    return {name: plain(value_of(config, option)) for name, option in options_of(config).items()}


def plain(value: Any) -> Any:
    """A value as YAML and JSON can hold it. Paths become absolute."""
    if isinstance(value, tuple | list):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return str(value.absolute()) if isinstance(value, Path) else value


def replaced(config: T, values: Mapping[str, Any], place: str = "") -> T:
    """A dataclass instance with other values for some options.

    Args:
        config: The instance, whose groups are replaced too.
        values: Values by option name, as Python or YAML write them.
        place: Start of error messages, such as the name of a file.

    Raises:
        ConfigError: A name is unknown, a value has the wrong type, or the values do not go together.
    """
    known = options_of(config)
    for name in values:
        if name not in known:
            raise ConfigError(f"{place}{': ' * bool(place)}{unknown_option(name, known)}")
    typed = {known[name].path: convert(value, known[name].type, name, place) for name, value in values.items()}
    return _rebuilt(config, typed)


def _rebuilt(config: T, values: Mapping[tuple[str, ...], Any]) -> T:
    """The instance with values by path. Every dataclass is made once, so that it checks its final values."""
    changed: dict[str, Any] = {path[0]: value for path, value in values.items() if len(path) == 1}
    for group in {path[0] for path in values if len(path) > 1}:
        inner = {path[1:]: value for path, value in values.items() if path[0] == group}
        changed[group] = _rebuilt(getattr(config, group), inner)
    return dataclasses.replace(config, **changed)  # type: ignore[type-var]


def convert(value: Any, kind: Any, name: str, place: str = "") -> Any:
    """Converts a value of YAML or Python to an option's type: lists to tuples, texts to paths, integers to floats.

    Raises:
        ConfigError: The value has another type; the message names `place` and the option.
    """
    try:
        return _converted(value, kind)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{place}{': ' * bool(place)}{name} must be {described(kind)}, not {value!r}") from error


def takes_several(kind: Any) -> bool:
    """True for an option whose value is a list or a mapping."""
    return get_origin(kind) in (tuple, dict) or any(map(takes_several, get_args(kind)))


def _converted(value: Any, kind: Any) -> Any:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None and type(None) in parts else _first(value, parts)
    if origin is Literal:
        return _one_of(value, parts)
    if origin is tuple:
        given = [value] if isinstance(value, str | Path) else value
        return tuple(_converted(one, parts[0]) for one in _a(Sequence, given))
    if origin is dict:
        return {_converted(key, parts[0]): _converted(one, parts[1]) for key, one in _a(Mapping, value).items()}
    return _scalar(value, kind)


def _first(value: Any, kinds: Sequence[Any]) -> Any:
    """The value as the first type that accepts it; exact matches go first."""
    exact = [kind for kind in kinds if isinstance(kind, type) and type(value) is kind]
    for kind in [*exact, *(kind for kind in kinds if kind is not type(None))]:
        try:
            return _converted(value, kind)
        except (TypeError, ValueError):
            continue
    raise TypeError(value)


def _one_of(value: Any, known: Sequence[Any]) -> Any:
    if value not in known or type(value) is not type(known[known.index(value)]):
        raise ValueError(value)
    return value


def _a(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(value)
    return value


def _scalar(value: Any, kind: Any) -> Any:
    if kind is Any or type(value) is kind:
        return value
    if kind is float and not isinstance(value, bool):
        return float(_a((int, float, str), value))  # YAML reads 1e-6 as a text
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool):  # in Python bool is a subclass of int
        raise TypeError(value)
    if kind is Path:
        return Path(_a((str, Path), value))
    return _a(kind, value)


_WORDS: Final = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}


def described(kind: Any) -> str:
    """A type in words, for error messages."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else described(part) for part in parts)
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin is tuple:
        return f"a list of which each is {described(parts[0])}"
    if origin is dict:
        return f"a mapping from {described(parts[0])} to {described(parts[1])}"
    return str(_WORDS.get(kind, kind))
