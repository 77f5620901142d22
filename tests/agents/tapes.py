"""A CUDA graph's stand-in for CPUs: it starts the same operators again, on the same memory, with the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlmenv.agents import step_graphs

_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "bincount")


class _Tape(TorchDispatchMode):
    """Notes the operators that compute within the context, and refuses those that wait for a GPU's numbers."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in _WAITS:
            raise RuntimeError(f"{name} within a graph")
        out = func(*args, **(kwargs or {}))
        if not any(_is_view(one) for one in func._schema.returns):
            self._calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self._calls:
            found = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(found), strict=True):
                if isinstance(old, Tensor) and old is not new:
                    old.copy_(new)


def _is_view(returned: Any) -> bool:
    return returned.alias_info is not None and not returned.alias_info.is_write


def capture(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """As `vlmenv.agents.step_graphs.capture`. Until the first replay its tensor has no numbers."""
    tape = _Tape()
    with tape:
        out = run()
    out.fill_(torch.nan)

    def replay() -> Tensor:
        tape.replay()
        return out

    return replay


@contextmanager
def on_tapes() -> Iterator[list[int]]:
    """Lets CPUs replay steps of sampling; gives how often each graph was replayed."""
    counts: list[int] = []

    def counted(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        replay, number = capture(run), len(counts)
        counts.append(0)

        def count() -> Tensor:
            counts[number] += 1
            return replay()

        return count

    with mock.patch.multiple(step_graphs, GPUS="cpu", capture=counted, refusing_waits=nullcontext):
        yield counts
