"""Hands the environments to other trainers: samples, images and exact rewards, one line for each.

    spec = vlmenv.adapters.trl("VLM-REC-v0", rows=2048)
    GRPOTrainer(model, args=args, train_dataset=spec.train_dataset, reward_funcs=spec.reward_funcs)

`vlmenv data export` writes files for trainers that read their data from files. No framework is imported before the
adapter for it is called. docs/adapters.md tells what each one expects.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from vlmenv.adapters.for_gem import gem
    from vlmenv.adapters.for_openenv import openenv
    from vlmenv.adapters.for_skyrl import skyrl
    from vlmenv.adapters.for_swift import swift
    from vlmenv.adapters.for_trl import trl
    from vlmenv.adapters.for_verifiers import verifiers

__all__ = ["gem", "openenv", "skyrl", "swift", "trl", "verifiers"]

_PLACES: Final = {name: f"vlmenv.adapters.for_{name}" for name in __all__}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'vlmenv.adapters' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
