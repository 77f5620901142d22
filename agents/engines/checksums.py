"""What vLLM's workers tell of the weights that they hold, in this process or in servers."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Protocol, runtime_checkable

from vlmenv.agents.engines.base import Engine
from vlmenv.core.errors import EngineError

UNREADABLE = sha256(b"").hexdigest()
"""Of a weight that a worker holds otherwise than as a tensor: on CPUs vLLM packs those of linear layers."""


@runtime_checkable
class HasWorkers(Protocol):
    """An engine that has vLLM's workers."""

    def ask_workers(self, method: str) -> Mapping[str, list[Any]]:
        """What each worker answers to a method of vLLM's own: by the server's address, or "" in this process."""


def checksums(engine: Engine) -> dict[str, str]:
    """SHA-256 of every weight that an engine's workers hold, by where it is and the engine's own name for it.

    Raises:
        EngineError: The engine tells none, or failed.
    """
    found: dict[str, str] = {}
    for place, results in _workers_of(engine).ask_workers("compute_weight_checksums").items():
        for told in results:
            found |= {f"{place} {name}".strip(): digest for name, digest in told.items()}
    return found


def clear(engine: Engine) -> None:
    """Sets every weight of an engine to 0, until the next update.

    Raises:
        EngineError: The engine cannot, or failed.
    """
    _workers_of(engine).ask_workers("reset_weights")


def _workers_of(engine: Engine) -> HasWorkers:
    if not isinstance(engine, HasWorkers):
        raise EngineError(f"{type(engine).__name__} has no workers of vLLM's, which tell what weights they hold")
    return engine
