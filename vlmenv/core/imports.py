"""Imports of users' modules and of what they define, by name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlmenv.core.errors import ConfigError


def import_module(name: str, what: str = "module") -> Any:
    """Imports a module, from the working directory too.

    Args:
        name: Of the module, with dots.
        what: What it is imported for, for the error message.

    Raises:
        ConfigError: It cannot be imported.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever the user's code raises
        cause = f"{type(error).__name__}: {error}"
        raise ConfigError(f"the module '{name}' of the {what} cannot be imported: {cause}") from error


def import_modules(names: Iterable[str]) -> None:
    """Imports modules that register tasks, rewards, algorithms or families.

    Raises:
        ConfigError: One cannot be imported.
    """
    for name in names:
        import_module(name, "option import")


def find_object(name: str, what: str) -> Any:
    """What a module defines under a name, given as `module:name`.

    Args:
        name: Module and name.
        what: What it is, for the error message.

    Raises:
        ConfigError: The module cannot be imported, or does not define the name.
    """
    module, _, attribute = name.partition(":")
    found = import_module(module, what)
    if not hasattr(found, attribute):
        raise ConfigError(f"the module '{module}' defines no {what} '{attribute}'")
    return getattr(found, attribute)
