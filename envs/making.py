"""Makes vector environments by name."""

from __future__ import annotations

import difflib
from functools import partial
from typing import Any

import gymnasium

from vlmenv.core.errors import ConfigError
from vlmenv.core.loading import import_module
from vlmenv.envs.hosted import HostedTask
from vlmenv.envs.registration import VectorEntryPoint
from vlmenv.envs.vector import VisualTaskVectorEnv


def make_envs(env: str, num_envs: int, **arguments: Any) -> VisualTaskVectorEnv:
    """The vector environment of a registered environment; `module:Id` imports the module that registers it.

    An environment that is no visual task is made into one; see `HostedTask`.

    Raises:
        ConfigError: There is no such environment, or it cannot be trained.
    """
    module, _, name = env.rpartition(":")
    if module:
        import_module(module, f"environment {env}")
    if name not in gymnasium.registry:
        raise ConfigError(_unknown(name, module))
    if name not in visual_tasks():
        return VisualTaskVectorEnv(partial(HostedTask, name), num_envs, **arguments)
    envs = gymnasium.make_vec(name, num_envs=num_envs, **arguments)
    assert isinstance(envs, VisualTaskVectorEnv)
    return envs


def visual_tasks() -> list[str]:
    """The ids of the registered visual tasks."""
    return sorted(i for i, spec in gymnasium.registry.items() if isinstance(spec.vector_entry_point, VectorEntryPoint))


def _unknown(name: str, module: str) -> str:
    """What to do about an id that is not registered: a near one is most likely meant, or else one of one's own."""
    parts = {_part(known): known for known in (_registered_by(module) if module else visual_tasks())}
    nearest = difflib.get_close_matches(_part(name), parts, n=1, cutoff=0.6)
    meant = f". Did you mean '{parts[nearest[0]]}'?" if nearest else ""
    if module:
        told = f": call register_task({name!r}, …) or gymnasium.register({name!r}, …) in it"
        return f"module '{module}' registers no environment '{name}'{meant or told}"
    if meant:
        return f"unknown environment '{name}'{meant}"
    return (
        f"unknown environment '{name}'. Known: {', '.join(visual_tasks())}. One of your own is named with the module "
        f"that registers it, as in my_task:{name}"
    )


def _part(name: str) -> str:
    """What tells an id from others, as they are mistyped."""
    return (name.removeprefix("VLM-").rpartition("-v")[0] or name.removeprefix("VLM-")).casefold()


def _registered_by(module: str) -> list[str]:
    """The ids whose environments are in a module's package."""
    package, found = module.partition(".")[0], list[str]()
    for name, spec in gymnasium.registry.items():
        entry = spec.entry_point if isinstance(spec.entry_point, str) else getattr(spec.entry_point, "__module__", "")
        if entry.partition(":")[0].partition(".")[0] == package:
            found.append(name)
    return found
