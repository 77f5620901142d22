"""Layers that keep less for the backward pass, and compute the same to the last digit, of float32 or narrower."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from transformers.activations import SiLUActivation

_MLP = (
    "return self.down_proj(self.act_fn(self.gate_proj({0})) * self.up_proj({0}))",
    "down_proj = self.down_proj(self.act_fn(self.gate_proj({0})) * self.up_proj({0})) return down_proj",
)
_NORM = (
    "input_dtype = {0}.dtype {0} = {0}.to(torch.float32) variance = {0}.pow(2).mean(-1, keepdim=True) "
    "{0} = {0} * torch.rsqrt(variance + self.variance_epsilon) return self.weight * {0}.to(input_dtype)",
)
"""The forward passes that are known here, with the name of what goes in left out."""


class GatedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`, which keeps two tensors of its inner width for a token.

    As transformers writes it it keeps four, most of what a block keeps. The other two come of these by elementwise
    operations, and are computed anew.
    """

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_proj(hidden), self.up_proj(hidden)
        if not torch.is_grad_enabled():
            return self.down_proj(_gated(gate, up))  # type: ignore[no-any-return]
        product: Tensor = _Gated.apply(gate, up)  # type: ignore[no-untyped-call]
        gate, up = gate.detach(), up.detach()
        _make_anew(product, lambda: _gated(gate, up))
        return self.down_proj(product)  # type: ignore[no-any-return]


class RMSNorm(nn.Module):
    """`weight * x / sqrt(mean(x²) + eps)`, which keeps its input, and a number for a token (arXiv 1910.07467, eq. 4).

    As transformers writes it, it keeps `x / sqrt(…)` too, and whatever takes its output in keeps that.
    """

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden: Tensor) -> Tensor:
        kept = hidden.detach()
        inverse = _wide(kept).pow(2).mean(-1, keepdim=True).add_(self.variance_epsilon).rsqrt_()
        if not torch.is_grad_enabled():
            return _times(_scaled(hidden, inverse), self.weight)
        normed: Tensor = _Normed.apply(hidden, hidden, inverse, self.weight)  # type: ignore[no-untyped-call]
        weight = self.weight.detach().clone()  # itself it may be elsewhere by then
        _make_anew(normed, lambda: _times(_scaled(kept, inverse), weight))
        return normed


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), _times(nn.functional.silu(gate), grad)


class _Normed(torch.autograd.Function):
    """Takes its input twice, so that autograd adds the parts of its gradient up in the order in which it always did."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, again: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, inverse, weight)
        return _times(_scaled(hidden, inverse), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, inverse, weight = ctx.saved_tensors
        grad_weight = None
        if ctx.needs_input_grad[3]:
            grad_weight = _times(_scaled(hidden, inverse), grad).sum_to_size(weight.shape).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, None, None, grad_weight
        wide, grad = _wide(hidden), _wide((grad * weight).to(hidden.dtype))
        product = grad * wide
        grad_mean = -0.5 * product.sum(-1, keepdim=True) * inverse.pow(3)
        parts = grad.mul_(inverse), torch.mul(wide, grad_mean / hidden.shape[-1] * 2, out=product)
        if wide.dtype == hidden.dtype:
            return *parts, None, grad_weight
        return (parts[0] + parts[1]).to(hidden.dtype), None, None, grad_weight


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return _times(nn.functional.silu(gate), up)


def _scaled(hidden: Tensor, inverse: Tensor) -> Tensor:
    return (_wide(hidden) * inverse).to(hidden.dtype)


def _times(own: Tensor, other: Tensor) -> Tensor:
    """Their product, in place of the first where its type allows: on CPUs new memory costs more than multiplying."""
    return own.mul_(other) if torch.result_type(own, other) == own.dtype else own * other


def _wide(hidden: Tensor) -> Tensor:
    return hidden.to(torch.promote_types(hidden.dtype, torch.float32))


class _Made:
    """A tensor that is not kept, but made anew when the backward pass first needs it, until it last needs it."""

    def __init__(self, tensor: Tensor, make: Callable[[], Tensor]) -> None:
        place = tensor.data_ptr()
        self._tensor = weakref.ref(tensor, lambda _: _made.pop(place, None))
        self._numel, self._version, self._make = tensor.numel(), tensor._version, make
        self._times = self._left = 0
        self._held: Tensor | None = None

    def makes(self, tensor: Tensor) -> bool:
        """Whether one at the same address is all of it, as it was."""
        return (tensor.numel(), tensor._version) == (self._numel, self._version) and tensor.is_contiguous()

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
"""by the address of the tensor, as long as that is there"""
_noting: list[Callable[[Tensor], object]] = []
"""what is told of tensors that are kept"""
_keeps_all = ContextVar("keeps_all", default=False)


def _make_anew(tensor: Tensor, make: Callable[[], Tensor]) -> None:
    """Has `make` called for what the backward pass needs of a tensor, within `keeping_little`."""
    _made[tensor.data_ptr()] = _Made(tensor, make)


@contextmanager
def keeping_little() -> Iterator[None]:
    """Within, what the layers here can make anew is not kept for the backward pass.

    Blocks that are computed anew as a whole are none the leaner for it, and keep within themselves what they need.
    """
    with nullcontext() if _keeps_all.get() else saved_tensors_hooks(_pack, _unpack):
        yield


@contextmanager
def keeping_all() -> Iterator[None]:
    """Within, `keeping_little` makes no difference, as it makes none to blocks while they are computed anew."""
    token = _keeps_all.set(True)
    try:
        yield
    finally:
        _keeps_all.reset(token)


@contextmanager
def noting_kept(note: Callable[[Tensor], object]) -> Iterator[None]:
    """Within, `note` is told of each tensor that is kept for the backward pass, also within `keeping_little`."""

    def pack(tensor: Tensor) -> Tensor:
        note(tensor)
        return tensor

    _noting.append(note)
    try:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
    finally:
        _noting.remove(note)


def _pack(tensor: Tensor) -> Tensor | tuple[_Made, torch.Size]:
    made = _made.get(tensor.data_ptr())
    if made is None or not made.makes(tensor):
        for note in _noting:
            note(tensor)
        return tensor
    made.note()
    return made, tensor.shape


def _unpack(kept: Tensor | tuple[_Made, torch.Size]) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept[0].take().view(kept[1])


def make_lean(model: nn.Module) -> None:
    """Replaces those MLPs and norms of a model that are known here; weights keep their names."""
    for module in model.modules():
        if _is_written(module, _MLP) and isinstance(module.act_fn, SiLUActivation | nn.SiLU):
            module.__class__ = GatedMLP
        elif _is_written(module, _NORM):
            module.__class__ = RMSNorm


def _is_written(module: nn.Module, ways: tuple[str, ...]) -> bool:
    """Whether a module's class is of transformers, and its forward pass one of these and nothing else."""
    kind = type(module)
    if not kind.__module__.startswith("transformers.models."):
        return False
    taken = list(inspect.signature(kind.forward).parameters)[1:]
    body = " ".join(inspect.getsource(kind.forward).partition(":\n")[2].split())
    return len(taken) == 1 and body in [way.format(taken[0]) for way in ways]
