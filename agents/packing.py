"""Packing: sequences concatenated without padding."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vlmenv.agents.sending import send


class Packing:
    """The places of tokens of N sequences that are concatenated without padding.

    Args:
        lengths: int64 [N] on the CPU, lengths of the sequences.
        device: Device of the packed tensors.
        longest: Padded length L. Default: that of the longest sequence.
    """

    def __init__(self, lengths: Tensor, device: torch.device, longest: int | None = None) -> None:
        self.lengths = lengths
        self.device = device
        self.longest = int(lengths.max()) if longest is None else longest
        self.is_even = bool((lengths == self.longest).all())
        self._ends = lengths.cumsum(0)
        self.total = int(self._ends[-1])
        self._even: dict[int, Tensor] = {}

    @cached_property
    def rows(self) -> Tensor:
        """[M], the sequence of each token"""
        return send(self._rows, self.device)

    @cached_property
    def places(self) -> Tensor:
        """[M], the place of each token in its sequence"""
        return send(self._places, self.device)

    @cached_property
    def tokens(self) -> Tensor:
        """[M], the index of each token among all tokens of the sequences"""
        return torch.arange(self.total, device=self.device)

    @cached_property
    def ends(self) -> Tensor:
        """[N], the index of each sequence's last token"""
        return send(self._ends - 1, self.device)

    @cached_property
    def _rows(self) -> Tensor:
        return torch.repeat_interleave(torch.arange(len(self.lengths)), self.lengths)

    @cached_property
    def _places(self) -> Tensor:
        return torch.arange(self.total) - (self._ends - self.lengths)[self._rows]

    @cached_property
    def _slots(self) -> tuple[Tensor, Tensor, Tensor]:
        """The slot of each token among the N * L of a padded tensor, [M]; the token of each slot, [N * L], any of
        padding; and the slots of padding."""
        slots = self._rows * self.longest + self._places
        tokens = torch.full((len(self.lengths) * self.longest,), -1).index_copy(0, slots, torch.arange(len(slots)))
        padding = (tokens < 0).nonzero()[:, 0]
        return send(slots, self.device), send(tokens.clamp(min=0), self.device), send(padding, self.device)

    @cached_property
    def _on_device(self) -> Tensor:
        return send(self.lengths, self.device)

    def pad(self, packed: Tensor) -> Tensor:
        """Converts [M, ...] to [N, L, ...], padded with zeros at the right."""
        if self.is_even:
            return packed.reshape(len(self.lengths), self.longest, *packed.shape[1:])
        return _moved(packed, self._to_slots, self._from_slots)

    def unpad(self, padded: Tensor) -> Tensor:
        """Converts [N, L, ...] to [M, ...]."""
        if self.is_even:
            return padded.reshape(-1, *padded.shape[2:])
        return _moved(padded, self._from_slots, self._to_slots)

    def _to_slots(self, packed: Tensor) -> Tensor:
        """As `pad`, without a gradient. Rows are copied whole, which on CPUs is much faster than to index elements."""
        shape = (len(self.lengths), self.longest, *packed.shape[1:])
        if not len(packed):
            return packed.new_zeros(shape)
        _, tokens, padding = self._slots
        return packed.index_select(0, tokens).index_fill_(0, padding, 0).view(shape)

    def _from_slots(self, padded: Tensor) -> Tensor:
        """As `unpad`, without a gradient."""
        return padded.flatten(0, 1).index_select(0, self._slots[0])

    def mask(self) -> Tensor:
        """Bool [N, L], True at tokens."""
        return torch.arange(self.longest, device=self.device) < self._on_device[:, None]

    @cached_property
    def bias(self) -> Tensor:
        """[N, 1, 1, L], mask to add to attention scores: 0 at tokens, -inf at padding."""
        padded = ~self.mask()[:, None, None]
        return torch.zeros(padded.shape, device=padded.device).masked_fill(padded, -torch.inf)

    @cached_property
    def starts(self) -> Tensor:
        """int32 [N + 1], the index of each sequence's first token, and the end of the last sequence."""
        return send(nn.functional.pad(self._ends, (1, 0)).int(), self.device)

    @cached_property
    def counts(self) -> Tensor:
        """int32 [N], lengths of the sequences."""
        return self._on_device.int()

    def evenly(self, length: int) -> Tensor:
        """int32 [N + 1], the start of each row, and the end of the last, where all have some length."""
        if length not in self._even:
            end = len(self.lengths) * length + 1
            self._even[length] = torch.arange(0, end, length, dtype=torch.int32, device=self.device)
        return self._even[length]

    def select(self, rows: Tensor) -> Packing:
        """The packing of some sequences [n], indices on the CPU, with the same padded length."""
        return Packing(self.lengths[rows], self.device, self.longest)

    def repeated(self, times: int) -> Packing:
        """The packing of sequences that are each repeated several times, with the same padded length."""
        return Packing(self.lengths.repeat_interleave(times), self.device, self.longest)


class _Moved(torch.autograd.Function):
    """Moves tokens `there`. Their gradient is moved `back`: autograd's own would add rows one after the other."""

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.back = back
        return there(tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(grad), None, None


_moved: Callable[..., Tensor] = _Moved.apply


class Filled(Packing):
    """Caches of N rows, of which the first tokens are filled. How many is a number on the device, which may change.

    Args:
        tokens: int64 [1], the number of tokens in each row.
        rows: N.
        capacity: Tokens that each row has room for.
    """

    def __init__(self, tokens: Tensor, rows: int, capacity: int) -> None:
        # Nothing is computed from numbers of tokens here, which the host does not know.
        self.lengths, self.device, self.longest = torch.full((rows,), capacity), tokens.device, capacity
        self.is_even, self._even, self._tokens = False, {}, tokens

    @cached_property
    def _on_device(self) -> Tensor:
        return self._tokens.repeat(len(self.lengths))


class Excerpt(Packing):
    """The places of some tokens of packed sequences. Packed tensors [K, ...] hold these tokens alone.

    Padded tensors are those of whole sequences, with zeros at all other places.

    Args:
        whole: Packing of the sequences.
        chosen: bool [M] on the CPU, True at the K tokens.
    """

    def __init__(self, whole: Packing, chosen: Tensor) -> None:
        super().__init__(whole.lengths, whole.device, whole.longest)
        self.is_even = False
        self._whole, self._chosen = whole, chosen.nonzero()[:, 0]

    @cached_property
    def tokens(self) -> Tensor:
        return send(self._chosen, self.device)

    @cached_property
    def _rows(self) -> Tensor:
        return self._whole._rows[self._chosen]

    @cached_property
    def _places(self) -> Tensor:
        return self._whole._places[self._chosen]

    def mask(self) -> Tensor:
        mask = torch.zeros(len(self.lengths), self.longest, dtype=torch.bool, device=self.device)
        mask[self.rows, self.places] = True
        return mask
