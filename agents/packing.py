"""Where tokens lie that are packed, one sequence after the other."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn


class Packing:
    """Where the tokens of sequences lie, one sequence after the other.

    Args:
        lengths: [N], of the sequences, on the CPU.
        device: Of the tensors that will be packed.
        longest: L, what sequences are padded to; that of the longest where left out.
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
        """[M], its place there"""
        self.ends = (ends - 1).to(device)
        """[N], where each sequence's last token lies"""

    def pad(self, packed: Tensor) -> Tensor:
        """[M, ...] as [N, L, ...], with zeros after the end of each sequence."""
        shape = (len(self.lengths), self.longest, *packed.shape[1:])
        if self.is_even:
            return packed.reshape(shape)
        return packed.new_zeros(shape).index_put((self.rows, self.places), packed)

    def unpad(self, padded: Tensor) -> Tensor:
        """[N, L, ...] as [M, ...]."""
        if self.is_even:
            return padded.reshape(-1, *padded.shape[2:])
        return padded[self.rows, self.places]

    def mask(self) -> Tensor:
        """[N, L] bool, True at tokens."""
        return torch.arange(self.longest, device=self._on_device.device) < self._on_device[:, None]

    @cached_property
    def bias(self) -> Tensor:
        """[N, 1, 1, L], what is added to scores: 0 at tokens, -inf where padded."""
        padded = ~self.mask()[:, None, None]
        return torch.zeros(padded.shape, device=padded.device).masked_fill(padded, -torch.inf)

    @cached_property
    def starts(self) -> Tensor:
        """[N + 1] int32, where each sequence starts, and where the last ends."""
        return nn.functional.pad(self.ends + 1, (1, 0)).int()

    @cached_property
    def counts(self) -> Tensor:
        """[N] int32, how many tokens each sequence has."""
        return self._on_device.int()

    def select(self, rows: Tensor) -> Packing:
        """Of some of the sequences [n], given on the CPU, padded as before."""
        return Packing(self.lengths[rows], self.rows.device, self.longest)
