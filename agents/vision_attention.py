"""Attention of vision towers with concatenated images, where each segment attends to itself.

A segment is an image, or a window of one; Qwen2.5-VL's towers have dozens of windows. Transformers calls attention once
per segment, and waits for the device to tell the lengths in every block. Here one call computes all segments of the
same length, which are told once per pass. On GPUs in half precision one call of flash attention computes all segments.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from vlmenv.agents.kernels import FlashKernel, Segments, flash_backward, flash_forward, kernel_for
from vlmenv.compat.transformers import attention_of, set_attention

_NAME = "vlmenv_flash_segments"  # transformers passes the segments' places to names with "flash"


class _Flash(torch.autograd.Function):
    """Flash attention within packed segments."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float) -> Tensor:
        out, lse = flash_forward(query, key, value, segments, segments, scale)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.segments, ctx.scale = segments, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        return *flash_backward(grad, out, lse, query, key, value, ctx.segments, ctx.segments, ctx.scale), None, None


_flash: Callable[..., Tensor] = _Flash.apply


class _Permuted(torch.autograd.Function):
    """Rows in another order, whose gradient takes the inverse order and adds nothing up."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.saved_tensors[0]], None, None


_permuted: Callable[..., Tensor] = _Permuted.apply


class _Kinds:
    """Segments by length, so that those of one length are neighbours.

    Args:
        starts: int32 [N + 1], starts of the segments, and the end of the last one.
    """

    def __init__(self, starts: Tensor) -> None:
        lengths = starts.diff().cpu()  # a GPU is waited for here, once for all blocks
        counts = Counter(lengths.tolist())
        self.runs = list(counts.items())
        """length and number of the segments of each kind"""
        self.orders: tuple[Tensor, Tensor] | None = None
        """the order of tokens by kind, and its inverse; None if they are in order"""
        if sum(1 for _ in groupby(lengths.tolist())) > len(counts):
            ranks = {length: rank for rank, length in enumerate(counts)}
            kinds = torch.tensor([ranks[length] for length in lengths.tolist()])
            order = torch.argsort(kinds.repeat_interleave(lengths), stable=True)
            self.orders = order.to(starts.device), torch.argsort(order).to(starts.device)


_KINDS: dict[int, tuple[weakref.ref[Tensor], _Kinds]] = {}
"""Starts of segments, which all blocks of a pass are given as one tensor, and their kinds, by the id of the tensor."""


def _kinds(starts: Tensor) -> _Kinds:
    place = id(starts)
    known = _KINDS.get(place)
    if known is None or known[0]() is not starts:
        known = _KINDS[place] = weakref.ref(starts, lambda _: _KINDS.pop(place, None)), _Kinds(starts)
    return known[1]


_STARTS: dict[int, tuple[weakref.ref[Tensor], Segments]] = {}
"""Starts of images, and the length of the longest, by the id of the positions that all blocks of a pass are given."""


def _from_positions(positions: Tensor) -> Segments:
    place = id(positions)
    known = _STARTS.get(place)
    if known is None or known[0]() is not positions:
        firsts = torch.nonzero((positions == 0).all(dim=-1))[:, 0]
        starts = nn.functional.pad(firsts, (0, 1), value=len(positions)).int()
        segments = Segments(starts, int(starts.diff().max()))
        known = _STARTS[place] = weakref.ref(positions, lambda _: _STARTS.pop(place, None)), segments
    return known[1]


def _by_kinds(query: Tensor, key: Tensor, value: Tensor, kinds: _Kinds, scale: float) -> Tensor:
    """Attention within segments of packed states [M, H, D] on any device: one call per length of segments."""
    states = [query, key, value]
    if kinds.orders is not None:
        states = [_permuted(one, *kinds.orders) for one in states]
    outs, sizes = [], [length * count for length, count in kinds.runs]
    parts = [torch.split(one, sizes) for one in states]
    for (length, _), *own in zip(kinds.runs, *parts, strict=True):
        q, k, v = (one.unflatten(0, (-1, length)).transpose(1, 2) for one in own)
        outs.append(nn.functional.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(0, 1))
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    return out if kinds.orders is None else _permuted(out, *reversed(kinds.orders))


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    position_ids: Tensor | None = None,
    dropout: float = 0.0,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention function: states [1, H, M, D] and starts of segments; returns [1, M, H, D].

    Pixtral's tower passes positions [M, 2] instead, which begin at the first patch of each image.
    """
    assert dropout == 0, "attention dropout would not be the same in two passes"
    query, key, value = (one.squeeze(0).transpose(0, 1) for one in (query, key, value))
    if cu_seq_lens_q is None:
        assert position_ids is not None, "the vision tower tells no starts of images"
        cu_seq_lens_q, max_length_q = _from_positions(position_ids)
    if isinstance(kernel_for(query), FlashKernel):
        return _flash(query, key, value, Segments(cu_seq_lens_q, max_length_q), scaling)[None], None
    return _by_kinds(query, key, value, _kinds(cu_seq_lens_q), scaling)[None], None


AttentionInterface.register(_NAME, _attend)


def attend_by_segments(tower: PreTrainedModel) -> None:
    """Makes a vision tower, whose blocks take `cu_seqlens`, attend to all segments in one call."""
    known = tower.config
    config = copy.copy(known)  # a copy: new models of the shared configuration would need flash-attn
    set_attention(config, _NAME)  # `set_attn_implementation` looks for flash-attn too
    for module in tower.modules():
        if getattr(module, "config", None) is known:
            module.config = config  # type: ignore[assignment]


def attends_by_segments(tower: nn.Module) -> bool:
    """True if `attend_by_segments` has taken effect in every attention of a tower."""
    layers = [module for module in tower.modules() if type(module).__name__.endswith("Attention")]
    return bool(layers) and {attention_of(layer) for layer in layers} == {_NAME}
