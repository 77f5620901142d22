"""Finds objects named as `module:name`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from vlmenv.core.errors import ConfigError, unknown_name


def import_module(module: str, what: str) -> ModuleType:
    """Imports a user's module, from the working directory too.

    Args:
        module: Its dotted name.
        what: What it is needed for, for messages.

    Raises:
        ConfigError: There is no such module, or it cannot be imported.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
        importlib.invalidate_caches()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise ConfigError(f"{what}: the module '{module}' cannot be imported: {error}") from error
        raise ConfigError(
            f"{what}: there is no module '{error.name}', neither in {Path.cwd()} nor among the installed packages"
        ) from error
    except Exception as error:  # whatever a module's own code raises
        told = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{what}: the module '{module}' cannot be imported: {told}") from error


def import_modules(names: Iterable[str]) -> None:
    """Imports modules that register tasks, rewards, algorithms or families.

    Raises:
        ConfigError: One cannot be imported.
    """
    for name in names:
        import_module(name, "option import")


def load_name(reference: str, what: str) -> Any:
    """The object of a `module:name`.

    Args:
        reference: The name, as in `"my_rewards:brevity"`; the module may be in the working directory.
        what: What it is needed for, for messages.

    Raises:
        ConfigError: There is no such module or name, or the module cannot be imported.
    """
    module_name, _, name = reference.rpartition(":")
    if not module_name or not name:
        raise ConfigError(f"{what}: '{reference}' is not of the form module:name")
    module = import_module(module_name, what)
    if not hasattr(module, name):
        public = [one for one in vars(module) if not one.startswith("_")]
        raise ConfigError(f"{what}: {unknown_name(f'name in module {module_name}', name, public)}")
    return getattr(module, name)
