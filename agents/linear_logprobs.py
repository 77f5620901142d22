"""Log-probabilities of tokens from hidden states, with the logits of a chunk at a time.

Shapes: M hidden states of size H, a vocabulary of V tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LOGITS = {"cuda": 2**28}
"""Largest number of logits in memory, by device. On GPUs each chunk reads the whole head, and few chunks are faster."""
_FEW_LOGITS = 2**24
"""The same on other devices, where small chunks stay in caches."""


def linear_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, banned: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Computes log-probabilities and entropies under `softmax((hidden @ weight.T + bias) / temperature)`.

    Only the logits of a chunk are in memory at a time. The backward pass recomputes them, and accumulates the weight's
    gradient in place.

    Args:
        hidden: [M, H].
        weight: [V, H], of the output head.
        bias: [V], or None.
        targets: int64 [M], the sampled tokens.
        banned: int64 [B], tokens with probability 0.
        temperature: Sampling temperature, above 0.

    Returns:
        Log-probabilities [M] of the targets; and entropies [M] in nats, without gradient. Both are float32, or float64
        for float64 inputs.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    bias = None if bias is None else bias.to(dtype)
    logprobs, entropy = _linear_logprobs(hidden.to(dtype), weight.to(dtype), bias, targets, banned, temperature)
    return logprobs, entropy


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        banned: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logprobs, entropy, normalisers = torch.empty(3, len(hidden), dtype=dtype, device=hidden.device)
        for rows in _chunks(hidden, len(weight)):
            logits = _logits(hidden[rows], weight, bias, banned, temperature)
            normalisers[rows] = logits.logsumexp(dim=-1)
            logits -= normalisers[rows, None]
            logprobs[rows] = logits.gather(-1, targets[rows, None])[:, 0]
            entropy[rows] = -logits.exp().mul_(logits).sum(dim=-1)
        ctx.save_for_backward(hidden, weight, bias, targets, banned, normalisers)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, banned, normalisers = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=grad.dtype) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=grad.dtype) if wants_bias else None
        for rows in _chunks(hidden, len(weight)):
            logits = _logits(hidden[rows], weight, bias, banned, ctx.temperature)
            errors = logits.sub_(normalisers[rows, None]).exp_()
            errors.scatter_add_(1, targets[rows, None], -torch.ones_like(errors[:, :1]))
            errors *= -grad[rows, None] / ctx.temperature
            if grad_bias is not None:
                grad_bias += errors.sum(dim=0)
            errors = errors.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = errors @ weight
            if grad_weight is not None:
                _add_product(grad_weight, errors, hidden[rows])
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        grad_bias = None if grad_bias is None else grad_bias.to(weight.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


_linear_logprobs: Callable[..., tuple[Tensor, Tensor]] = _LinearLogProbs.apply


def _chunks(hidden: Tensor, vocabulary: int) -> list[slice]:
    size = max(1, _LOGITS.get(hidden.device.type, _FEW_LOGITS) // vocabulary)
    return [slice(start, start + size) for start in range(0, len(hidden), size)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, banned: Tensor, temperature: float) -> Tensor:
    """Logits [m, V]. Banned tokens get the lowest finite number: probability and entropy 0, but no NaN."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1:
        logits /= temperature
    return logits.index_fill_(-1, banned, torch.finfo(logits.dtype).min)


def _add_product(total: Tensor, errors: Tensor, hidden: Tensor) -> None:
    """Adds errors.T @ hidden to a sum [V, H]."""
    if total.dtype == errors.dtype:
        total.addmm_(errors.mT, hidden)
    else:
        total += errors.mT @ hidden
