"""Makes batched environments by name."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import gymnasium

from vlmenv.core.errors import ConfigError, unknown_name
from vlmenv.envs.registration import VectorEntryPoint
from vlmenv.envs.vector import VisualTaskVectorEnv


def make_envs(env: str, num_envs: int, **arguments: Any) -> VisualTaskVectorEnv:
    """The batched environment of a registered task; `module:Id` imports the module that registers it.

    Raises:
        ConfigError: There is no such environment, or it is no visual task.
    """
    module, _, name = env.rpartition(":")
    if module:
        _import(module)
    if name not in gymnasium.registry:
        raise ConfigError(unknown_name("environment", name, visual_tasks()))
    if name not in visual_tasks():
        raise ConfigError(f"{env} is no visual task: register it with vlmenv.register_task")
    envs = gymnasium.make_vec(name, num_envs=num_envs, **arguments)
    assert isinstance(envs, VisualTaskVectorEnv)
    return envs


def visual_tasks() -> list[str]:
    """The ids of the registered visual tasks."""
    return sorted(i for i, spec in gymnasium.registry.items() if isinstance(spec.vector_entry_point, VectorEntryPoint))


def _import(module: str) -> None:
    """Imports a user's module, from the working directory too."""
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        importlib.import_module(module)
    except (ImportError, TypeError) as error:
        raise ConfigError(f"the module '{module}' of the environment cannot be imported: {error}") from error
