"""Checksums of the weights in vLLM's workers, in this process or in servers."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Protocol, runtime_checkable

from vlmenv.agents.engines.base import Engine
from vlmenv.core.errors import EngineError

UNREADABLE = sha256(b"").hexdigest()
"""Checksum of a weight that a worker does not hold as a tensor: on CPUs vLLM packs weights of linear layers."""


@runtime_checkable
class HasChecksums(Protocol):
    """An engine whose weights have checksums."""

    def checksums(self) -> Mapping[str, Mapping[str, str]]:
        """SHA-256 of every weight by vLLM's name, by the server's address; "" for this process."""

    def clear(self) -> None:
        """Sets every weight to 0, until the next update."""


def checksums(engine: Engine) -> dict[str, str]:
    """SHA-256 of every weight of an engine's workers.

    Returns:
        Checksums by the server's address and vLLM's name of the weight.

    Raises:
        EngineError: The engine has no checksums, or failed.
    """
    found = _checked(engine).checksums()
    return {f"{place} {name}".strip(): told for place, one in found.items() for name, told in one.items()}


def clear(engine: Engine) -> None:
    """Sets every weight of an engine to 0, until the next update.

    Raises:
        EngineError: The engine has no checksums, or failed.
    """
    _checked(engine).clear()


def _checked(engine: Engine) -> HasChecksums:
    if not isinstance(engine, HasChecksums):
        raise EngineError(f"{type(engine).__name__} gives no checksums of its weights")
    return engine
