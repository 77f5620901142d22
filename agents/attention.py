"""Attention among packed sequences that share prompts.

Sequences are concatenated to a single row [1, M] without padding, so that all layers but attention compute real tokens
only. A prompt's keys and values are stored once for its whole group. The queries of all its completions attend to them
in one product, then each completion attends to itself, and the two parts are joined exactly. Prefix Grouper (arXiv
2506.05433) does so for training, Hydragen (arXiv 2402.05099) for inference. Here one function does both, with images.

Shapes: P prompts of up to T tokens; N completions of up to L tokens; H query heads and K key heads of size D.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from vlmenv.agents.families.layers import FULL, WINDOW
from vlmenv.agents.fusing import ROWS, fused, numbers
from vlmenv.agents.kernels import (
    HIDDEN,
    Kernel,
    Part,
    Segments,
    attends_in_segments,
    backward_in_rows,
    fitted,
    flash_backward,
    flash_forward,
    kernel_for,
)
from vlmenv.agents.packing import Packing
from vlmenv.agents.passes import Groups, Mixer, Pass, Past, Prefixes, Steps
from vlmenv.compat.transformers import block_of, source_of
from vlmenv.core.errors import ModelError

_NAME = "vlmenv_packed"


class KeysValues(Past):
    """Keys and values of the tokens of some rows, padded at the right.

    Args:
        keys: [P, K, T, D].
        values: [P, K, T, D].
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def select(self, rows: Tensor) -> KeysValues:
        return KeysValues(self.keys[rows], self.values[rows])

    @classmethod
    def joined(cls, parts: Sequence[KeysValues]) -> KeysValues:
        return cls(_stacked([part.keys for part in parts]), _stacked([part.values for part in parts]))

    @property
    def capacity(self) -> int:
        """Number of tokens per row."""
        return self.keys.shape[2]


class Attention(Mixer):
    """Causal attention to all earlier tokens, or to those within a window.

    Its tensors are queries [M, H, D], keys [M, K, D], both with rotary positions applied, and values [M, K, D].

    Args:
        scale: Factor of the scores.
        window: Number of tokens that a token sees, itself included. Default: all.
    """

    def __init__(self, scale: float, window: int | None = None) -> None:
        self.scale, self.window = scale, window
        self.kind = FULL if window is None else WINDOW

    def prompts(self, prefixes: Prefixes, *packed: Tensor) -> tuple[Tensor, KeysValues]:
        # Padding is at the right, where causal attention does not look.
        packing = prefixes.packing
        query, key, value = (packing.pad(one).transpose(1, 2) for one in packed)
        mask = _prompt_mask(packing, prefixes.images.get(self.kind), self.window)
        mask = None if mask is None else fitted(mask, query.dtype)
        out = nn.functional.scaled_dot_product_attention(
            query, *_for_each_query(query, key, value), mask, is_causal=mask is None, scale=self.scale
        )
        return packing.unpad(out.transpose(1, 2)), KeysValues(key, value)

    def groups(self, groups: Groups, *packed: Tensor) -> Tensor:
        if (Attention, self.window) not in groups.kept:
            groups.kept[Attention, self.window] = _Masks(groups, self)
        masks = groups.kept[Attention, self.window]
        assert isinstance(masks, _Masks)
        if groups.families is not None and not masks.hides and attends_in_segments(kernel_for(packed[0]), packed[0]):
            return _in_segments(*packed, groups, self.scale)
        return _grouped(*packed, groups, self)

    def step(self, steps: Steps, block: int, *packed: Tensor) -> Tensor:
        (query, key, value), siblings = packed, steps.siblings
        own, past = _extended(steps, block, key, value), steps.prefixes.past[block]
        assert isinstance(past, KeysValues)
        bound = self.window is not None and past.capacity + own.capacity > self.window
        kernel, heads = kernel_for(query, masked=bound), query.shape[1]
        folded = siblings.fold(query[:, :, None], key.shape[1])
        mask = None if self.window is None or not bound else _step_mask(steps, self.window)
        whole = Part(folded, past.keys, past.values, steps.prefixes.padding, False, self.scale, mask)
        out, lse = kernel.forward(whole)
        prefix = siblings.unfold(out, heads)[:, :, 0], siblings.unfold(lse[..., None], heads)[:, :, 0]
        mask = None
        if self.window is not None and own.capacity > self.window:
            own, mask = _within(steps, own, self.window)
        single = query.view(len(query), key.shape[1], -1, query.shape[2])  # [N, K, H / K, D]: its heads as queries
        out, lse = kernel.forward(Part(single, own.keys, own.values, steps.filled, False, self.scale, mask))
        return cast(Tensor, _join_step(*prefix, out, lse))


def _extended(steps: Steps, block: int, key: Tensor, value: Tensor) -> KeysValues:
    """The completions' own keys and values, with those of the next token: all that the caches have room for in passes
    of fixed shapes, else what there is."""
    own = steps.own.get(block)
    assert own is None or isinstance(own, KeysValues)
    if own is None or own.capacity == steps.length:
        before = (None, None) if own is None else (own.keys, own.values)
        enlarge = _longer if steps.place is None else _longer_by_token
        longer = [enlarge(cache, new, steps.next_capacity) for cache, new in zip(before, (key, value), strict=True)]
        own = steps.own[block] = KeysValues(*longer)
    if steps.place is not None:
        own.keys.index_copy_(2, steps.place, key[:, :, None])
        own.values.index_copy_(2, steps.place, value[:, :, None])
        return own
    own.keys[:, :, steps.length], own.values[:, :, steps.length] = key, value
    return KeysValues(*(stored[:, :, : steps.length + 1] for stored in (own.keys, own.values)))


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Stacks keys or values [p, K, t, D], padded with zeros at the right, to [P, K, T, D]."""
    _, heads, _, size = parts[0].shape
    whole = parts[0].new_zeros(sum(map(len, parts)), heads, max(part.shape[2] for part in parts), size)
    start = 0
    for part in parts:
        whole[start : start + len(part), :, : part.shape[2]] = part
        start += len(part)
    return whole


def _seen(places: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Whether queries at places [..., S, 1] see keys at places [..., 1, T]."""
    seen = keys <= places
    return seen if window is None else seen & (keys > places - window)


def _hiding(seen: Tensor) -> Tensor:
    """A mask to add to scores from one that tells which keys are seen."""
    return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, HIDDEN)


def _prompt_mask(packing: Packing, images: Tensor | None, window: int | None) -> Tensor | None:
    """Mask [1 or P, 1, T, T] of prompts to themselves; None where they see all that is before."""
    longest = packing.longest
    if images is None and (window is None or longest <= window):
        return None
    places = torch.arange(longest, device=packing.device)
    rows, keys = places[:, None], places[None, :]
    if images is None:
        return _hiding(_seen(rows, keys, window))[None, None]
    own = packing.pad(images + 1)  # 0 for text and padding
    together = (own[:, :, None] == own[:, None, :]) & (own[:, :, None] > 0)
    seen = (keys <= rows) | together
    if window is not None:
        seen = seen & (keys > rows - window)
    return _hiding(seen)[:, None]


def _step_mask(steps: Steps, window: int) -> Tensor:
    """Mask [P, 1, 1, T] of the next tokens of completions to their prompts."""
    packing = steps.prefixes.packing
    keys = torch.arange(packing.longest, device=packing.device)
    place = steps.length if steps.place is None else steps.place
    return _hiding(keys > packing.counts[:, None] + place - window)[:, None, None]


def _within(steps: Steps, own: KeysValues, window: int) -> tuple[KeysValues, Tensor | None]:
    """Keys and values of a window up to the next token; in passes of fixed shapes all, and a mask [1, 1, 1, T]."""
    if steps.place is None:
        return KeysValues(*(one[:, :, -window:] for one in (own.keys, own.values))), None
    keys = torch.arange(own.capacity, device=own.keys.device)
    return own, _hiding(keys > steps.place - window)[None, None, None]


class _Masks:
    """Masks of a pass over groups, for layers of one window; None where nothing is hidden but what is later.

    Args:
        groups: The pass.
        mixer: The kind of attention.
    """

    def __init__(self, groups: Groups, mixer: Attention) -> None:
        prompts, completions, device = groups.prompts, groups.completions, groups.prompts.device
        window = mixer.window
        self.prompts = _prompt_mask(prompts, groups.images.get(mixer.kind), window)
        """[1 or P, 1, T, T], of prompts to themselves"""
        self.own = _prompt_mask(completions, groups.later_images.get(mixer.kind), window)
        """[1 or N, 1, L, L], of completions to themselves"""
        self.across: Tensor | None = None
        """[P, L, T], of completions to their prompts"""
        if window is not None and prompts.longest + completions.longest > window:
            places = prompts.counts[:, None, None] + torch.arange(completions.longest, device=device)[:, None]
            keys = torch.arange(prompts.longest, device=device)
            self.across = _hiding(keys > places - window)

    @property
    def hides(self) -> bool:
        """True if any part has a mask."""
        return any(one is not None for one in (self.prompts, self.own, self.across))


class _Padded:
    """The tensors of a pass over groups, padded.

    Args:
        groups: The pass.
        mixer: The kind of attention.
    """

    def __init__(self, groups: Groups, mixer: Attention) -> None:
        self.groups, self.siblings, self.scale = groups, groups.siblings, mixer.scale
        self.masks = cast(_Masks, groups.kept[Attention, mixer.window])

    def kernel(self, query: Tensor) -> Kernel:
        """The kernel for queries of the pass."""
        return kernel_for(query, masked=self.masks.hides)

    def cut(self, *packed: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Cuts tensors [M, H, D] to those of prompts [P, H, T, D] and of completions [N, H, L, D]."""
        prompts, completions = self.groups.split(*packed)
        return (
            [self.groups.prompts.pad(one).transpose(1, 2) for one in prompts],
            [self.groups.completions.pad(one).transpose(1, 2) for one in completions],
        )

    def join(self, prompts: Tensor, completions: Tensor) -> Tensor:
        """The inverse of `cut`."""
        groups = self.groups
        return torch.cat(
            [groups.prompts.unpad(prompts.transpose(1, 2)), groups.completions.unpad(completions.transpose(1, 2))]
        )

    def parts(self, prompts: list[Tensor], completions: list[Tensor]) -> tuple[Part, Part, Part]:
        """Queries and keys of prompts, of completions to their prompts (folded), and of completions to themselves."""
        (query, key, value), scale, masks = prompts, self.scale, self.masks
        own = Part(query, *_for_each_query(query, key, value), None, masks.prompts is None, scale, masks.prompts)
        padding = None if self.groups.prompts.is_even else self.groups.prompts
        folded = self.siblings.fold(completions[0], key.shape[1])
        across = masks.across
        if across is not None:  # the queries of a prompt's key head: by query head, completion and place
            times = folded.shape[2] // across.shape[1]
            across = across[:, None, None].expand(-1, 1, times, -1, -1).flatten(2, 3)
        to_prompts = Part(folded, key, value, padding, False, scale, across)
        later = Part(completions[0], *_for_each_query(*completions), None, masks.own is None, scale, masks.own)
        return own, to_prompts, later


class _Grouped(torch.autograd.Function):
    """Attention within `Groups`. It keeps its inputs and output as they are packed, and pads them again."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: Groups, mixer: Attention) -> Tensor:
        padded, siblings = _Padded(groups, mixer), groups.siblings
        kernel, heads = padded.kernel(query), query.shape[1]
        first, whole, own = padded.parts(*padded.cut(query, key, value))
        before, prompt_lse = kernel.forward(first)
        out, lse = kernel.forward(whole)
        prefix = siblings.unfold(out, heads), siblings.unfold(lse[..., None], heads)[..., 0]
        after, lse = _join(*prefix, *kernel.forward(own))
        out = padded.join(before, after)
        ctx.save_for_backward(query, key, value, out, prompt_lse, lse)
        ctx.padded = padded
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *packed, prompt_lse, lse = ctx.saved_tensors
        padded, siblings, kernel = ctx.padded, ctx.padded.siblings, ctx.padded.kernel(grad)
        (*before, out, push), (*after, later_out, later_push) = padded.cut(*packed, grad)
        first, whole, own = padded.parts(before, after)
        heads, key_heads = grad.shape[1], whole.key.shape[1]
        query, *prompt_grads = kernel.backward(first, push, out, prompt_lse)
        prompt_grads = [_summed(one, key_heads) for one in prompt_grads]
        later, *grads = kernel.backward(own, later_push, later_out, lse)
        folded = [siblings.fold(one, key_heads) for one in (later_push, later_out, lse[..., None])]
        later_part, *shared = backward_in_rows(kernel, whole, folded[0], folded[1], folded[2][..., 0], siblings.most)
        queries = padded.join(query, later + siblings.unfold(later_part, heads))
        pairs = zip(prompt_grads, shared, grads, strict=True)
        keys, values = (padded.join(mine + theirs, _summed(one, key_heads)) for mine, theirs, one in pairs)
        return queries, keys, values, None, None


_grouped: Callable[..., Tensor] = _Grouped.apply


class _InSegments(torch.autograd.Function):
    """Attention within `Groups` by flash attention of packed sequences, which needs neither padding nor copies of keys.

    Queries share heads of keys within the kernel.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: Groups, scale: float) -> Tensor:
        prompts, families, completions = _segments(groups)
        (first, keys, values), (later, own_keys, own_values) = groups.split(query, key, value)
        before, prompt_lse = flash_forward(first, keys, values, prompts, prompts, scale, causal=True)
        prefix = flash_forward(later, keys, values, families, prompts, scale)
        after = flash_forward(later, own_keys, own_values, completions, completions, scale, causal=True)
        out, lse = _join_packed(before, *prefix, *after)
        ctx.save_for_backward(query, key, value, out, prompt_lse, lse)
        ctx.groups, ctx.scale = groups, scale
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, prompt_lse, lse = ctx.saved_tensors
        prompts, families, completions = _segments(ctx.groups)
        first, later = ctx.groups.split(grad, out, query, key, value)
        push, out, query, key, value = first
        own_push, own_out, own_query, own_key, own_value = later
        late, scale = (own_push, own_out, lse, own_query), ctx.scale
        before = flash_backward(push, out, prompt_lse, query, key, value, prompts, prompts, scale, causal=True)
        shared = flash_backward(*late, key, value, families, prompts, scale)
        after = flash_backward(*late, own_key, own_value, completions, completions, scale, causal=True)
        return *_gathered(*before, *shared, *after), None, None


_in_segments: Callable[..., Tensor] = _InSegments.apply


def _segments(groups: Groups) -> tuple[Segments, Segments, Segments]:
    """Segments of prompts, of the completions by prompt, and of the completions."""
    assert groups.families is not None
    prompts, families, own = (
        Segments(one.starts, one.longest) for one in (groups.prompts, groups.families, groups.completions)
    )
    return prompts, families, own


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


def _longer(cache: Tensor | None, new: Tensor, capacity: int) -> Tensor:
    """A cache [n, K, capacity, D] that begins with an earlier one; `new` [n, K, D] has its layout."""
    longer = new.new_empty(len(new), new.shape[1], capacity, new.shape[2])
    if cache is not None:
        longer[:, :, : cache.shape[2]] = cache
    return longer


def _longer_by_token(cache: Tensor | None, new: Tensor, capacity: int) -> Tensor:
    """As `_longer`, with a token's heads side by side, as packed tokens have them; 0 where no token is yet."""
    longer = new.new_zeros(len(new), capacity, new.shape[1], new.shape[2]).transpose(1, 2)
    if cache is not None:
        longer[:, :, : cache.shape[2]] = cache
    return longer


@fused(
    lambda: (
        *(numbers(ROWS, 4, 16, dtype=torch.bfloat16), numbers(ROWS, 4, 1, seed=1)),
        *(numbers(ROWS, 2, 2, 16, dtype=torch.bfloat16, seed=2), numbers(ROWS, 2, 2, seed=3)),
    )
)
def _join_step(out: Tensor, lse: Tensor, own_out: Tensor, own_lse: Tensor) -> Tensor:
    """Joins attention of a token to a prompt and to its own completion.

    Args:
        out: [N, H, D], to the prompt.
        lse: [N, H, 1], its log-normaliser.
        own_out: [N, K, H / K, D], to the completion.
        own_lse: [N, K, H / K], its log-normaliser.
    """
    share = torch.sigmoid(own_lse.reshape(lse.shape) - lse).to(out.dtype)
    return torch.lerp(out, own_out.reshape(out.shape), share)


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
    packed: Pass | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention function: queries [1, H, M, D], keys and values [1, K, M, D]; returns [1, M, H, D]."""
    if packed is None:
        plain: Callable[..., tuple[Tensor, None]] = AttentionInterface()["sdpa"]
        return plain(
            module,
            *(query, key, value, attention_mask),
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            **arguments,
        )
    assert dropout == 0, "attention dropout would not be the same in two passes"
    if other := [name for name in ("s_aux", "softcap") if arguments.get(name) is not None]:
        raise ModelError(
            f"{type(module).__name__} has attention with sinks or capped scores ({other[0]}), which is not known"
        )
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    query, key, value = (one.squeeze(0).transpose(0, 1).to(dtype) for one in (query, key, value))  # no copy backward
    mixer, source = Attention(scaling, sliding_window), source_of(module)
    return packed.mix(block_of(module), mixer, query, key, value, source=source)[None], None


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, AttentionMaskInterface()["sdpa"])


def enable_packing(language_model: PreTrainedModel) -> None:
    """Makes a language model's attention use the `Pass` that it is given as `packed`. Without one it is unchanged."""
    language_model.set_attn_implementation(_NAME)


def no_mask(device: torch.device) -> Tensor:
    """A placeholder attention mask for packed tokens. With it transformers makes no mask [M, M]."""
    return torch.empty(1, 1, 1, 1, device=device)
