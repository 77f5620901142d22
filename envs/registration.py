"""Registers tasks with `gymnasium.make` and `gymnasium.make_vec`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gymnasium
from gymnasium.envs.registration import load_env_creator

if TYPE_CHECKING:
    from vlmenv.envs.vector import VisualTaskVectorEnv


def register_task(id: str, entry_point: str) -> None:
    """Registers a task and its vector environment.

    Args:
        id: Environment id, as in `"VLM-REC-v0"`.
        entry_point: Path of the `VisualTaskEnv` subclass, as in `"my_package.my_task:MyEnv"`.
    """
    gymnasium.register(id, entry_point=entry_point, vector_entry_point=VectorEntryPoint(entry_point))


@dataclass(frozen=True)
class VectorEntryPoint:
    """Builds the vector environment of a task, which is imported only then."""

    entry_point: str

    def __call__(self, **kwargs: Any) -> VisualTaskVectorEnv:
        from vlmenv.envs.vector import VisualTaskVectorEnv

        return VisualTaskVectorEnv(load_env_creator(self.entry_point), **kwargs)  # type: ignore[arg-type]
