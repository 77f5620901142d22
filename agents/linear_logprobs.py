"""Log-probabilities of tokens from hidden states, with the logits of a chunk at a time.

Shapes: M hidden states of size H, a vocabulary of V tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from vlmenv.agents.fusing import ROWS, fused, fuses, numbers

_LOGITS = {"cuda": 2**28}
"""Largest number of logits in memory, by device. On GPUs each chunk reads the whole head, and few chunks are faster."""
_FEW_LOGITS = 2**24
"""The same on other devices, where small chunks stay in caches."""


class _Softmax(NamedTuple):
    """What turns logits into probabilities; see `linear_logprobs`."""

    banned: Tensor
    temperature: float
    cap: float | None


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """Bounds logits by a cap, as Gemma's models do (arXiv 2408.00118, section 2).

    Args:
        logits: Of any shape.
        cap: The bound, above 0; None leaves logits as they are.

    Returns:
        `cap * tanh(logits / cap)`, of the shape and the data type of `logits`.
    """
    return logits if cap is None else torch.tanh(logits / cap) * cap


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    banned: Tensor,
    temperature: float,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes log-probabilities and entropies under `softmax(capped(hidden @ weight.T + bias) / temperature)`.

    Only the logits of a chunk are in memory at a time. The backward pass recomputes them, and accumulates the weight's
    gradient in place.

    Args:
        hidden: [M, H].
        weight: [V, H], of the output head.
        bias: [V], or None.
        targets: int64 [M], the sampled tokens.
        banned: int64 [B], tokens with probability 0.
        temperature: Sampling temperature, above 0.
        cap: Bound of the logits, above 0; see `capped`. Default: none.

    Returns:
        Log-probabilities [M] of the targets; and entropies [M] in nats. Both are float32, or float64 for float64
        inputs.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    bias = None if bias is None else bias.to(dtype)
    softmax = _Softmax(banned, temperature, cap)
    logprobs, entropy = _linear_logprobs(hidden.to(dtype), weight.to(dtype), bias, targets, softmax)
    return logprobs, entropy


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softmax: _Softmax
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logprobs, entropy, normalisers = torch.empty(3, len(hidden), dtype=dtype, device=hidden.device)
        at_once = _computes_at_once(hidden, bias, softmax)
        for rows in _chunks(hidden, len(weight), at_once):
            if at_once:
                logits, mask = nn.functional.linear(hidden[rows], weight), _mask(softmax.banned, len(weight))
                found = _scored(logits, mask, targets[rows], softmax.temperature)
                normalisers[rows], logprobs[rows], entropy[rows] = found
                continue
            logits = _logits(hidden[rows], weight, bias, softmax)
            normalisers[rows] = logits.logsumexp(dim=-1)
            logits -= normalisers[rows, None]
            logprobs[rows] = logits.gather(-1, targets[rows, None])[:, 0]
            entropy[rows] = -logits.exp().mul_(logits).sum(dim=-1)
        ctx.save_for_backward(hidden, weight, bias, targets, normalisers, entropy)
        ctx.softmax = softmax
        ctx.set_materialize_grads(False)  # most losses have no gradient of the entropy
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalisers, entropy = ctx.saved_tensors
        softmax: _Softmax = ctx.softmax
        grad = torch.zeros_like(normalisers) if grad is None else grad
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=grad.dtype) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=grad.dtype) if wants_bias else None
        at_once = grad_entropy is None and _computes_at_once(hidden, bias, softmax)
        for rows in _chunks(hidden, len(weight), at_once):
            known = normalisers[rows], targets[rows], grad[rows], softmax.temperature
            if at_once:
                logits, mask = nn.functional.linear(hidden[rows], weight), _mask(softmax.banned, len(weight))
                errors = _errors_at_once(logits, mask, *known)
            else:
                logits = _logits(hidden[rows], weight, bias, softmax)
                slope = _slope(logits, softmax)  # now, because the errors take the place of the logits
                more = None
                if grad_entropy is not None:
                    more = _entropy_slope(logits, normalisers[rows], entropy[rows])
                    more.mul_(grad_entropy[rows, None] / softmax.temperature)
                errors = _errors(logits, *known)
                errors = errors if more is None else errors.add_(more)
                errors = errors if slope is None else errors.mul_(slope)
            if grad_bias is not None:
                grad_bias += errors.sum(dim=0)
            errors = errors.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = errors @ weight
            if grad_weight is not None:
                _add_product(grad_weight, errors, hidden[rows])
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        grad_bias = None if grad_bias is None else grad_bias.to(weight.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None


_linear_logprobs: Callable[..., tuple[Tensor, Tensor]] = _LinearLogProbs.apply


def _chunks(hidden: Tensor, vocabulary: int, at_once: bool) -> list[slice]:
    most = _LOGITS.get(hidden.device.type, _FEW_LOGITS)
    size = max(1, (2 * most if at_once else most) // vocabulary)  # at once, there are no logits in float32
    return [slice(start, start + size) for start in range(0, len(hidden), size)]


def _computes_at_once(hidden: Tensor, bias: Tensor | None, softmax: _Softmax) -> bool:
    """True if a compiled function goes from logits to results."""
    return (
        bias is None and softmax.cap is None and hidden.dtype.itemsize < torch.float32.itemsize and fuses(hidden.device)
    )


def _mask(banned: Tensor, vocabulary: int) -> Tensor:
    """Bool [V], True at banned tokens."""
    return torch.zeros(vocabulary, dtype=torch.bool, device=banned.device).index_fill_(0, banned, True)


def _example(*more: Tensor) -> tuple[Tensor, ...]:
    return (8 * numbers(ROWS, 40)).to(torch.bfloat16), numbers(40, seed=1) > 1, *more


_TARGETS: Final = [3, 0, 39, 7, 7, 1, 2, 38, 11]


@fused(lambda: (*_example(torch.tensor(_TARGETS)), 0.9), reads=3)
def _scored(logits: Tensor, banned: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalisers, log-probabilities and entropies [m] from logits [m, V] before temperature."""
    logits = _tempered(logits, banned, temperature)
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    logits = logits - normaliser
    entropy = -(logits.exp() * logits).sum(dim=-1)
    return normaliser[:, 0], logits.gather(-1, targets[:, None])[:, 0], entropy


@fused(lambda: (*_example(4 + numbers(ROWS).abs(), torch.tensor(_TARGETS), numbers(ROWS, seed=2)), 0.9))
def _errors_at_once(
    logits: Tensor, banned: Tensor, normalisers: Tensor, targets: Tensor, grad: Tensor, temperature: float
) -> Tensor:
    """Gradient of logits [m, V], in their data type."""
    probs = (_tempered(logits, banned, temperature) - normalisers[:, None]).exp()
    chosen = torch.arange(logits.shape[-1], device=logits.device) == targets[:, None]
    return ((probs - chosen.to(probs.dtype)) * (-grad[:, None] / temperature)).to(logits.dtype)


def _tempered(logits: Tensor, banned: Tensor, temperature: float) -> Tensor:
    """As `_logits`, from the product."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.where(banned, torch.finfo(logits.dtype).min, logits / temperature)


def _errors(logits: Tensor, normalisers: Tensor, targets: Tensor, grad: Tensor, temperature: float) -> Tensor:
    """Gradient of the product that makes logits [m, V], in their place."""
    errors = logits.sub_(normalisers[:, None]).exp_()
    errors.scatter_add_(1, targets[:, None], -torch.ones_like(errors[:, :1]))
    return errors.mul_(-grad[:, None] / temperature)


def _entropy_slope(logits: Tensor, normalisers: Tensor, entropy: Tensor) -> Tensor:
    """The derivative [m, V] of the entropies [m] by logits: `-p * (log p + entropy)`, 0 for banned tokens."""
    logs = logits - normalisers[:, None]
    return logs.exp().neg_().mul_(logs.add_(entropy[:, None]))


def _slope(logits: Tensor, softmax: _Softmax) -> Tensor | None:
    """The derivative [m, V] of the cap, from the logits that `_logits` gives; None without a cap."""
    if softmax.cap is None:
        return None
    tanh = logits.mul(softmax.temperature / softmax.cap).clamp_(-1, 1)  # -1 for banned tokens
    return tanh.square_().neg_().add_(1)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softmax: _Softmax) -> Tensor:
    """Logits [m, V]. Banned tokens get the lowest finite number: probability and entropy 0, but no NaN."""
    logits = nn.functional.linear(hidden, weight, bias)
    logits = capped(logits.to(torch.promote_types(logits.dtype, torch.float32)), softmax.cap)
    if softmax.temperature != 1:
        logits /= softmax.temperature
    return logits.index_fill_(-1, softmax.banned, torch.finfo(logits.dtype).min)


def _add_product(total: Tensor, errors: Tensor, hidden: Tensor) -> None:
    """Adds errors.T @ hidden to a sum [V, H]."""
    if total.dtype == errors.dtype:
        total.addmm_(errors.mT, hidden)
    else:
        total += errors.mT @ hidden
