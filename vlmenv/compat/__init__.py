"""What vlmenv uses of other libraries without a promise of theirs: a module per library, with self-tests.

No other package uses private parts (`tests/test_private_use.py`). Each module has `USES`. Their self-tests tell in the
run's head, in `resolved.yaml` and by `vlmenv doctor` which of them this release of the library still has.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

MODULES: Final = {
    "torch": "torch",
    "transformers": "transformers",
    "peft": "peft",
    "accelerate": "accelerate",
    "deepspeed": "deepspeed",
    "vllm": "vllm",
    "math_verify": "sympy",
    "PIL": "pillow",
    "tensorboard": "tensorboard",
}
"""Modules of this package by the library that each is about."""


class Use(NamedTuple):
    """A use of private parts."""

    name: str
    check: Callable[[], str | None]
    """self-test, cheap: the problem, or None; an error is a problem too"""
    instead: str
    """what happens where it fails"""

    def problem(self) -> str | None:
        """Runs the self-test."""
        try:
            return self.check()
        except Exception as error:  # private parts may fail in any way
            return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


@dataclass(frozen=True)
class Report:
    """The result of a library's self-tests."""

    library: str
    of: int
    problems: Mapping[str, str]
    """by the name of the use: the problem, and what happens instead"""

    @property
    def on(self) -> int:
        """Number of uses that work."""
        return self.of - len(self.problems)


def reports() -> list[Report]:
    """Runs the self-tests of the libraries that this process has loaded."""
    return [report(library) for library in MODULES if library in sys.modules]


def report(library: str) -> Report:
    """Runs the self-tests of a library, which must be installed."""
    uses: tuple[Use, ...] = importlib.import_module(f"vlmenv.compat.{MODULES[library]}").USES
    found = {use.name: (use, use.problem()) for use in uses}
    problems = {name: f"{problem}; {use.instead}" for name, (use, problem) in found.items() if problem is not None}
    return Report(library, len(uses), problems)
