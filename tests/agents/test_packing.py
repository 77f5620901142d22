"""Packing against the same by a loop over sequences, in value and in gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vlmenv.agents.packing import Excerpt, Packing

LENGTHS = torch.tensor([3, 1, 4])
CHOSEN = torch.tensor([True, False, True, True, False, True, False, True])


def padded_by_loop(packed: Tensor) -> Tensor:
    rows = [row_of(one) for one in packed.split(LENGTHS.tolist())]
    return torch.stack(rows)


def row_of(one: Tensor) -> Tensor:
    return torch.cat([one, one.new_zeros(4 - len(one), *one.shape[1:])])


@pytest.mark.parametrize("inner", [(), (2,), (2, 5)], ids=str)
def test_padding_is_that_of_a_loop(inner: tuple[int, ...]) -> None:
    packing, packed = Packing(LENGTHS, torch.device("cpu")), torch.randn(8, *inner)
    padded = packing.pad(packed)
    assert torch.equal(padded, padded_by_loop(packed))
    assert torch.equal(packing.unpad(padded), packed)
    turned = padded.transpose(0, 1).contiguous().transpose(0, 1)  # rows that do not follow one another in memory
    assert torch.equal(packing.unpad(turned), packed)


def test_sequences_of_one_length_are_not_copied() -> None:
    packing, packed = Packing(torch.tensor([4, 4]), torch.device("cpu")), torch.randn(8, 3)
    assert packing.pad(packed).data_ptr() == packed.data_ptr() == packing.unpad(packing.pad(packed)).data_ptr()


def test_gradients_are_those_of_a_loop() -> None:
    packing, packed = Packing(LENGTHS, torch.device("cpu")), torch.randn(8, 2, requires_grad=True)
    push = torch.randn(3, 4, 2)
    (found,) = torch.autograd.grad(packing.pad(packed), packed, push)
    (right,) = torch.autograd.grad(padded_by_loop(packed), packed, push)
    assert torch.equal(found, right)
    padded, push = torch.randn(3, 4, 2, requires_grad=True), torch.randn(8, 2)
    (found,) = torch.autograd.grad(packing.unpad(padded), padded, push)
    assert torch.equal(found, padded_by_loop(push))  # padding has no gradient


def test_an_excerpt_has_zeros_where_it_has_no_token() -> None:
    excerpt, packed = Excerpt(Packing(LENGTHS, torch.device("cpu")), CHOSEN), torch.randn(8, 2)
    padded = excerpt.pad(packed[CHOSEN])
    assert torch.equal(padded, padded_by_loop(packed * CHOSEN[:, None]))
    assert torch.equal(excerpt.unpad(padded), packed[CHOSEN])
    assert torch.equal(excerpt.mask(), padded_by_loop(CHOSEN.long()).bool())


def test_an_excerpt_may_have_no_token() -> None:
    excerpt = Excerpt(Packing(LENGTHS, torch.device("cpu")), torch.zeros(8, dtype=torch.bool))
    padded = excerpt.pad(torch.randn(0, 2))
    assert torch.equal(padded, torch.zeros(3, 4, 2))
    assert excerpt.unpad(padded).shape == (0, 2)
