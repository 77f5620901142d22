"""Fingerprints of weights, computed on the device that holds them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_WORD = torch.int64
_CHUNKS = {"cpu": 1 << 16}
"""Words that are mixed at a time, by device type: the intermediate results fit a CPU's cache."""
_CHUNK = 1 << 22
"""Words that are mixed at a time on other devices."""
_GOLDEN = -7046029254386353131  # 2**64 over the golden ratio
_MULTIPLIERS = (-49064778989728563, -4265267296055464877)  # of MurmurHash3's 64-bit finaliser


class Fingerprint:
    """A 64-bit fingerprint of a stream of words, computed on the words' device.

    The sum over all words of `mix(word + place * constant)` modulo 2**64, where `mix` is the finaliser of MurmurHash3.
    The mix is not linear, so that equal changes of many words do not cancel. A sum has no order, so that neither the
    division into messages nor that into chunks matters.

    Args:
        device: Device of the words.

    Attributes:
        total: int64 [1], the fingerprint of all words so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.total = torch.zeros(1, dtype=_WORD, device=device)
        self._place = 1  # so that zeros count too

    def add(self, words: Tensor) -> None:
        """Continues the stream.

        Args:
            words: int64 [M].
        """
        for chunk in torch.split(words, _CHUNKS.get(words.device.type, _CHUNK)):
            places = torch.arange(self._place, self._place + len(chunk), device=chunk.device)
            self.total += _mix(places.mul_(_GOLDEN).add_(chunk)).sum()
            self._place += len(chunk)


def _mix(words: Tensor) -> Tensor:
    """MurmurHash3's 64-bit finaliser, in place."""
    for multiplier in _MULTIPLIERS:
        words.bitwise_xor_(_upper(words)).mul_(multiplier)
    return words.bitwise_xor_(_upper(words))


def _upper(words: Tensor) -> Tensor:
    """The upper 31 bits of each word; torch shifts copies of the sign in."""
    return (words >> 33).bitwise_and_((1 << 31) - 1)


@torch.no_grad()
def fingerprint(weights: Iterable[Tensor]) -> tuple[int, ...]:
    """Fingerprints of tensors of any dtype: two tensors have the same only if their bytes are the same.

    (Up to chance: different bytes have the same fingerprint with a probability of about 2**-64.)
    """
    return tuple(_fingerprint(weight.detach()) for weight in weights)


def _fingerprint(weight: Tensor) -> int:
    stream = Fingerprint(weight.device)
    stream.add(_words(weight))
    return int(stream.total)


def _words(weight: Tensor) -> Tensor:
    """A tensor's bytes as int64 [M], padded with zeros."""
    data = weight.contiguous().view(-1).view(torch.uint8)
    missing = -len(data) % _WORD.itemsize
    if missing:
        data = torch.nn.functional.pad(data, (0, missing))
    elif data.storage_offset() % _WORD.itemsize:
        data = data.clone()
    return data.view(_WORD)
