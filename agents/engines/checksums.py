"""What vLLM's workers tell of the weights that they hold, in this process or in servers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import singledispatch
from hashlib import sha256
from typing import Any

from vlmenv.agents.engines.base import Engine
from vlmenv.agents.engines.server import VLLMServerEngine
from vlmenv.agents.engines.vllm import VLLMEngine
from vlmenv.core.errors import EngineError

UNREADABLE = sha256(b"").hexdigest()
"""Of a weight that a worker holds otherwise than as a tensor: on CPUs vLLM packs those of linear layers."""


def checksums(engine: Engine) -> dict[str, str]:
    """SHA-256 of every weight that an engine's workers hold, by where it is and the engine's own name for it.

    Raises:
        EngineError: The engine tells none, or failed.
    """
    found: dict[str, str] = {}
    for place, results in ask_workers(engine, "compute_weight_checksums").items():
        for told in results:
            found |= {place + name: digest for name, digest in told.items()}
    return found


def clear(engine: Engine) -> None:
    """Sets every weight of an engine to 0, until the next update.

    Raises:
        EngineError: The engine cannot, or failed.
    """
    ask_workers(engine, "reset_weights")


@singledispatch
def ask_workers(engine: Engine, method: str) -> Mapping[str, list[Any]]:
    """What workers answer to a method of vLLM's own: by the server's address, or "" for those in this process."""
    raise EngineError(f"{type(engine).__name__} has no workers of vLLM's to be asked for {method}")


@ask_workers.register
def _(engine: VLLMEngine, method: str) -> Mapping[str, list[Any]]:
    return {"": engine._llm.collective_rpc(method)}


@ask_workers.register
def _(engine: VLLMServerEngine, method: str) -> Mapping[str, list[Any]]:
    return {f"{url} ": answers for url, answers in engine.ask_workers(method).items()}
