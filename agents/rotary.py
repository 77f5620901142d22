"""Rotary positions in one kernel each for queries and keys on GPUs, in place of transformers' ten.

Each of transformers' models applies them by a function of its module. Those that are shown to compute the rotation of
halves (RoFormer, arXiv 2104.09864) get a form of it that computes on GPUs at once; on CPUs they stay as they are.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vlmenv.agents.fusing import ROWS, fused, fuses, numbers
from vlmenv.compat.torch import without_modes

_Rotation = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Form:
    """How a function of transformers takes the angles."""

    axis: int
    """the axis of heads, which cosines and sines lack"""
    wide: bool
    """True if it computes in float32 and returns the type of its inputs"""
    shape: tuple[int, ...]
    """of queries in a trial"""


_FORMS: Final = {
    "apply_rotary_pos_emb": _Form(1, False, (1, 3, 5, 8)),
    "apply_rotary_pos_emb_vision": _Form(-2, True, (5, 3, 8)),
}


@dataclass(frozen=True)
class Rotations:
    """The functions that rotate in a model."""

    of: int
    """number of them"""
    others: tuple[str, ...]
    """names of those that do not rotate at once on GPUs"""

    @property
    def on(self) -> int:
        """Number of those that rotate at once on GPUs."""
        return self.of - len(self.others)


def keep_frequencies(language_model: nn.Module) -> None:
    """Fixes dynamic frequencies, which change only for sequences longer than the model's limit. None is longer here.

    To know that, transformers asks for the largest position in each pass, so that the host waits for a GPU.
    """
    for module in language_model.modules():
        if getattr(module, "rope_type", None) == "dynamic":
            module.rope_type = "default"  # type: ignore[assignment]


def rotate_at_once(model: nn.Module) -> Rotations:
    """Makes a model's functions rotate at once on GPUs where they are shown to compute the same."""
    modules = {type(one).__module__ for one in model.modules()}
    found = [(sys.modules[name], function) for name in sorted(modules) for function in _FORMS]
    found = [(module, function) for module, function in found if hasattr(module, function)]
    others = [f"{module.__name__.rpartition('.')[2]}.{name}" for module, name in found if not _replace(module, name)]
    return Rotations(len(found), tuple(others))


def _replace(module: ModuleType, name: str) -> bool:
    own, form = getattr(module, name), _FORMS[name]
    if getattr(own, "rotates_at_once", False):
        return True
    if not _is_rotation(own, form):
        return False
    setattr(module, name, _rotating(own, form))
    return True


def _rotating(own: _Rotation, form: _Form) -> _Rotation:
    """A model's function, which on GPUs computes at once."""

    @functools.wraps(own)
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **other: Any) -> tuple[Tensor, Tensor]:
        if more or other or cos.requires_grad or cos.shape[-1] != q.shape[-1] or not fuses(q.device):
            return own(q, k, cos, sin, *more, **other)
        cos, sin, dtype = cos.unsqueeze(form.axis), sin.unsqueeze(form.axis), _output_type(q, cos, form.wide)
        return _Rotated.apply(q, k, cos, sin, form.wide, dtype)  # type: ignore[no-untyped-call,no-any-return]

    rotate.rotates_at_once = True  # type: ignore[attr-defined]
    return rotate


def _output_type(query: Tensor, cos: Tensor, wide: bool) -> torch.dtype:
    """The function's own; under autocast that to which attention casts its inputs."""
    if torch.is_autocast_enabled(query.device.type):
        return torch.get_autocast_dtype(query.device.type)
    return query.dtype if wide else torch.result_type(query, cos)


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, wide: bool, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.wide, ctx.dtypes = wide, (query.dtype, key.dtype)
        return _rotated(query, key, cos, sin, wide, dtype)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, query: Tensor, key: Tensor) -> tuple[Tensor | None, ...]:
        return *_rotated_back(query, key, *ctx.saved_tensors, *ctx.dtypes), None, None, None, None


def _examples(*more: Any) -> Callable[[], tuple[Any, ...]]:
    def example() -> tuple[Any, ...]:
        query, key = (
            numbers(1, 4, ROWS, 16, dtype=torch.bfloat16),
            numbers(1, 2, ROWS, 16, dtype=torch.bfloat16, seed=1),
        )
        return query, key, numbers(1, 1, ROWS, 16, seed=2), numbers(1, 1, ROWS, 16, seed=3), *more

    return example


@fused(_examples(False, torch.bfloat16), kernels=2)
def _rotated(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, wide: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Queries and keys, rotated."""
    query, key, cos, sin = (one.float() if wide else one for one in (query, key, cos, sin))
    return (
        ((query * cos) + (_half_turned(query) * sin)).to(dtype),
        ((key * cos) + (_half_turned(key) * sin)).to(dtype),
    )


@fused(_examples(torch.bfloat16, torch.bfloat16), kernels=2)
def _rotated_back(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, key_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients of queries and keys from those of the rotated ones."""
    return (
        ((query * cos) - _half_turned(query * sin)).to(dtype),
        ((key * cos) - _half_turned(key * sin)).to(key_dtype),
    )


def _half_turned(states: Tensor) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _is_rotation(own: _Rotation, form: _Form) -> bool:
    """True if a function computes the same as ours in float32 and bfloat16, to the last digit."""
    with without_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        for dtype in (torch.float32, torch.bfloat16):
            query, key = numbers(*form.shape, dtype=dtype), numbers(*form.shape, dtype=dtype, seed=1)
            angles = [numbers(5, 8, seed=seed) for seed in (2, 3)]
            angles = angles if form.wide else [one[None] for one in angles]
            ours = [one.unsqueeze(form.axis) for one in angles]
            try:
                right = own(query, key, *angles)
            except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
                return False
            found = _rotated.function(query, key, *ours, form.wide, right[0].dtype)
            if not all(torch.equal(a, b) for a, b in zip(found, right, strict=True)):
                return False
    return True
