"""Checksums of the weights in vLLM's workers, in this process or in servers."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Protocol, runtime_checkable

from vlmenv.agents.engines.base import Engine
from vlmenv.core.errors import EngineError

UNREADABLE = sha256(b"").hexdigest()
"""Checksum of a weight that a worker does not hold as a tensor: on CPUs vLLM packs weights of linear layers."""


@runtime_checkable
class HasWorkers(Protocol):
    """An engine with vLLM's workers."""

    def ask_workers(self, method: str) -> Mapping[str, list[Any]]:
        """Calls a method of vLLM on each worker.

        Returns:
            The workers' results by the server's address, "" for this process.
        """


def checksums(engine: Engine) -> dict[str, str]:
    """SHA-256 of every weight of an engine's workers.

    Returns:
        Checksums by the server's address and vLLM's name of the weight.

    Raises:
        EngineError: The engine has no workers of vLLM, or failed.
    """
    found: dict[str, str] = {}
    for place, results in _workers_of(engine).ask_workers("compute_weight_checksums").items():
        for told in results:
            found |= {f"{place} {name}".strip(): digest for name, digest in told.items()}
    return found


def clear(engine: Engine) -> None:
    """Sets every weight of an engine to 0, until the next update.

    Raises:
        EngineError: The engine has no workers of vLLM, or failed.
    """
    _workers_of(engine).ask_workers("reset_weights")


def _workers_of(engine: Engine) -> HasWorkers:
    if not isinstance(engine, HasWorkers):
        raise EngineError(f"{type(engine).__name__} has no workers of vLLM, which give checksums of weights")
    return engine
