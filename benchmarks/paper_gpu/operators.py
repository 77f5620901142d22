"""What PyTorch's operators do on a card: their kernels' kinds, bytes and operations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from paper_gpu.card import Kernel, Kind, attention_operations
from vlmenv.agents.fusing import Fused

_VIEWS: Final = frozenset(
    [
        "_reshape_alias",
        "_unsafe_view",
        "alias",
        "as_strided",
        "chunk",
        "detach",
        "diagonal",
        "empty",
        "empty_like",
        "empty_strided",
        "expand",
        "is_pinned",
        "lift_fresh",
        "movedim",
        "narrow",
        "new_empty",
        "new_empty_strided",
        "permute",
        "resize_",
        "select",
        "set_",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "t",
        "transpose",
        "unbind",
        "unfold",
        "unsqueeze",
        "view",
    ]
)
"""Operators without kernels."""
_PRODUCTS: Final = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "_addmm_activation": 1}
"""Matrix products, by the place of their first factor."""
_LOOKUPS: Final = frozenset({"embedding", "index", "index_select", "gather"})
"""Operators that read no more than they write."""
_LAUNCHES: Final = {
    "logsumexp": 7,  # amax, comparison with infinity, fill, subtraction, exp, sum and log with addition
    "_scaled_dot_product_flash_attention_backward": 3,
    "_flash_attention_backward": 3,
    "embedding_dense_backward": 5,
    "native_layer_norm_backward": 2,
    "sort": 3,
    "argsort": 3,
}
"""Kernels of a call, where they are several."""
_PASSES: Final = {"logsumexp": 6}
"""Times that an operator reads or writes its input; reading and writing what it makes is counted otherwise."""
_FUSED: Final = {"agents/linear_logprobs.py": Kind.HEAD_ELEMENTWISE, "agents/wide_gradients.py": Kind.CAST}
"""Kinds of compiled functions, by file, where they are special."""
_TILE: Final = 128
"""Keys that a thread block of flash attention's backward pass takes, and queries of its forward pass."""
_VOCABULARY: Final = 30_000
"""The least number of tokens in a vocabulary, by which the head's products are known."""


def is_view(name: str) -> bool:
    """True if an operator starts no kernel."""
    return name in _VIEWS


def kernel_of(
    name: str, args: Any, kwargs: Any, out: Any, number: Callable[[Any], Tensor | None], place: str
) -> Kernel:
    """The kernel of a call.

    Args:
        name: The operator.
        args: Its arguments.
        kwargs: Its named arguments.
        out: What it returns.
        number: Gives the numbers of a tensor, if they are known.
        place: The place in the code.
    """
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    made = [one for one in tree_leaves(out) if isinstance(one, Tensor)]
    moved, launches = _bytes(name, args, tensors, made), _LAUNCHES.get(name, 1)
    half = not any(one.dtype in (torch.float32, torch.float64) for one in tensors)
    if name in _PRODUCTS:
        first, second = args[_PRODUCTS[name]], args[_PRODUCTS[name] + 1]
        kind = Kind.HEAD if max(*first.shape, *second.shape) > _VOCABULARY and _is_head(first, second) else Kind.PRODUCT
        half = first.dtype != torch.float32
        return Kernel(kind, moved, 2.0 * first.numel() * second.shape[-1], None, launches, half, place, name)
    if "attention" in name:
        operations, blocks = _attention(name, args, kwargs, number)
        backward = "backward" in name
        kind = Kind.ATTENTION_BACKWARD if backward else Kind.ATTENTION
        if backward and (shared := _shared_heads(args)) > 1:
            # gradients of keys and values for each head of queries, which two more kernels add up
            moved, launches = moved + 2.0 * shared * (_size(args[2]) + _size(args[3])), launches + 2
        return Kernel(kind, moved, operations * (2.5 if backward else 1), blocks, launches, half, place, name)
    return Kernel(_elementwise(name, args, place), moved, 0.0, None, launches, half, place, name)


def fused_kernel(fused: Fused, arguments: Any, out: Any, place: str) -> Kernel:
    """The kernels of a compiled function."""
    read, made = (sum(_size(one) for one in tree_leaves(part) if isinstance(one, Tensor)) for part in (arguments, out))
    kind = _FUSED.get(place.partition(":")[0], Kind.FUSED)
    moved = float(fused.reads * read + made)
    return Kernel(kind, moved, 0.0, None, fused.kernels, True, place, fused.function.__name__)


def _is_head(first: Tensor, second: Tensor) -> bool:
    """True if one of the sizes of a product is that of a vocabulary, and not a number of tokens."""
    return max(second.shape) > _VOCABULARY or first.shape[0] > _VOCABULARY


def _elementwise(name: str, args: Any, place: str) -> Kind:
    if "linear_logprobs" in place:
        return Kind.HEAD_ELEMENTWISE
    if name == "_to_copy" and isinstance(args[0], torch.nn.Parameter):
        return Kind.CAST
    return Kind.ELEMENTWISE


def _bytes(name: str, args: Any, inputs: list[Tensor], made: list[Tensor]) -> float:
    """Bytes that a call reads and writes."""
    if name in _PASSES:
        return float(_PASSES[name] * _size(inputs[0]))
    if name in _LOOKUPS:
        return float(2 * sum(map(_size, made)))
    if name in ("scatter_add_", "scatter_add"):
        return float(3 * _size(args[3]) + _size(args[2]))
    if name in ("index_fill_", "index_fill"):
        own, dim, places = args[:3]
        return float(_size(own) / own.shape[dim] * places.numel())
    if name in ("fill_", "zero_", "zeros", "zeros_like", "new_zeros", "ones", "ones_like", "full", "new_full"):
        return float(sum(map(_size, made)))
    return float(sum(map(_size, inputs)) + sum(map(_size, made)))


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor's elements; those of an expanded one are read once."""
    expanded = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    count = math.prod(s for s, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride) if expanded else 0
    return (count if expanded else tensor.numel()) * tensor.element_size()


def _attention(name: str, args: Any, kwargs: Any, number: Callable[[Any], Tensor | None]) -> tuple[float, int]:
    """Forward operations of attention, and the thread blocks of the pass."""
    backward = "backward" in name
    query, key = args[1:3] if backward else args[:2]
    if name.startswith("_scaled"):
        rows, heads, queries, size = query.shape
        keys = key.shape[2]
        place = 11 if backward else 4 if "flash" in name else 6
        causal = len(args) > place and bool(args[place])  # what has its default is left out
        pairs = float(rows * queries * keys) * (0.5 if causal else 1.0)
        blocks = rows * heads * math.ceil((keys if backward else queries) / _TILE)
        return attention_operations(heads, size, pairs), blocks
    starts, key_starts = args[6:8] if backward else args[3:5]
    lengths, key_lengths = (_lengths(number(one)) for one in (starts, key_starts))
    used = number(kwargs.get("seqused_k"))
    key_lengths = key_lengths if used is None else used.double()
    pairs = float((lengths * key_lengths).sum())
    tiles = ((key_lengths if backward else lengths) / _TILE).ceil().sum()
    return attention_operations(query.shape[1], query.shape[2], pairs), int(tiles) * query.shape[1]


def _shared_heads(args: Any) -> int:
    """Heads of queries for each head of keys, in a backward pass."""
    return int(args[1].shape[1] // args[2].shape[1])


def _lengths(starts: Tensor | None) -> Tensor:
    if starts is None:
        raise RuntimeError("the lengths of packed sequences are not known on paper")
    return starts.double().diff()
