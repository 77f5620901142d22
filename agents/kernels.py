"""Kernels that compute attention over a part of the keys. Parts can be joined exactly, in value and in gradient.

Softmax over all keys is a mean of the softmaxes over the parts, weighted by their normalisers. So a kernel also gives
the log of its normaliser. The backward pass of a part needs only output and normaliser of the attention over all keys
(FlashAttention-2, arXiv 2307.08691, algorithm 2). No part keeps its probabilities.

Shapes: B rows, H heads, S queries, T keys, D the size of a head.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vlmenv.agents.packing import Packing
from vlmenv.agents.trials import Trial, kind_of, largest_difference
from vlmenv.compat.torch import operator

_log = logging.getLogger(__name__)
HIDDEN = -1e30
"""Mask of a key that a query does not see. It is finite, so that a query may see no key of a part."""
_HALF = 2
"""bytes of a number in half precision"""
_DIFFERS = "its results differ from those of matrix products"


class Part(NamedTuple):
    """Queries, and a part of the keys that they attend to."""

    query: Tensor
    """[B, H, S, D]"""
    key: Tensor
    """[B, H, T, D]"""
    value: Tensor
    """[B, H, T, D]"""
    padding: Packing | None
    """packing that tells how many keys of each row are tokens; None if all are"""
    causal: bool
    """True if a query sees only keys up to its own place; requires S = T and no padding"""
    scale: float
    """factor of the scores"""
    mask: Tensor | None = None
    """[1 or B, 1, S, T], added to the scores: 0 where a query sees a key, and `HIDDEN` where it does not. None: no key
    is hidden. `FlashKernel` takes none"""


class Kernel(Protocol):
    """A function that computes attention over a part."""

    def forward(self, part: Part) -> tuple[Tensor, Tensor]:
        """Computes the output [B, H, S, D] and the log-normaliser [B, H, S], in float32 or finer."""

    def backward(self, part: Part, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Computes gradients of query, key and value.

        Args:
            part: Queries and keys of the part.
            grad: [B, H, S, D], gradient of the output over all keys.
            out: [B, H, S, D], output over all keys.
            lse: [B, H, S], log-normaliser over all keys.
        """


class ExplicitKernel:
    """A kernel of matrix products, for any device. It computes the scores of some rows at a time."""

    _ROOM = 1 << 22
    """Largest number of scores in memory, unless a single row has more."""

    def forward(self, part: Part) -> tuple[Tensor, Tensor]:
        outs, normalisers = [], []
        for rows in self._batches(part):
            scores = self._scores(part, rows)
            largest = scores.amax(dim=-1, keepdim=True)
            weights = scores.sub_(largest).exp_()
            total = weights.sum(dim=-1, keepdim=True)
            outs.append((weights.to(part.value.dtype) @ part.value[rows]).div_(total))
            normalisers.append((largest + total.log())[..., 0])
        return _joined(outs), _joined(normalisers)

    def backward(self, part: Part, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys, values = [], [], []
        means = (grad * out).to(lse.dtype).sum(-1, keepdim=True)
        for rows in self._batches(part):
            probs = self._scores(part, rows).sub_(lse[rows][..., None]).exp_()
            values.append(probs.to(grad.dtype).mT @ grad[rows])
            errors = (grad[rows] @ part.value[rows].mT).to(lse.dtype)
            scores = errors.sub_(means[rows]).mul_(probs).mul_(part.scale).to(grad.dtype)
            queries.append(scores @ part.key[rows])
            keys.append(scores.mT @ part.query[rows])
        return _joined(queries), _joined(keys), _joined(values)

    def _batches(self, part: Part) -> Iterator[slice]:
        rows, heads, queries, _ = part.query.shape
        size = max(1, self._ROOM // (heads * queries * part.key.shape[2]))
        return (slice(start, start + size) for start in range(0, rows, size))

    def _scores(self, part: Part, rows: slice) -> Tensor:
        """Scores [b, H, S, T] in float32 or finer."""
        dtype = torch.promote_types(part.query.dtype, torch.float32)
        scores = (part.query[rows] @ part.key[rows].mT).to(dtype).mul_(part.scale)
        if part.padding is not None:
            scores += part.padding.bias[rows]
        if part.mask is not None:
            scores += part.mask if len(part.mask) == 1 else part.mask[rows]
        if part.causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores.masked_fill_(later, -torch.inf)
        return scores


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class CPUKernel:
    """PyTorch's flash attention for CPUs, and matrix products for few keys, for which these are faster.

    With several threads, flash attention has a start-up time per head.
    """

    def __init__(self) -> None:
        self._explicit = ExplicitKernel()

    def forward(self, part: Part) -> tuple[Tensor, Tensor]:
        if self._is_small(part):
            return self._explicit.forward(part)
        query, key, value, _, causal, scale, _ = part
        out, lse = operator("scaled_dot_product_flash_attention_for_cpu")(
            query, key, value, 0.0, causal, attn_mask=_bias(part), scale=scale
        )
        return out, lse

    def backward(self, part: Part, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self._is_small(part):
            return self._explicit.backward(part, grad, out, lse)
        query, key, value, _, causal, scale, _ = part
        grads: tuple[Tensor, Tensor, Tensor] = operator("scaled_dot_product_flash_attention_for_cpu_backward")(
            grad, query, key, value, out, lse, 0.0, causal, attn_mask=_bias(part), scale=scale
        )
        return grads

    def _is_small(self, part: Part) -> bool:
        """True if matrix products are faster, as measured on two cores. In half precision they are slow."""
        queries, keys = part.query.shape[2], part.key.shape[2]
        few = 32 if part.causal else 64 if queries > 16 else 128
        return keys <= few and part.query.dtype.itemsize >= torch.float32.itemsize


class FlashKernel:
    """PyTorch's flash attention for CUDA, in half precision. It takes the number of keys per row instead of a bias."""

    def forward(self, part: Part) -> tuple[Tensor, Tensor]:
        if part.padding is None:
            out, lse, *_ = operator("scaled_dot_product_flash_attention")(*part[:3], 0.0, part.causal, scale=part.scale)
            return out, lse
        rows, heads, queries, _ = part.query.shape
        keys = part.key.shape[2]
        places = (part.padding.evenly(queries), part.padding.evenly(keys), queries, keys)
        out, lse, *_ = operator("flash_attention_forward")(
            *map(_as_tokens, part[:3]), *places, 0.0, False, False, scale=part.scale, seqused_k=part.padding.counts
        )
        return _as_rows(out, rows), lse.view(heads, rows, queries).transpose(0, 1)

    def backward(self, part: Part, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if part.padding is None:
            rest = (None, None, part.query.shape[2], part.key.shape[2], 0.0, part.causal, *_no_dropout(grad))
            grads: tuple[Tensor, Tensor, Tensor] = operator("scaled_dot_product_flash_attention_backward")(
                grad, *part[:3], out, lse.contiguous(), *rest, scale=part.scale
            )
            return grads
        # The backward pass takes no number of keys, but packed keys.
        packing, rows = part.padding, len(part.query)
        key, value = (packing.unpad(one.transpose(1, 2)) for one in (part.key, part.value))
        queries = Segments(packing.evenly(part.query.shape[2]), part.query.shape[2])
        states = _as_tokens(part.query), key, value, queries, Segments(packing.starts, packing.longest)
        flat = lse.transpose(0, 1).flatten(1)
        query, key, value = flash_backward(_as_tokens(grad), _as_tokens(out), flat, *states, part.scale)
        key, value = (packing.pad(one).transpose(1, 2) for one in (key, value))
        return _as_rows(query, rows), key, value


class Segments(NamedTuple):
    """Places of packed sequences, for flash attention."""

    starts: Tensor
    """int32 [N + 1], the index of each sequence's first token, and the end of the last sequence"""
    longest: int


def flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Segments,
    keys: Segments,
    scale: float,
    *,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Computes flash attention of packed queries [M, H, D] to the keys [M', K, D] of their segments, on CUDA.

    Args:
        query: Packed queries.
        key: Packed keys. Their heads may be fewer than those of queries, which share them in order.
        value: Packed values.
        queries: Segments of the queries.
        keys: As many segments of the keys.
        scale: Factor of the scores.
        causal: True if a query sees only keys up to its own place; requires the same segments. Default: False.

    Returns:
        The output [M, H, D], and float32 log-normalisers [H, M].
    """
    places = (queries.starts, keys.starts, queries.longest, keys.longest)
    out, lse, *_ = operator("flash_attention_forward")(query, key, value, *places, 0.0, causal, False, scale=scale)
    return out, lse


def flash_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Segments,
    keys: Segments,
    scale: float,
    *,
    causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes gradients of packed queries [M, H, D], and of the keys and values [M', K, D]; see `flash_forward`."""
    places = (queries.starts, keys.starts, queries.longest, keys.longest)
    lse = lse.contiguous()  # the operator ignores strides
    grads: tuple[Tensor, Tensor, Tensor] = operator("flash_attention_backward")(
        grad, query, key, value, out, lse, *places, 0.0, causal, *_no_dropout(grad), scale=scale
    )
    return grads


def attends_in_segments(kernel: Kernel, query: Tensor) -> bool:
    """True if flash attention computes packed sequences rightly, causal or not, with keys shared by heads of queries.

    A trial tells it, once for each device and kind of queries [..., D].
    """
    return isinstance(kernel, FlashKernel) and not segments_fault(query.device.type, query.dtype, query.shape[-1])


@functools.cache
def segments_fault(device: str, dtype: torch.dtype, size: int) -> str:
    """Why flash attention does not compute packed sequences, after a trial; empty if it does. A warning tells it."""
    fault = try_segments(device, dtype, size).fault
    if fault:
        _log.warning(
            "flash attention on %s does not compute packed sequences for heads of %d in %s: %s. They are padded, "
            "which is slower; results stay right",
            *(device, size, str(dtype).removeprefix("torch."), fault),
        )
    return fault


def try_segments(device: str, dtype: torch.dtype, size: int) -> Trial:
    """Tries flash attention within segments against the explicit kernel."""
    random = torch.Generator().manual_seed(0)
    query, grad = torch.randn(2, 100, 4, size, generator=random, device="cpu").to(device, dtype)
    key, value = torch.randn(2, 100, 2, size, generator=random, device="cpu").to(device, dtype)
    tolerance, difference = 1e-3 if dtype.itemsize > _HALF else 5e-2, 0.0
    for causal, lengths, key_lengths in ((True, [70, 30], [70, 30]), (False, [20, 80], [65, 35])):
        queries, keys = (Segments(_starts(one, device), max(one)) for one in (lengths, key_lengths))
        pieces = torch.split(query, lengths), torch.split(grad, lengths)
        others = torch.split(key, key_lengths), torch.split(value, key_lengths)
        right = [_explicit(q, g, k, v, causal) for q, g, k, v in zip(*pieces, *others, strict=True)]
        expected = [torch.cat(one, dim=1 if one[0].ndim == 2 else 0) for one in zip(*right, strict=True)]
        try:
            out, lse = flash_forward(query, key, value, queries, keys, 0.1, causal=causal)
            right_out, right_lse = expected[:2]
            back = flash_backward(grad, right_out, right_lse, query, key, value, queries, keys, 0.1, causal=causal)
            found = out, lse, *back
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AttributeError, TypeError, ValueError) as error:  # private operators may change
            return Trial(kind_of(error))
        difference = max(difference, largest_difference(found, expected))
        if not _all_close(found, expected, tolerance):
            return Trial(_DIFFERS, difference)
    return Trial("", difference)


def _explicit(query: Tensor, grad: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, ...]:
    """Output [S, H, D], log-normalisers [H, S] and gradients of one sequence, whose keys two heads of queries share."""
    times, heads = query.shape[1] // key.shape[1], key.shape[1]
    rows, keys, values, push = (one.transpose(0, 1)[None] for one in (query, key, value, grad))
    keys, values = (one.repeat_interleave(times, dim=1) for one in (keys, values))
    part = Part(rows, keys, values, None, causal, 0.1)
    out, lse = ExplicitKernel().forward(part)
    own, *shared = ExplicitKernel().backward(part, push, out, lse)
    shared = [one.view(1, heads, times, *one.shape[2:]).sum(2) for one in shared]
    out, own, *shared = (one[0].transpose(0, 1) for one in (out, own, *shared))
    return out, lse[0], own, *shared


def _starts(lengths: list[int], device: str) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def _all_close(found: Iterable[Tensor], right: Iterable[Tensor], tolerance: float) -> bool:
    return all(
        math.isfinite(float(a.sum())) and torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance)
        for a, b in zip(found, right, strict=True)
    )


def _as_tokens(rows: Tensor) -> Tensor:
    """Converts [B, H, S, D] to [B * S, H, D]."""
    return rows.transpose(1, 2).flatten(0, 1)


def _as_rows(tokens: Tensor, rows: int) -> Tensor:
    """Converts [B * S, H, D] to [B, H, S, D]."""
    return tokens.view(rows, -1, *tokens.shape[1:]).transpose(1, 2)


def _no_dropout(like: Tensor) -> tuple[Tensor, Tensor]:
    """Placeholder for the random state of dropout, which is not read."""
    return torch.empty(2, dtype=torch.uint64, device=like.device), torch.empty(0, device=like.device)


class EfficientKernel:
    """PyTorch's memory-efficient attention for CUDA, in any precision."""

    _ALIGNED = 32
    """Multiple to which the kernel pads its log-normalisers, and in which a bias must be laid out."""

    def forward(self, part: Part) -> tuple[Tensor, Tensor]:
        query, key, value, _, causal, scale, _ = part
        out, lse, _, _ = operator("scaled_dot_product_efficient_attention")(
            query, key, value, self._bias(part), True, 0.0, causal, scale=scale
        )
        return out, lse[..., : query.shape[2]]

    def backward(self, part: Part, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, causal, scale, _ = part
        padded = nn.functional.pad(lse, (0, -lse.shape[-1] % self._ALIGNED), value=torch.inf)
        out = out.transpose(1, 2).contiguous().transpose(1, 2)  # the kernel's own layout: it ignores strides
        unused = torch.zeros((), dtype=torch.int64, device=query.device)  # random state of dropout
        wanted = [True, True, True, False]
        grads = operator("scaled_dot_product_efficient_attention_backward")(
            grad, query, key, value, self._bias(part), out, padded, unused, unused, 0.0, wanted, causal, scale=scale
        )
        return grads[0], grads[1], grads[2]

    def _bias(self, part: Part) -> Tensor | None:
        """Bias [B, H, S, T], with rows of keys padded in memory."""
        bias, keys = _bias(part), part.key.shape[2]
        if bias is None:
            return None
        return nn.functional.pad(bias, (0, -keys % self._ALIGNED))[..., :keys].expand(*part.query.shape[:3], keys)


def backward_in_rows(
    kernel: Kernel, part: Part, grad: Tensor, out: Tensor, lse: Tensor, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `Kernel.backward`, with the queries of each row cut into several rows where that is faster.

    Flash attention's backward pass runs one thread block for a head and some keys, which goes through all queries. Many
    queries to few keys leave most of a GPU idle. Rows have their own copy of the gradient of the keys, and these are
    added.

    Args:
        kernel: A kernel.
        part: Queries and keys of the part, without causal mask.
        grad: See `Kernel.backward`.
        out: See `Kernel.backward`.
        lse: See `Kernel.backward`.
        most: Number of rows to cut each row into, a divisor of the number of queries.
    """
    if most == 1 or not isinstance(kernel, FlashKernel):  # which takes no mask
        return kernel.backward(part, grad, out, lse)
    rows = len(part.query)

    def cut(one: Tensor) -> Tensor:
        """[B, H, G * S, ...] as [B * G, H, S, ...]."""
        split = one.view(*one.shape[:2], most, -1, *one.shape[3:])
        return split.transpose(1, 2).flatten(0, 1)

    def repeated(one: Tensor) -> Tensor:
        return one.repeat_interleave(most, dim=0)

    padding = None if part.padding is None else part.padding.repeated(most)
    many = Part(cut(part.query), repeated(part.key), repeated(part.value), padding, part.causal, part.scale)
    query, key, value = kernel.backward(many, cut(grad), cut(out), cut(lse))
    query = query.view(rows, most, *query.shape[1:]).transpose(1, 2).flatten(2, 3)
    wide = torch.promote_types(key.dtype, torch.float32)  # in which the kernel too adds gradients of keys
    key, value = (one.view(rows, most, *one.shape[1:]).sum(1, dtype=wide).to(one.dtype) for one in (key, value))
    return query, key, value


def fitted(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask in a data type, in which hidden keys have a finite number."""
    return mask.clamp(min=max(HIDDEN, torch.finfo(dtype).min)).to(dtype)


def _bias(part: Part) -> Tensor | None:
    """Bias [1 or B, 1, 1 or S, T] of the scores."""
    dtype = part.query.dtype
    bias = None if part.padding is None else part.padding.bias.to(dtype)
    if part.mask is None:
        return bias
    mask = fitted(part.mask, dtype)
    return mask if bias is None else mask + bias


def kernel_for(query: Tensor, *, masked: bool = False) -> Kernel:
    """The fastest kernel without a fault for queries [..., D] of this device and dtype.

    Args:
        query: The queries.
        masked: If true, it takes parts with a `mask`.
    """
    return _kernel_for(query.device.type, query.dtype, query.shape[-1], masked)


def kernels_of(device: str, masked: bool) -> list[Kernel]:
    """The kernels for a device but the explicit one, the fastest first; with `masked` those that take a mask."""
    flash: list[Kernel] = [] if masked else [FlashKernel()]
    kernels: dict[str, list[Kernel]] = {"cpu": [CPUKernel()], "cuda": [*flash, EfficientKernel()]}
    return kernels.get(device, [])


@functools.cache
def _kernel_for(device: str, dtype: torch.dtype, size: int, masked: bool) -> Kernel:
    """Each kernel is checked once, on small cases. A warning tells of one that should be right and is not."""
    for kernel in kernels_of(device, masked):
        fault = try_kernel(kernel, device, dtype, size, masked).fault
        if not fault:
            return kernel
        if not (isinstance(kernel, FlashKernel) and dtype.itemsize > _HALF):  # flash attention is for half precision
            _log.warning(
                "attention on %s falls back from %s for heads of %d in %s, and is slower: %s. Results stay right",
                *(device, type(kernel).__name__, size, str(dtype).removeprefix("torch."), fault),
            )
    return ExplicitKernel()


def fault_of_fastest(query: Tensor) -> str:
    """Why `kernel_for` does not choose a device's fastest kernel, after a trial; empty if it does or knows none."""
    device, size = query.device.type, query.shape[-1]
    return next((try_kernel(one, device, query.dtype, size).fault for one in kernels_of(device, False)), "")


def try_kernel(kernel: Kernel, device: str, dtype: torch.dtype, size: int, masked: bool = False) -> Trial:
    """Tries a kernel against the explicit one for heads of this size, in value and gradient.

    With `masked` it is tried on parts with a mask too.
    """
    cases = torch.randn(4, 2, 3, 70, size, generator=torch.Generator().manual_seed(0), device="cpu")
    query, key, value, grad = cases.to(device, dtype)
    ragged = Packing(torch.tensor([70, 50]), query.device)
    tolerance, difference = 1e-3 if dtype.itemsize > _HALF else 5e-2, 0.0
    parts = [  # one of each kind
        Part(query, key, value, ragged, False, 0.1),
        Part(query[:, :, :9], key, value, None, False, 0.1),
        Part(query, key, value, None, True, 0.1),
    ]
    if masked:
        window = torch.full((1, 1, 70, 70), HIDDEN, device=query.device).triu(1)
        parts += [
            Part(query, key, value, ragged, False, 0.1, window),
            Part(query, key, value, None, False, 0.1, window),
        ]
    for part in parts:
        push = grad[:, :, : part.query.shape[2]]
        right = ExplicitKernel().forward(part)
        right_grads = ExplicitKernel().backward(part, push, *right)
        try:
            found = (*kernel.forward(part), *kernel.backward(part, push, *right))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AttributeError, TypeError, ValueError) as error:  # private operators may change
            return Trial(kind_of(error))
        difference = max(difference, largest_difference(found, (*right, *right_grads)))
        if not _all_close(found, (*right, *right_grads), tolerance):
            return Trial(_DIFFERS, difference)
    return Trial("", difference)
