"""What PyTorch's attention operators for CUDA compute, on CPUs: how they are called can be tested without a GPU.

Each is one softmax after the other, in float32 or finer, in the layouts that PyTorch's shape rules
(torch/_meta_registrations.py) and its CUDA sources give, and refuses what the operator refuses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

ALIGNED = 32
"""Queries to whose multiples the efficient operator's log-normalisers are padded."""


@contextmanager
def cuda_operators() -> Iterator[Counter[str]]:
    """Lets CPUs run the operators; gives how often each was called."""
    calls: Counter[str] = Counter()

    def counted(operator: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[operator.__name__] += 1
            return operator(*args, **kwargs)

        return call

    with torch.library._scoped_library("aten", "IMPL") as library:
        for operator in (
            _scaled_dot_product_flash_attention,
            _scaled_dot_product_flash_attention_backward,
            _flash_attention_forward,
            _flash_attention_backward,
            _scaled_dot_product_efficient_attention,
            _scaled_dot_product_efficient_attention_backward,
        ):
            library.impl(operator.__name__, counted(operator), "CPU")
        yield calls


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Any:
    """Output [..., S, D] and log-normalisers [..., S] for queries [..., S, D] and keys [..., T, D]."""
    scores = _scores(query, key, bias, causal, scale)
    return scores.softmax(-1).to(value.dtype) @ value, scores.logsumexp(-1)


def push_back(
    grad: Tensor, inputs: Sequence[Tensor], out: Tensor, lse: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> list[Tensor]:
    """Gradients of queries, keys and values, from the output and log-normalisers that are given."""
    query, key, value = inputs
    probs = (_scores(query, key, bias, causal, scale) - lse[..., None]).exp()
    errors = (probs * (grad @ value.mT - (grad * out).sum(-1, keepdim=True)) * scale).to(grad.dtype)
    return [errors @ key, errors.mT @ query, probs.to(grad.dtype).mT @ grad]


def _scores(query: Tensor, key: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    scores = (query @ key.mT).to(torch.promote_types(query.dtype, torch.float32)) * scale
    scores = scores if bias is None else scores + bias
    if causal:
        assert query.shape[-2] == key.shape[-2]
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return scores


def _check(*states: Tensor) -> None:
    assert len({one.dtype for one in states}) == 1
    assert len({one.shape[-1] for one in states}) == 1
    assert all(one.stride(-1) == 1 for one in states)
    assert states[0].shape[-1] % 8 == 0


def _scaled_dot_product_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float = 0.0,
    causal: bool = False,
    debug: bool = False,
    *,
    scale: float,
) -> Any:
    _check(query, key, value)
    assert (dropout, debug) == (0, False)
    out, lse = attend(query, key, value, None, causal, scale)
    return out, lse, None, None, query.shape[2], key.shape[2], *_states(), torch.empty(0)


def _scaled_dot_product_flash_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor | None,
    key_starts: Tensor | None,
    longest: int,
    longest_key: int,
    dropout: float,
    causal: bool,
    seed: Tensor,
    offset: Tensor,
    *,
    scale: float,
) -> Any:
    _check(query, key, value, out)
    assert starts is None
    assert key_starts is None
    assert (longest, longest_key, dropout) == (query.shape[2], key.shape[2], 0)
    assert lse.is_contiguous()
    assert lse.shape == query.shape[:3]
    return tuple(push_back(grad, (query, key, value), out, lse, None, causal, scale))


def _flash_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    key_starts: Tensor,
    longest: int,
    longest_key: int,
    dropout: float,
    causal: bool,
    debug: bool,
    *,
    scale: float,
    seqused_k: Tensor | None = None,
    **other: None,
) -> Any:
    _check(query, key, value)
    assert (dropout, debug) == (0, False)
    assert not any(one is not None for one in other.values())
    outs, normalisers = [], []
    for here, there in _segments(query, key, starts, key_starts, longest, longest_key, seqused_k):
        assert not causal or here == there  # causal masks of unequal lengths are aligned elsewhere
        out, lse = attend(*_heads(query[here], *_shared(query, key[there], value[there])), None, causal, scale)
        outs.append(out.transpose(0, 1))
        normalisers.append(lse)
    return torch.cat(outs), torch.cat(normalisers, dim=-1), *_states(), torch.empty(0)


def _flash_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor,
    key_starts: Tensor,
    longest: int,
    longest_key: int,
    dropout: float,
    causal: bool,
    seed: Tensor,
    offset: Tensor,
    *,
    scale: float,
    **other: None,
) -> Any:
    _check(query, key, value, grad, out)
    assert dropout == 0
    assert not any(one is not None for one in other.values())
    assert lse.is_contiguous()
    assert lse.shape == (query.shape[1], query.shape[0])
    grads: list[list[Tensor]] = [[], [], []]
    for here, there in _segments(query, key, starts, key_starts, longest, longest_key):
        assert not causal or here == there
        states = grad[here], query[here], *_shared(query, key[there], value[there]), out[here]
        push, mine, *theirs, output = _heads(*states)
        found = push_back(push, (mine, *theirs), output, lse[:, here], None, causal, scale)
        for collected, one, heads in zip(grads, found, (query, key, value), strict=True):
            collected.append(one.unflatten(0, (heads.shape[1], -1)).sum(1).transpose(0, 1))
    return tuple(torch.cat(one) for one in grads)


def _scaled_dot_product_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    with_lse: bool,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float,
) -> Any:
    _check(query, key, value)
    _check_bias(query, key, bias)
    assert with_lse
    assert dropout == 0
    out, lse = attend(query, key, value, bias, causal, scale)
    padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % ALIGNED), value=torch.inf)
    return out, padded, *_states()


def _scaled_dot_product_efficient_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    seed: Tensor,
    offset: Tensor,
    dropout: float,
    wanted: list[bool],
    causal: bool = False,
    *,
    scale: float,
) -> Any:
    _check(query, key, value, out)
    _check_bias(query, key, bias)
    assert dropout == 0
    assert wanted == [True, True, True, False]
    assert out.transpose(1, 2).is_contiguous()  # only the strides of its heads are heeded
    length = query.shape[2]
    assert lse.shape[-1] == length + -length % ALIGNED
    assert bool(torch.isposinf(lse[..., length:]).all())
    grads = push_back(grad, (query, key, value), out, lse[..., :length], bias, causal, scale)
    return *grads, torch.empty(0)


def _check_bias(query: Tensor, key: Tensor, bias: Tensor | None) -> None:
    """It has a row of keys for each query, and rows begin at multiples of 16 bytes."""
    if bias is not None:
        assert bias.shape == (*query.shape[:3], key.shape[2])
        assert bias.dtype == query.dtype
        assert all(stride % 8 == 0 for stride in bias.stride()[:-1])
        assert bias.stride(-1) == 1


def _segments(
    query: Tensor,
    key: Tensor,
    starts: Tensor,
    key_starts: Tensor,
    longest: int,
    longest_key: int,
    used: Tensor | None = None,
) -> Iterator[tuple[slice, slice]]:
    """Each segment's queries and keys; of its keys the first ones, where it is told how many are used."""
    assert starts.dtype == key_starts.dtype == torch.int32
    assert (starts[0], starts[-1], key_starts[0], key_starts[-1]) == (0, len(query), 0, len(key))
    assert starts.diff().max() <= longest
    assert key_starts.diff().max() <= longest_key
    for row in range(len(starts) - 1):
        first, end = key_starts[row : row + 2].tolist()
        if used is not None:
            assert used.dtype == torch.int32
            assert used.shape == (len(starts) - 1,)
            assert first + int(used[row]) <= end
            end = first + int(used[row])
        yield slice(*starts[row : row + 2].tolist()), slice(first, end)


def _shared(query: Tensor, *states: Tensor) -> Iterator[Tensor]:
    """Keys or values [M, K, D], each head repeated for the heads of queries that share it."""
    return (one.repeat_interleave(query.shape[1] // one.shape[1], dim=1) for one in states)


def _heads(*states: Tensor) -> Iterator[Tensor]:
    """[M, H, D] as [H, M, D]."""
    return (one.transpose(0, 1) for one in states)


def _states() -> tuple[Tensor, Tensor]:
    """Of a dropout that there is not."""
    return torch.empty(2, dtype=torch.uint64), torch.empty((), dtype=torch.uint64)
