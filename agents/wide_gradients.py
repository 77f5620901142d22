"""Linear layers that compute float32 gradients of their weights at once, on GPUs under autocast.

Autograd computes the gradient of a cast weight in autocast's data type, and casts it back. Products on GPUs can write
the float32 sums that they have anyway: fewer kernels and bytes, and one rounding less.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vlmenv.agents.fusing import ROWS, fused, fuses, numbers
from vlmenv.agents.trials import Trial, kind_of, largest_difference
from vlmenv.compat.deepspeed import is_gathered_by_call
from vlmenv.compat.torch import without_modes

_log = logging.getLogger(__name__)


class WideLinear(nn.Linear):
    """A linear layer. On GPUs under autocast, float32 weights get float32 gradients without a cast."""

    def forward(self, hidden: Tensor) -> Tensor:
        return _products(hidden, [self])[0] if _applies([self]) else super().forward(hidden)


def widen_gradients(model: nn.Module) -> None:
    """Makes a model's linear layers `WideLinear`. Layers of other classes stay as they are."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = WideLinear


def both(hidden: Tensor, first: nn.Module, second: nn.Module) -> tuple[Tensor, Tensor]:
    """Computes two linear layers of the same input, on GPUs in one product if both are `WideLinear`."""
    layers = [one for one in (first, second) if isinstance(one, WideLinear) and not is_gathered_by_call(one.weight)]
    if len(layers) == 2 and (first.bias is None) == (second.bias is None) and _applies(layers):
        gate, up = _products(hidden, layers)
        return gate, up
    return first(hidden), second(hidden)


def _applies(layers: Sequence[WideLinear]) -> bool:
    if not torch.is_grad_enabled():
        return False
    device = layers[0].weight.device
    if not (fuses(device) and torch.is_autocast_enabled(device.type)):
        return False
    weights = [weight for one in layers for weight in one.parameters(recurse=False)]
    are_cast = all(one.requires_grad and one.dtype == torch.float32 for one in weights)
    return are_cast and not fault_of(device.type, torch.get_autocast_dtype(device.type))


def _products(hidden: Tensor, layers: Sequence[WideLinear]) -> tuple[Tensor, ...]:
    """The outputs of layers with the same input."""
    hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    weights = [one.weight for one in layers]
    biases = [one.bias for one in layers if one.bias is not None]
    weight, bias, *places = _Gradients.apply(hidden, len(layers), *weights, *biases)  # type: ignore[no-untyped-call]
    return cast(tuple[Tensor, ...], _Values.apply(hidden.detach(), weight, bias, *places))  # type: ignore[no-untyped-call]


class _Gradients(torch.autograd.Function):
    """The backward pass of products, whose values `_Values` computes.

    They are two functions because a recomputed block stops once all is saved that its backward pass needs. So it does
    not compute its last product again.

    Takes the input, the number of weights, the weights, and as many biases or none. Gives weights and biases in the
    input's data type, and for each product a tensor without memory that has its gradient.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, count: int, *parameters: Tensor) -> tuple[Tensor | None, ...]:
        ctx.sizes = [len(one) for one in parameters[:count]]
        weight, bias = _narrow(parameters, sum(ctx.sizes), hidden)
        ctx.save_for_backward(hidden, weight)
        ctx.has_bias = bias is not None
        ctx.mark_non_differentiable(weight, *([] if bias is None else [bias]))
        ctx.set_materialize_grads(False)  # or those of the weights are made of zeros
        return weight, bias, *(hidden.new_empty(1).expand(*hidden.shape[:-1], size) for size in ctx.sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None, __: None, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        inputs, rows = hidden.flatten(0, -2), [one.flatten(0, -2) for one in grads]
        grad_hidden = _sum_of_products(rows, weight.split(ctx.sizes)) if ctx.needs_input_grad[0] else None
        own = [_wide_product(one.mT, inputs) for one in rows]
        if ctx.has_bias:
            own += [one.sum(0, dtype=torch.float32) for one in rows]
        return None if grad_hidden is None else grad_hidden.view(hidden.shape), None, *own


class _Values(torch.autograd.Function):
    """Products of an input with weights, which gives their gradients to the places that it takes last."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *places: Tensor) -> tuple[Tensor, ...]:
        return torch.split(nn.functional.linear(hidden, weight, bias), [one.shape[-1] for one in places], dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *grads


def _narrow(parameters: Sequence[Tensor], rows: int, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """The weights, one below the other, and the biases behind one another, in the data type of the input."""
    if len(parameters) == 1:
        return parameters[0].to(hidden.dtype), None
    flat = _stacked(hidden.dtype, *(one.view(-1) for one in parameters))
    weight, bias = flat.split([rows * hidden.shape[-1], len(flat) - rows * hidden.shape[-1]])
    return weight.view(rows, -1), bias if len(bias) else None


@fused(lambda: (torch.bfloat16, *(numbers(size, seed=size) for size in (64, 72, ROWS, ROWS + 1))))
def _stacked(dtype: torch.dtype, *parts: Tensor) -> Tensor:
    return torch.cat([one.to(dtype) for one in parts])


def _sum_of_products(rows: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    total = rows[0] @ weights[0]
    for own, weight in zip(rows[1:], weights[1:], strict=True):
        total.addmm_(own, weight)
    return total


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left, right, out_dtype=torch.float32)


def try_products(device: str, dtype: torch.dtype) -> Trial:
    """Tries products with float32 results on a device."""
    left, right = (numbers(ROWS + 7, 64, dtype=dtype, seed=seed).to(device) for seed in (0, 1))
    with without_modes(), torch.no_grad(), torch.autocast(device, enabled=False):
        try:
            found = _wide_product(left.mT, right)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError) as error:
            return Trial(kind_of(error))
        right_sums = left.mT.float() @ right.float()
    alike = found.dtype == torch.float32 and torch.allclose(found, right_sums, rtol=1e-2, atol=1e-2)
    fault = "" if alike else "they are not what they should be"
    return Trial(fault, largest_difference([found], [right_sums]))


@functools.cache
def fault_of(device: str, dtype: torch.dtype) -> str:
    """Why products have no float32 results on a device, after a trial; empty if they have. A warning tells it once."""
    fault = try_products(device, dtype).fault
    if fault:
        _log.warning(
            "gradients of weights are computed in %s on %s, and cast to float32: products have no float32 results: %s",
            *(str(dtype).removeprefix("torch."), device, fault),
        )
    return fault
