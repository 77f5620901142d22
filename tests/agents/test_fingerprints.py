"""Fingerprints against hand-made changes, and against an independent computation with Python's integers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vlmenv.agents.engines import fingerprints
from vlmenv.agents.engines.fingerprints import Fingerprint, fingerprint

CPU = torch.device("cpu")


def by_hand(words: list[int]) -> int:
    """The documented sum, with unsigned integers of Python."""
    modulus, total = 2**64, 0
    for place, word in enumerate(words, start=1):
        x = (word + place * (2**64 - 7046029254386353131)) % modulus
        for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            x = ((x ^ (x >> 33)) * multiplier) % modulus
        total = (total + (x ^ (x >> 33))) % modulus
    return total


def test_fingerprints_follow_their_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    words = torch.randint(-(2**63), 2**63 - 1, (23,), generator=torch.Generator().manual_seed(0))
    assert fingerprint([words])[0] % 2**64 == by_hand(words.tolist())
    monkeypatch.setitem(fingerprints._CHUNKS, "cpu", 4)
    assert fingerprint([words])[0] % 2**64 == by_hand(words.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool])
@pytest.mark.parametrize("size", [1, 10, 11])
def test_tensors_of_any_dtype_and_size_are_told_apart(dtype: torch.dtype, size: int) -> None:
    weight = (torch.arange(2.0 * size) % 3).to(dtype)
    odd = weight[1 : size + 1]  # not aligned with words
    assert fingerprint([odd]) == fingerprint([odd.clone()])
    changed = odd.clone()
    changed[-1] = 1 - changed[-1].float()
    assert fingerprint([odd]) != fingerprint([changed])


def test_places_messages_and_length_count() -> None:
    def of(*messages: Tensor) -> int:
        stream = Fingerprint(CPU)
        for message in messages:
            stream.add(message)
        return int(stream.total)

    one, other = torch.randn(64).view(torch.int64), torch.randn(64).view(torch.int64)
    flipped = one.clone()
    flipped[17] ^= 1
    assert of(one, other) == of(torch.cat([one, other]))
    assert len({of(one, other), of(other, one), of(flipped, other), of(one), of(one.flip(0))}) == 5
    assert of(torch.zeros(3, dtype=torch.int64)) != of(torch.zeros(4, dtype=torch.int64))


@pytest.mark.slow
def test_one_flipped_bit_in_every_number_never_cancels() -> None:
    """With weighted sums of the bits, which are linear, it does in two of a thousand vectors of 32 numbers."""
    generator = torch.Generator().manual_seed(0)
    for vector in torch.randn(4000, 32, generator=generator):
        assert fingerprint([vector]) != fingerprint([(vector.view(torch.int32) ^ (1 << 22)).view(torch.float32)])
