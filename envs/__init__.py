"""Visual tasks as Gymnasium environments of one step, and everything that your own task needs to import.

The public names, those of `vlmenv.envs.public`, are imported when the first one is used: `import vlmenv` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmenv.envs.public import *  # noqa: F403


def __getattr__(name: str) -> Any:
    if name != "__all__" and name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    public = importlib.import_module("vlmenv.envs.public")
    if name != "__all__" and name not in public.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(public, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__getattr__("__all__")])
