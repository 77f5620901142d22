"""Tensors that the backward pass recomputes instead of keeping them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from vlmenv.compat.torch import tells_versions, version_of


class _Made:
    """A tensor that the backward pass recomputes at its first use and frees after its last."""

    def __init__(self, tensor: Tensor, make: Callable[[], Tensor]) -> None:
        place = tensor.data_ptr()
        self._tensor = weakref.ref(tensor, lambda _: _made.pop(place, None))
        self._numel, self._changes, self._make = tensor.numel(), version_of(tensor), make
        self._times = self._left = 0
        self._held: Tensor | None = None

    def makes(self, tensor: Tensor) -> bool:
        """True if a tensor at the same address is this tensor, unchanged."""
        return (tensor.numel(), version_of(tensor)) == (self._numel, self._changes) and tensor.is_contiguous()

    def note(self) -> None:
        self._times += 1

    def take(self) -> Tensor:
        if self._held is None:
            self._held, self._left = self._make(), self._times
        taken, self._left = self._held, self._left - 1
        if self._left == 0:
            self._held = None
        return taken


_made: dict[int, _Made] = {}
"""by the address of the tensor, while it exists"""
_drops = ContextVar("drops", default=False)
_keeps_all = ContextVar("keeps_all", default=False)


def drops() -> bool:
    """True within `dropping_recomputable`, where that has an effect."""
    return _drops.get()


def make_anew(tensor: Tensor, make: Callable[[], Tensor]) -> None:
    """Registers `make` as the recomputation of a tensor in the backward pass; only where `drops()`."""
    _made[tensor.data_ptr()] = _Made(tensor, make)


@contextmanager
def dropping_recomputable() -> Iterator[None]:
    """Within the context, tensors of `make_anew` are not saved for the backward pass.

    Blocks under gradient checkpointing keep nothing, and save all their tensors while they are recomputed. Without
    effect if PyTorch does not tell whether a tensor was changed.
    """
    if _keeps_all.get() or not tells_versions():
        yield
        return
    token = _drops.set(True)
    try:
        with saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _drops.reset(token)


@contextmanager
def keeping_activations() -> Iterator[None]:
    """Within the context, all tensors are saved, as in blocks under gradient checkpointing."""
    tokens = _keeps_all.set(True), _drops.set(False)
    try:
        yield
    finally:
        _keeps_all.reset(tokens[0])
        _drops.reset(tokens[1])


def _pack(tensor: Tensor) -> Tensor | tuple[_Made, torch.Size]:
    made = _made.get(tensor.data_ptr())
    if made is None or not made.makes(tensor):
        return tensor
    made.note()
    return made, tensor.shape


def _unpack(kept: Tensor | tuple[_Made, torch.Size]) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept[0].take().view(kept[1])
