"""Attention among packed sequences that share prompts.

Sequences are concatenated to a single row [1, M] without padding, so that all layers but attention compute real tokens
only. A prompt's keys and values are stored once for its whole group. The queries of all its completions attend to them
in one product, then each completion attends to itself, and the two parts are joined exactly. Prefix Grouper (arXiv
2506.05433) does so for training, Hydragen (arXiv 2402.05099) for inference. Here one function does both, with images.

Shapes: P prompts of up to T tokens; N completions of up to L tokens; H query heads and K key heads of size D.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vlmenv.agents.fusing import ROWS, fused, numbers
from vlmenv.agents.kernels import (
    Part,
    Segments,
    attends_in_segments,
    backward_in_rows,
    flash_backward,
    flash_forward,
    kernel_for,
)
from vlmenv.agents.packing import Packing
from vlmenv.agents.sending import send

_NAME = "vlmenv_packed"


class Siblings:
    """The completions of each prompt.

    Args:
        index: int64 [N] on the CPU, the prompt of each completion.
        prompts: P.
        device: Device of the tensors to fold.
    """

    def __init__(self, index: Tensor, prompts: int, device: torch.device) -> None:
        self._prompts = prompts
        counts = torch.bincount(index, minlength=prompts)
        self.most = int(counts.max())
        """number of completions of the largest group"""
        order = torch.argsort(index, stable=True)
        slots = torch.empty_like(index)
        slots[order] = torch.arange(len(index)) - (counts.cumsum(0) - counts)[index[order]]
        places = index * self.most + slots
        self._is_even = torch.equal(places, torch.arange(prompts * self.most))
        self._slots, self._device = places, device

    @cached_property
    def _places(self) -> Tensor:
        """int64 [N], the place of each completion among those of all prompts, each with the largest group"""
        return send(self._slots, self._device)

    def fold(self, rows: Tensor, key_heads: int) -> Tensor:
        """Converts [N, H, L, D] to [P, K, H / K * largest group * L, D]: the queries of each prompt's key heads."""
        if not self._is_even:
            spread = rows.new_zeros(self._prompts * self.most, *rows.shape[1:])
            rows = spread.index_copy(0, self._places, rows)
        _, heads, length, size = rows.shape
        split = rows.view(self._prompts, self.most, key_heads, heads // key_heads, length, size)
        return split.permute(0, 2, 3, 1, 4, 5).reshape(self._prompts, key_heads, -1, size)

    def unfold(self, folded: Tensor, heads: int) -> Tensor:
        """The inverse of `fold`."""
        key_heads, size = folded.shape[1], folded.shape[-1]
        split = folded.view(self._prompts, key_heads, heads // key_heads, self.most, -1, size)
        rows = split.permute(0, 3, 1, 2, 4, 5).reshape(self._prompts * self.most, heads, -1, size)
        return rows if self._is_even else rows[self._places]


class Attention(ABC):
    """Attention of one pass of the language model, which replaces the blocks' own."""

    ran = False
    """True once a block has used it"""

    @abstractmethod
    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Computes attention of packed tokens.

        Args:
            block: Index of the block.
            query: [M, H, D], with rotary positions applied.
            key: [M, K, D], with rotary positions applied.
            value: [M, K, D].
            scale: Factor of the scores.

        Returns:
            [M, H, D].
        """


class Prefixes(Attention):
    """Causal attention of prompts (prefill), which stores their keys and values.

    Args:
        packing: Packing of the prompts.
    """

    def __init__(self, packing: Packing) -> None:
        self.packing = packing
        self.keys: dict[int, Tensor] = {}
        """[P, K, T, D] per block"""
        self.values: dict[int, Tensor] = {}
        """[P, K, T, D] per block"""

    @classmethod
    def joined(cls, parts: Sequence[Prefixes]) -> Prefixes:
        """Joins prompts that ran in several passes. It empties the parts, so that only one block is held twice."""
        if len(parts) == 1:
            return parts[0]
        packing = parts[0].packing
        whole = cls(Packing(torch.cat([part.packing.lengths for part in parts]), packing.device))
        for block in list(parts[0].keys):
            whole.keys[block] = _stacked([part.keys.pop(block) for part in parts])
            whole.values[block] = _stacked([part.values.pop(block) for part in parts])
        return whole

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        # Padding is at the right, where causal attention does not look.
        query, key, value = (self.packing.pad(one).transpose(1, 2) for one in (query, key, value))
        self.keys[block], self.values[block] = key, value
        out = nn.functional.scaled_dot_product_attention(
            query, *_for_each_query(query, key, value), is_causal=True, scale=scale
        )
        return self.packing.unpad(out.transpose(1, 2))

    @property
    def padding(self) -> Packing | None:
        """The packing that tells which keys are tokens; None if all are."""
        return None if self.packing.is_even else self.packing

    def select(self, rows: Tensor) -> None:
        """Keeps only some prompts [p], indices on the CPU."""
        if len(rows) == len(self.packing.lengths):
            return
        self.packing = self.packing.select(rows)
        _select(rows.to(self.packing.device), self.keys, self.values)


def _select(rows: Tensor, *caches: dict[int, Tensor]) -> None:
    """Keeps only some rows of caches by block. Only one block is held twice."""
    for cache in caches:
        for block in cache:
            cache[block] = cache[block][rows]


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Stacks keys or values [p, K, t, D], padded with zeros at the right, to [P, K, T, D]."""
    _, heads, _, size = parts[0].shape
    whole = parts[0].new_zeros(sum(map(len, parts)), heads, max(part.shape[2] for part in parts), size)
    start = 0
    for part in parts:
        whole[start : start + len(part), :, : part.shape[2]] = part
        start += len(part)
    return whole


class Groups(Attention):
    """Attention of one pass over packed prompts and, behind them, their complete completions.

    Prompts attend to themselves, completions to their prompts and to themselves.

    Args:
        prompts: Packing of the prompts.
        completions: Packing of the completions.
        index: int64 [N] on the CPU, the prompt of each completion.
    """

    def __init__(self, prompts: Packing, completions: Packing, index: Tensor) -> None:
        self.prompts, self.completions = prompts, completions
        self.siblings = Siblings(index, len(prompts.lengths), prompts.device)
        tokens = torch.zeros(len(prompts.lengths), dtype=torch.int64).index_add(0, index, completions.lengths)
        self.families = Packing(tokens, prompts.device) if _can_pack(index, tokens, completions) else None
        """packing of the completions by prompt; None if they are not in the order of their prompts, or if a prompt or a
        segment is too small for flash attention in segments"""

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if self.families is not None and attends_in_segments(kernel_for(query), query):
            return _in_segments(query, key, value, self, scale)
        return _grouped(query, key, value, self, scale)

    def segments(self) -> tuple[Segments, Segments, Segments]:
        """Segments of prompts, of the completions by prompt, and of the completions."""
        assert self.families is not None
        by_prompt, own = self.families, self.completions
        return tuple(Segments(one.starts, one.longest) for one in (self.prompts, by_prompt, own))  # type: ignore[return-value]

    def cut(self, *packed: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Cuts tensors [M, H, D] to those of prompts [P, H, T, D] and of completions [N, H, L, D]."""
        halves = [torch.split(one, [self.prompts.total, self.completions.total]) for one in packed]
        return (
            [self.prompts.pad(one).transpose(1, 2) for one, _ in halves],
            [self.completions.pad(one).transpose(1, 2) for _, one in halves],
        )

    def join(self, prompts: Tensor, completions: Tensor) -> Tensor:
        """The inverse of `cut`."""
        parts = self.prompts.unpad(prompts.transpose(1, 2)), self.completions.unpad(completions.transpose(1, 2))
        return torch.cat(parts)

    def parts(self, prompts: list[Tensor], completions: list[Tensor], scale: float) -> tuple[Part, Part, Part]:
        """Queries and keys of prompts, of completions to their prompts (folded), and of completions to themselves."""
        query, key, value = prompts
        own = Part(query, *_for_each_query(query, key, value), None, True, scale)
        padding = None if self.prompts.is_even else self.prompts
        to_prompts = Part(self.siblings.fold(completions[0], key.shape[1]), key, value, padding, False, scale)
        return own, to_prompts, Part(completions[0], *_for_each_query(*completions), None, True, scale)


class _Grouped(torch.autograd.Function):
    """Attention within `Groups`. It keeps its inputs and output as they are packed, and pads them again."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: Groups, scale: float) -> Tensor:
        kernel, siblings, heads = kernel_for(query), groups.siblings, query.shape[1]
        first, whole, own = groups.parts(*groups.cut(query, key, value), scale)
        before, prompt_lse = kernel.forward(first)
        out, lse = kernel.forward(whole)
        prefix = siblings.unfold(out, heads), siblings.unfold(lse[..., None], heads)[..., 0]
        after, lse = _join(*prefix, *kernel.forward(own))
        out = groups.join(before, after)
        ctx.save_for_backward(query, key, value, out, prompt_lse, lse)
        ctx.groups, ctx.scale = groups, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *packed, prompt_lse, lse = ctx.saved_tensors
        groups, siblings, kernel = ctx.groups, ctx.groups.siblings, kernel_for(grad)
        (*before, out, push), (*after, later_out, later_push) = groups.cut(*packed, grad)
        first, whole, own = groups.parts(before, after, ctx.scale)
        heads, key_heads = grad.shape[1], whole.key.shape[1]
        query, *prompt_grads = kernel.backward(first, push, out, prompt_lse)
        prompt_grads = [_summed(one, key_heads) for one in prompt_grads]
        later, *grads = kernel.backward(own, later_push, later_out, lse)
        folded = [siblings.fold(one, key_heads) for one in (later_push, later_out, lse[..., None])]
        later_part, *shared = backward_in_rows(kernel, whole, folded[0], folded[1], folded[2][..., 0], siblings.most)
        queries = groups.join(query, later + siblings.unfold(later_part, heads))
        pairs = zip(prompt_grads, shared, grads, strict=True)
        keys, values = (groups.join(mine + theirs, _summed(one, key_heads)) for mine, theirs, one in pairs)
        return queries, keys, values, None, None


_grouped: Callable[..., Tensor] = _Grouped.apply


def _can_pack(index: Tensor, tokens: Tensor, completions: Packing) -> bool:
    """True if completions are in the order of their prompts, each prompt has some, and the longest has two tokens."""
    return bool((index.diff() >= 0).all()) and int(tokens.min()) > 0 and completions.longest > 1


class _InSegments(torch.autograd.Function):
    """Attention within `Groups` by flash attention of packed sequences, which needs neither padding nor copies of keys.

    Queries share heads of keys within the kernel.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: Groups, scale: float) -> Tensor:
        prompts, families, completions = groups.segments()
        first, (later, *own) = _split(groups, query, key, value)
        before, prompt_lse = flash_forward(*first, prompts, prompts, scale, causal=True)
        prefix = flash_forward(later, *first[1:], families, prompts, scale)
        after = flash_forward(later, *own, completions, completions, scale, causal=True)
        out, lse = _join_packed(before, *prefix, *after)
        ctx.save_for_backward(query, key, value, out, prompt_lse, lse)
        ctx.groups, ctx.scale = groups, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, prompt_lse, lse = ctx.saved_tensors
        prompts, families, completions = ctx.groups.segments()
        (push, out, *first), (later_push, later_out, later, *own) = _split(ctx.groups, grad, out, query, key, value)
        late = later_push, later_out, lse, later
        before = flash_backward(push, out, prompt_lse, *first, prompts, prompts, ctx.scale, causal=True)
        shared = flash_backward(*late, *first[1:], families, prompts, ctx.scale)
        after = flash_backward(*late, *own, completions, completions, ctx.scale, causal=True)
        return *_gathered(*before, *shared, *after), None, None


_in_segments: Callable[..., Tensor] = _InSegments.apply


def _split(groups: Groups, *packed: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Packed tensors [M, ...] of prompts, and of completions."""
    start = groups.prompts.total
    return [one[:start] for one in packed], [one[start:] for one in packed]


@fused(
    lambda: (*_example(2), numbers(2, ROWS), *_example(1), numbers(2, ROWS, seed=1)),
    kernels=2,
)
def _join_packed(
    before: Tensor, out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """As `_join`, for packed outputs [M, H, D] and log-normalisers [H, M]; outputs of prompts come before."""
    both = torch.logaddexp(lse, other_lse)
    share, other_share = ((one - both).exp().mT[..., None].to(out.dtype) for one in (lse, other_lse))
    return torch.cat([before, out * share + other_out * other_share]), both


@fused(lambda: _example(9), kernels=3)
def _gathered(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    to_prompt: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    own_query: Tensor,
    own_key: Tensor,
    own_value: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of prompts and completions, packed, from those of the three parts of attention."""
    return (
        torch.cat([query, to_prompt + own_query]),
        torch.cat([key + prompt_key, own_key]),
        torch.cat([value + prompt_value, own_value]),
    )


def _example(count: int) -> tuple[Tensor, ...]:
    return tuple(numbers(ROWS, 2, 16, dtype=torch.bfloat16, seed=seed) for seed in range(count))


class Steps(Attention):
    """Attention of completions that grow by one token per pass, without gradients.

    Their keys and values have room for `GROWTH` tokens at first, and for as many more each time that it is full.

    Args:
        prefixes: Keys and values of the prompts.
        index: int64 [N] on the CPU, the prompt of each completion.
        most: Length limit of completions in tokens.
    """

    GROWTH: ClassVar[int] = 128

    def __init__(self, prefixes: Prefixes, index: Tensor, most: int) -> None:
        self._prefixes, self._most = prefixes, most
        self._index, self._device = index, prefixes.packing.device
        self._siblings = Siblings(index, len(prefixes.packing.lengths), self._device)
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self.length = 0
        """tokens so far"""

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        for cache, new in ((self._keys, key), (self._values, value)):
            if block not in cache or cache[block].shape[2] == self.length:
                cache[block] = _longer(cache.get(block), new, self.next_capacity)
        self._keys[block][:, :, self.length], self._values[block][:, :, self.length] = key, value
        kernel, heads, prefixes = kernel_for(query), query.shape[1], self._prefixes
        folded = self._siblings.fold(query[:, :, None], key.shape[1])
        whole = Part(folded, prefixes.keys[block], prefixes.values[block], prefixes.padding, False, scale)
        out, lse = kernel.forward(whole)
        prefix = self._siblings.unfold(out, heads)[:, :, 0], self._siblings.unfold(lse[..., None], heads)[:, :, 0]
        own = [stored[block][:, :, : self.length + 1] for stored in (self._keys, self._values)]
        single = query.view(len(query), key.shape[1], -1, query.shape[2])  # [N, K, H / K, D]: its heads as queries
        out, lse = kernel.forward(Part(single, own[0], own[1], None, False, scale))
        share = torch.sigmoid(lse.reshape(len(query), heads, 1) - prefix[1]).to(out.dtype)
        return torch.lerp(prefix[0], out.reshape(query.shape), share)

    def select(self, rows: Tensor) -> None:
        """Keeps only some completions [n], indices on the CPU, and their prompts."""
        used, self._index = torch.unique(self._index[rows], return_inverse=True)
        self._prefixes.select(used)
        self._siblings = Siblings(self._index, len(used), self._device)
        _select(rows.to(self._device), self._keys, self._values)

    @property
    def is_full(self) -> bool:
        """True if the next token makes the caches grow."""
        return self.length % self.GROWTH == 0

    @property
    def next_capacity(self) -> int:
        """Tokens per completion that the caches have room for after they have grown."""
        return min(self.length + self.GROWTH, self._most)


def _longer(cache: Tensor | None, new: Tensor, capacity: int) -> Tensor:
    """A cache [n, K, capacity, D] that begins with an earlier one; `new` [n, K, D] has its layout."""
    longer = new.new_empty(len(new), new.shape[1], capacity, new.shape[2])
    if cache is not None:
        longer[:, :, : cache.shape[2]] = cache
    return longer


def _join(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Joins attention over two parts of the keys: outputs [N, H, L, D] and log-normalisers [N, H, L]."""
    both = torch.logaddexp(lse, other_lse)
    share, other_share = ((one - both).exp()[..., None].to(out.dtype) for one in (lse, other_lse))
    return out * share + other_out * other_share, both


def _for_each_query(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Repeats keys and values [N, K, ...] for all query heads, [N, H, ...]."""
    shared = query.shape[1] // key.shape[1]
    if shared == 1:
        return key, value
    return key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)


def _summed(grad: Tensor, key_heads: int) -> Tensor:
    """Sums the gradient [N, H, ...] of repeated keys to that of the keys [N, K, ...]."""
    return grad if grad.shape[1] == key_heads else grad.view(len(grad), key_heads, -1, *grad.shape[2:]).sum(2)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    packed: Attention | None = None,
    dropout: float = 0.0,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention function: queries [1, H, M, D], keys and values [1, K, M, D]; returns [1, M, H, D]."""
    if packed is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **arguments
        )
    assert dropout == 0, "attention dropout would not be the same in two passes"
    block, device = int(module.layer_idx), query.device.type  # type: ignore[arg-type]
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    query, key, value = (one.squeeze(0).transpose(0, 1).to(dtype) for one in (query, key, value))  # no copy backward
    packed.ran = True
    return packed.attend(block, query, key, value, scaling)[None], None


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, sdpa_mask)


def enable_packing(language_model: PreTrainedModel) -> None:
    """Makes a language model use the `Attention` in a pass's argument `packed`. Without it the model is unchanged."""
    language_model.config._attn_implementation = _NAME


def no_mask(device: torch.device) -> Tensor:
    """A placeholder attention mask for packed tokens. With it transformers makes no mask [M, M]."""
    return torch.empty(1, 1, 1, 1, device=device)
