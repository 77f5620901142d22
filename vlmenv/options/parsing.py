"""Flags of the command line: their names, and how they become a dataclass of options. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import tyro

from vlmenv.core.console import open_console, say
from vlmenv.core.errors import ConfigError
from vlmenv.core.text import visible
from vlmenv.options.fields import Option, options_of, takes_several
from vlmenv.options.names import own_name, unknown_option


def parse(args: Sequence[str], default: Any, program: str) -> Any:
    """Parses flags into a dataclass of options.

    Args:
        args: The arguments after the command's name.
        default: An instance with the defaults, of the type of the result.
        program: Name in help and errors.

    Raises:
        SystemExit: Help was asked for, or a value cannot be read.
    """
    kind: Any = type(default)
    if hasattr(default, "algorithm"):
        kind = kind[type(default.algorithm)]
    options: dict[str, Any] = {"default": default, "prog": program, "config": (tyro.conf.OmitArgPrefixes,)}
    try:
        return tyro.cli(kind, args=list(args), console_outputs=False, **options)
    except SystemExit:  # the error repeats what was typed, which must not change the terminal
        tyro.cli(kind, args=[visible(arg) for arg in args], **options)
        raise


def parse_plain(args: Sequence[str], default: Any, program: str) -> Any:
    """Parses the flags of a command that reads no files of options.

    Raises:
        ConfigError: A flag is no option, or options do not go together.
        SystemExit: As for `parse`.
    """
    return parse(renamed(args, options_of(default), lambda line: say(line, open_console())), default, program)


def renamed(
    args: Sequence[str],
    known: Mapping[str, Option],
    tell: Callable[[str], object],
    unknown: Callable[[str, Collection[str]], str] = unknown_option,
) -> list[str]:
    """Arguments with aliases replaced. The values of a repeated flag are joined behind one flag.

    Args:
        args: The arguments.
        known: All options by name.
        tell: Takes a line about each alias.
        unknown: Returns the message about an unknown flag.

    Raises:
        ConfigError: A flag is no option.
    """
    words: list[str] = []
    flags: dict[str, list[str]] = {}
    into = words
    for arg in args:
        if not arg.startswith("--"):
            into.append(arg)
            continue
        flag, equals, value = arg[2:].partition("=")
        name = own_name(flag, known)
        if name != flag.replace("-", "_"):
            tell(f"--{flag} is --{name.replace('_', '-')} here")
        if name not in known and name != "help" and name.removeprefix("no_") not in known:
            raise ConfigError(unknown(name, known))
        if name in known and not takes_several(known[name].type):
            flags.pop(name, None)  # the last one counts
        into = flags.setdefault(name, [])
        into += [value] if equals else []
    joined = (_as_arguments(name, values) for name, values in flags.items())
    return [*words, *(arg for part in joined for arg in part)]


def _as_arguments(name: str, values: Sequence[str]) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    return [f"{flag}={values[0]}"] if len(values) == 1 else [flag, *values]


def names_of(args: Sequence[str]) -> set[str]:
    """The names of all flags among arguments."""
    names = {arg[2:].partition("=")[0].replace("-", "_") for arg in args if arg.startswith("--")}
    return names - {"help"}


def values_of(args: Sequence[str], name: str) -> list[str]:
    """The values after all flags of a name."""
    found: list[str] = []
    taking = False
    for arg in args:
        if arg.startswith("--"):
            flag, _, value = arg[2:].partition("=")
            taking = flag.replace("-", "_") == name
            found += [value] if taking and value else []
        elif taking:
            found.append(arg)
    return found


def single_value(args: Sequence[str], name: str) -> str | None:
    """The value of a flag; None if it is not given.

    Raises:
        ConfigError: It is given more than once.
    """
    values = values_of(args, name)
    if len(values) > 1:
        raise ConfigError(f"--{name} was given {len(values)} times: {', '.join(values)}")
    return values[0] if values else None
