"""Packing: sequences concatenated without padding."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn


class Packing:
    """The places of tokens of N sequences that are concatenated without padding.

    Args:
        lengths: int64 [N] on the CPU, lengths of the sequences.
        device: Device of the packed tensors.
        longest: Padded length L. Default: that of the longest sequence.
    """

    def __init__(self, lengths: Tensor, device: torch.device, longest: int | None = None) -> None:
        self.lengths = lengths
        self._on_device = lengths.to(device)
        self.longest = int(lengths.max()) if longest is None else longest
        self.is_even = bool((lengths == self.longest).all())
        ends = lengths.cumsum(0)
        self.total = int(ends[-1])
        rows = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        self.rows = rows.to(device)
        """[M], the sequence of each token"""
        self.places = (torch.arange(self.total) - (ends - lengths)[rows]).to(device)
        """[M], the place of each token in its sequence"""
        self.ends = (ends - 1).to(device)
        """[N], the index of each sequence's last token"""

    def pad(self, packed: Tensor) -> Tensor:
        """Converts [M, ...] to [N, L, ...], padded with zeros at the right."""
        shape = (len(self.lengths), self.longest, *packed.shape[1:])
        if self.is_even:
            return packed.reshape(shape)
        return packed.new_zeros(shape).index_put((self.rows, self.places), packed)

    def unpad(self, padded: Tensor) -> Tensor:
        """Converts [N, L, ...] to [M, ...]."""
        if self.is_even:
            return padded.reshape(-1, *padded.shape[2:])
        return padded[self.rows, self.places]

    def mask(self) -> Tensor:
        """Bool [N, L], True at tokens."""
        return torch.arange(self.longest, device=self._on_device.device) < self._on_device[:, None]

    @cached_property
    def bias(self) -> Tensor:
        """[N, 1, 1, L], mask to add to attention scores: 0 at tokens, -inf at padding."""
        padded = ~self.mask()[:, None, None]
        return torch.zeros(padded.shape, device=padded.device).masked_fill(padded, -torch.inf)

    @cached_property
    def starts(self) -> Tensor:
        """int32 [N + 1], the index of each sequence's first token, and the end of the last sequence."""
        return nn.functional.pad(self.ends + 1, (1, 0)).int()

    @cached_property
    def counts(self) -> Tensor:
        """int32 [N], lengths of the sequences."""
        return self._on_device.int()

    def select(self, rows: Tensor) -> Packing:
        """The packing of some sequences [n], indices on the CPU, with the same padded length."""
        return Packing(self.lengths[rows], self.rows.device, self.longest)

    def repeated(self, times: int) -> Packing:
        """The packing of sequences that are each repeated several times, with the same padded length."""
        return Packing(self.lengths.repeat_interleave(times), self.rows.device, self.longest)
