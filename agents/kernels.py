"""Attention over a part of the keys, such that the parts can be put together exactly, in value and in gradient.

Softmax over a union of keys is a mean of the softmaxes over its parts, weighted by their normalisers. A kernel gives
the log of its part's normaliser too. Backwards, a part needs only the *whole* attention's output and normaliser
(FlashAttention-2, arXiv 2307.08691, algorithm 2), so that no part's probabilities are ever kept.

Shapes: B rows, H heads, S queries, T keys, D the size of a head.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Part(NamedTuple):
    """Queries with a part of the keys that they attend to."""

    query: Tensor
    """[B, H, S, D]"""
    key: Tensor
    """[B, H, T, D]"""
    value: Tensor
    """[B, H, T, D]"""
    bias: Tensor | None
    """[B, 1, 1, T], added to the scores: 0, or -inf where there is no key; None where all are keys"""
    causal: bool
    """whether a query sees only the keys up to its own place"""
    scale: float
    """of the scores"""


class Kernel(Protocol):
    """Computes attention over a part."""

    def forward(self, part: Part) -> tuple[Tensor, Tensor]:
        """Output [B, H, S, D], and the log of the normaliser [B, H, S] in float32 or finer."""

    def backward(self, part: Part, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value, from the gradient, output and log-normaliser of the whole attention."""


class ExplicitKernel:
    """By matrix products alone, so on any device. It holds the scores of one row at a time."""

    def forward(self, part: Part) -> tuple[Tensor, Tensor]:
        outs, normalisers = [], []
        for row in range(len(part.query)):
            scores = self._scores(part, row)
            normalisers.append(scores.logsumexp(dim=-1))
            outs.append((scores - normalisers[-1][..., None]).exp().to(part.value.dtype) @ part.value[row])
        return torch.stack(outs), torch.stack(normalisers)

    def backward(self, part: Part, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grads: list[tuple[Tensor, Tensor, Tensor]] = []
        means = (grad * out).to(lse.dtype).sum(-1, keepdim=True)
        for row in range(len(part.query)):
            probs = (self._scores(part, row) - lse[row][..., None]).exp()
            errors = (grad[row] @ part.value[row].mT).to(lse.dtype)
            scores = (probs * (errors - means[row]) * part.scale).to(grad.dtype)
            value = probs.to(grad.dtype).mT @ grad[row]
            grads.append((scores @ part.key[row], scores.mT @ part.query[row], value))
        queries, keys, values = zip(*grads, strict=True)
        return torch.stack(queries), torch.stack(keys), torch.stack(values)

    def _scores(self, part: Part, row: int) -> Tensor:
        """[H, S, T] in float32, or finer where the inputs are."""
        dtype = torch.promote_types(part.query.dtype, torch.float32)
        scores = (part.query[row] @ part.key[row].mT).to(dtype) * part.scale
        if part.bias is not None:
            scores = scores + part.bias[row].to(dtype)
        if part.causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        return scores


class CPUKernel:
    """PyTorch's flash attention for CPUs."""

    def forward(self, part: Part) -> tuple[Tensor, Tensor]:
        query, key, value, bias, causal, scale = part
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=_in_type(bias, query), scale=scale
        )
        return out, lse

    def backward(self, part: Part, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, bias, causal, scale = part
        grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, lse, 0.0, causal, attn_mask=_in_type(bias, query), scale=scale
        )
        return grads


class CUDAKernel:
    """PyTorch's memory-efficient attention for CUDA, which takes a bias."""

    _ALIGNED = 32
    """Queries to whose multiples its log-normalisers are padded; keys in whose multiples a bias must be laid out."""

    def forward(self, part: Part) -> tuple[Tensor, Tensor]:
        query, key, value, _, causal, scale = part
        out, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, self._bias(part), True, 0.0, causal, scale=scale
        )
        return out, lse[..., : query.shape[2]]

    def backward(self, part: Part, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, causal, scale = part
        padded = nn.functional.pad(lse, (0, -lse.shape[-1] % self._ALIGNED), value=torch.inf)
        unused = torch.zeros((), dtype=torch.int64, device=query.device)  # state of a dropout that there is not
        wanted = [True, True, True, False]
        grads = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            grad, query, key, value, self._bias(part), out, padded, unused, unused, 0.0, wanted, causal, scale=scale
        )
        return grads[0], grads[1], grads[2]

    def _bias(self, part: Part) -> Tensor | None:
        """[B, H, S, T], its rows of keys padded in memory."""
        if part.bias is None:
            return None
        keys = part.key.shape[2]
        bias = nn.functional.pad(part.bias.to(part.query.dtype), (0, -keys % self._ALIGNED))[..., :keys]
        return bias.expand(*part.query.shape[:3], keys)


def _in_type(bias: Tensor | None, like: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(like.dtype)


@functools.cache
def kernel_for(device: str, dtype: torch.dtype) -> Kernel:
    """The fastest kernel that computes attention rightly there: on GPUs that is tried once, on a small case."""
    if device == "cpu":
        return CPUKernel()
    if device == "cuda" and _is_right(CUDAKernel(), dtype):
        return CUDAKernel()
    return ExplicitKernel()


def _is_right(kernel: Kernel, dtype: torch.dtype) -> bool:
    """Whether a kernel agrees with the explicit one, in value and gradient."""
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value, grad = torch.randn(4, 2, 3, 70, 64, device="cuda", generator=generator).to(dtype)
    bias = torch.zeros(2, 1, 1, 70, device="cuda")
    bias[1, ..., 50:] = -torch.inf
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    for part in (Part(query, key, value, bias, False, 0.1), Part(query, key, value, None, True, 0.1)):
        wanted = ExplicitKernel().forward(part)
        backwards = ExplicitKernel().backward(part, grad, *wanted)
        try:
            found = (*kernel.forward(part), *kernel.backward(part, grad, *wanted))
        except (RuntimeError, NotImplementedError):
            return False
        if not all(
            math.isfinite(float(a.sum())) and torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance)
            for a, b in zip(found, (*wanted, *backwards), strict=True)
        ):
            return False
    return True
