"""Registered reward terms, by name."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import NamedTuple

import gymnasium

from vlmenv.core.errors import ConfigError
from vlmenv.core.loading import load_name
from vlmenv.envs.registration import VectorEntryPoint
from vlmenv.envs.rewards.terms import BatchTerm, RewardTerm


class _Registered(NamedTuple):
    term: RewardTerm
    tasks: frozenset[str] | None


_registered: dict[str, _Registered] = {}


def register_reward(name: str, function_or_term: RewardTerm, tasks: Collection[str] | None = None) -> None:
    """Registers a reward term under a name for `rewards` and `--rewards`.

    Example:
        >>> def brevity(text, target):
        ...     return 1 / (1 + len(text) / 100)
        >>> register_reward("brevity", brevity)

    Args:
        name: Its name in `rewards`, in `info["rewards"]` and in the metrics.
        function_or_term: `term(text, target) -> float` or a `BatchTerm`; see `RewardTerm`.
        tasks: Ids of the tasks that may use it, as in `["VLM-REC-v0"]`. Tasks that derive from them may use it too.
            Default: all tasks.

    Raises:
        ConfigError: Another function has the name, it contains ":", the object is no term, or `tasks` is no list of
            ids.
    """
    if not isinstance(name, str) or not name or ":" in name:
        raise ConfigError(f"a reward term is registered by a name without ':', not {name!r}")
    if isinstance(tasks, str):
        raise ConfigError(f"tasks is a list of ids: give [{tasks!r}]")
    _check_term(name, function_or_term)
    earlier = _registered.get(name)
    if earlier is not None and _place(earlier.term) != _place(function_or_term):
        raise ConfigError(f"a reward term '{name}' is registered already: {'.'.join(_place(earlier.term))}")
    _registered[name] = _Registered(function_or_term, None if tasks is None else frozenset(tasks))


def registered_rewards(task: type) -> dict[str, RewardTerm]:
    """The registered terms that a task's class may use, by name."""
    ids = _ids_of(task)
    return {name: one.term for name, one in _registered.items() if one.tasks is None or one.tasks & ids}


def load_reward(reference: str) -> RewardTerm:
    """The term of a "module:function"; the module may be in the working directory.

    Raises:
        ConfigError: There is no such module or function, or it is no reward term.
    """
    term: RewardTerm = load_name(reference, f"reward term '{reference}'")
    _check_term(reference, term)
    return term


def _check_term(name: str, term: object) -> None:
    if isinstance(term, type):
        raise ConfigError(f"reward term '{name}' is a class: give a function, or an instance of it")
    if not callable(term) and not isinstance(term, BatchTerm):
        raise ConfigError(f"reward term '{name}' is a {type(term).__name__}, and no function of text and target")


def _place(term: RewardTerm) -> tuple[str, str]:
    """Where a term is defined: a cell of a notebook that is run again registers the same one anew."""
    if isinstance(term, functools.partial):
        return _place(term.func)
    named = term if hasattr(term, "__qualname__") else type(term)
    return named.__module__, named.__qualname__


def _ids_of(task: type) -> set[str]:
    """The ids by which a class, or one that it derives from, is registered."""
    classes = {f"{one.__module__}:{one.__qualname__}" for one in task.__mro__}
    specs = gymnasium.registry.items()
    return {
        name
        for name, spec in specs
        if isinstance(spec.vector_entry_point, VectorEntryPoint) and spec.vector_entry_point.entry_point in classes
    }
