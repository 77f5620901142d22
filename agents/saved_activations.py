"""Layers that keep fewer activations for the backward pass, with bit-identical results in float32 or narrower."""

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
"""Source code of the known forward passes, with {0} for the name of the argument."""


class GatedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`, which keeps two tensors of its inner width per token.

    Transformers' own keeps four, which are most of a block's activations. Here the backward pass recomputes two of them
    by elementwise operations.
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
    """`weight * x / sqrt(mean(x²) + eps)`, which keeps its input and one number per token (arXiv 1910.07467, eq. 4).

    Transformers' own also keeps `x / sqrt(…)`, and the next layer keeps the output.
    """

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden: Tensor) -> Tensor:
        kept = hidden.detach()
        inverse = _wide(kept).pow(2).mean(-1, keepdim=True).add_(self.variance_epsilon).rsqrt_()
        if not torch.is_grad_enabled():
            return _times(_scaled(hidden, inverse), self.weight)
        normed: Tensor = _Normed.apply(hidden, hidden, inverse, self.weight)  # type: ignore[no-untyped-call]
        weight = self.weight.detach().clone()  # a clone, because sharding may free the weight before the backward pass
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
    """Takes its input twice, so that autograd sums the two parts of its gradient in the same order as without it."""

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
    """The product, in place of the first factor if dtypes allow: on CPUs new memory costs more than multiplying."""
    return own.mul_(other) if torch.result_type(own, other) == own.dtype else own * other


def _wide(hidden: Tensor) -> Tensor:
    return hidden.to(torch.promote_types(hidden.dtype, torch.float32))


class _Made:
    """A tensor that the backward pass recomputes at its first use and frees after its last."""

    def __init__(self, tensor: Tensor, make: Callable[[], Tensor]) -> None:
        place = tensor.data_ptr()
        self._tensor = weakref.ref(tensor, lambda _: _made.pop(place, None))
        self._numel, self._version, self._make = tensor.numel(), tensor._version, make
        self._times = self._left = 0
        self._held: Tensor | None = None

    def makes(self, tensor: Tensor) -> bool:
        """True if a tensor at the same address is this tensor, unchanged."""
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
"""by the address of the tensor, while it exists"""
_noting: list[Callable[[Tensor], object]] = []
"""callbacks for saved tensors"""
_keeps_all = ContextVar("keeps_all", default=False)


def _make_anew(tensor: Tensor, make: Callable[[], Tensor]) -> None:
    """Registers `make` as the recomputation of a tensor in the backward pass, within `dropping_recomputable`."""
    _made[tensor.data_ptr()] = _Made(tensor, make)


@contextmanager
def dropping_recomputable() -> Iterator[None]:
    """Within the context, tensors that the layers here can recompute are not saved for the backward pass.

    Blocks under gradient checkpointing gain nothing from it, and save all their tensors.
    """
    with nullcontext() if _keeps_all.get() else saved_tensors_hooks(_pack, _unpack):
        yield


@contextmanager
def keeping_activations() -> Iterator[None]:
    """Within the context, `dropping_recomputable` has no effect, as in blocks under gradient checkpointing."""
    token = _keeps_all.set(True)
    try:
        yield
    finally:
        _keeps_all.reset(token)


@contextmanager
def recording_saved(note: Callable[[Tensor], object]) -> Iterator[None]:
    """Within the context, calls `note` with each tensor that is saved for the backward pass."""

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


def save_fewer_activations(model: nn.Module) -> None:
    """Replaces the MLPs and norms of a model whose forward passes are known. Weights keep their names."""
    for module in model.modules():
        if _is_written(module, _MLP) and isinstance(module.act_fn, SiLUActivation | nn.SiLU):
            module.__class__ = GatedMLP
        elif _is_written(module, _NORM):
            module.__class__ = RMSNorm


def _is_written(module: nn.Module, ways: tuple[str, ...]) -> bool:
    """True if a module is of transformers, and the source of its forward pass is one of `ways`."""
    kind = type(module)
    if not kind.__module__.startswith("transformers.models."):
        return False
    taken = list(inspect.signature(kind.forward).parameters)[1:]
    body = " ".join(inspect.getsource(kind.forward).partition(":\n")[2].split())
    return len(taken) == 1 and body in [way.format(taken[0]) for way in ways]
