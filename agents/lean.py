"""Layers that keep less for the backward pass, and compute the same to the last digit."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from transformers.activations import SiLUActivation

_WRITTEN = re.compile(
    r"\s*def forward\(self, (\w+)[^)]*\)[^:]*:\s*(?:return|down_proj =) "
    r"self\.down_proj\(self\.act_fn\(self\.gate_proj\(\1\)\) \* self\.up_proj\(\1\)\)(?:\s*return down_proj)?\s*"
)
"""The forward pass of the MLPs that are known here, and nothing else in it."""


class GatedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`, which keeps two tensors of its inner width for a token.

    As transformers writes it it keeps four, most of what a block keeps. The other two come of these by elementwise
    operations, and are computed anew.

    Attributes:
        recomputed: Whether the block around it is computed anew, so that nothing has to be spared here.
    """

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    recomputed = False

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_proj(hidden), self.up_proj(hidden)
        product: Tensor = _Gated.apply(gate, up)  # type: ignore[no-untyped-call]
        if self.recomputed or not product.requires_grad:
            return self.down_proj(product)  # type: ignore[no-any-return]
        place = product.data_ptr()

        def pack(kept: Tensor) -> Tensor | torch.Size:
            return kept.shape if kept.data_ptr() == place else kept

        def unpack(kept: Tensor | torch.Size) -> Tensor:
            return kept if isinstance(kept, Tensor) else _gated(gate.detach(), up.detach()).view(kept)

        with saved_tensors_hooks(pack, unpack):
            return self.down_proj(product)  # type: ignore[no-any-return]


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * nn.functional.silu(gate)


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(gate) * up


def make_lean(model: nn.Module) -> None:
    """Replaces those MLPs of a model that are known here; weights keep their names."""
    for module in model.modules():
        if _is_known(module) and isinstance(module.act_fn, SiLUActivation | nn.SiLU):
            module.__class__ = GatedMLP


def _is_known(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__module__.startswith("transformers.models.") and bool(
        _WRITTEN.fullmatch(inspect.getsource(kind.forward))
    )
