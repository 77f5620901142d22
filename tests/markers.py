"""Markers by use: the objects that a test and its fixtures refer to decide which markers it gets."""

from __future__ import annotations

import functools
import inspect
import multiprocessing
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

import vlmenv.cli

TESTS = Path(__file__).parent
_PROCESSES = (subprocess, subprocess.run, subprocess.Popen, multiprocessing, multiprocessing.Process)
_COMMANDS = (vlmenv.cli, vlmenv.cli.main)


def mark_by_use(item: pytest.Function) -> None:
    """Marks a test.

    - `processes`: it starts processes.
    - `commands`: it runs commands of vlmenv in this process.
    - `slow`: its parameters name a published processor, whose prompts have hundreds of image tokens.
    """
    used = list(_uses(item))
    if hasattr(item, "callspec") and item.callspec.id.startswith("published"):
        item.add_marker("slow")
    if any(_is_one_of(one, _PROCESSES) for one in used):
        item.add_marker("processes")
    if any(_is_one_of(one, _COMMANDS) for one in used):
        item.add_marker("commands")


def _uses(item: pytest.Function) -> Iterator[Any]:
    """All objects that a test refers to: in its function, its fixtures, its parameters, and helpers of the tests."""
    fixtures = [one.func for defs in item._fixtureinfo.name2fixturedefs.values() for one in defs]
    given = list(item.callspec.params.values()) if hasattr(item, "callspec") else []
    queue, seen = [item.function, *fixtures, *given], set[int]()
    while queue:
        used = queue.pop()
        if id(used) in seen:
            continue
        seen.add(id(used))
        yield used
        queue += _references(used)


@functools.cache
def _references_of(function: FunctionType) -> list[Any]:
    found = [function.__globals__.get(name) for name in _names(function.__code__)]
    return [one for one in found if callable(one) or isinstance(one, ModuleType)]


def _references(used: Any) -> list[Any]:
    """What a function or class of the tests refers to by global names."""
    if isinstance(used, type):
        return [one for one in vars(used).values() if isinstance(one, FunctionType)] if _is_of_tests(used) else []
    function: Any = inspect.unwrap(used) if callable(used) else used
    if not isinstance(function, FunctionType) or not _is_of_tests(function):
        return []
    return _references_of(function)


def _names(code: CodeType) -> set[str]:
    nested = [_names(one) for one in code.co_consts if isinstance(one, CodeType)]
    return set(code.co_names).union(*nested)


@functools.cache
def _is_of_tests(one: Callable[..., Any]) -> bool:
    module = inspect.getmodule(one)
    return Path(getattr(module, "__file__", None) or "/").is_relative_to(TESTS)


def _is_one_of(one: Any, others: tuple[Any, ...]) -> bool:
    return any(one is other for other in others)
