"""Environments by the name of their task, those of users' modules included. No torch here."""

from __future__ import annotations

import re
from typing import Any

import gymnasium

from vlmenv.core.errors import ConfigError, nearest_name
from vlmenv.core.imports import import_module
from vlmenv.envs.registration import VectorEntryPoint
from vlmenv.envs.vector import VisualTaskVectorEnv


def make_envs(env: str, num_envs: int, **arguments: Any) -> VisualTaskVectorEnv:
    """The batched environment of a registered task. `module:Id` imports the module that registers it.

    Raises:
        ConfigError: There is no such environment, or it is no visual task.
    """
    name = find_task(env)
    envs = gymnasium.make_vec(name, num_envs=num_envs, **arguments)
    assert isinstance(envs, VisualTaskVectorEnv)
    return envs


def find_task(env: str) -> str:
    """The id of a registered task, whose module is imported if it is named.

    Raises:
        ConfigError: There is no such environment, or it is no visual task.
    """
    module, _, name = env.rpartition(":")
    if module:
        import_module(module, "environment")
    known = visual_tasks()
    if name in known:
        return name
    if name in gymnasium.registry:
        raise ConfigError(f"{env} is no visual task: register it with vlmenv.register_task")
    if module:
        raise ConfigError(f"the module '{module}' registers no environment '{name}': call vlmenv.register_task there")
    cores = {_core(one): one for one in known}
    near = nearest_name(_core(name), cores)
    hint = f"Did you mean '{cores[near]}'?" if near else f"Known: {', '.join(known)}."
    raise ConfigError(
        f"unknown environment '{name}'. {hint} A task of your own is named with its module, as in my_task:{name}"
    )


def _core(name: str) -> str:
    """The part of an id that tells tasks apart."""
    return re.sub(r"^VLM-|-v\d+$", "", name).casefold()


def visual_tasks() -> list[str]:
    """The ids of the registered visual tasks."""
    return sorted(i for i, spec in gymnasium.registry.items() if isinstance(spec.vector_entry_point, VectorEntryPoint))
