"""Packed attention with shared prefixes, against softmax over each completion's whole sequence in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cuda_operators import cuda_operators
from torch import Tensor

from vlmenv.agents import attention
from vlmenv.agents.attention import Groups, Prefixes, Siblings, Steps
from vlmenv.agents.kernels import CPUKernel, EfficientKernel, ExplicitKernel, FlashKernel
from vlmenv.agents.packing import Packing

HEADS, KEY_HEADS, SIZE, SCALE = 4, 2, 8, 0.3
CASES = {
    "even": ([5, 5], [3, 3, 3, 3], [0, 0, 1, 1]),
    "ragged": ([5, 2, 7], [3, 1, 4, 2, 2], [0, 0, 0, 2, 1]),
    "shuffled": ([4, 6], [2, 5, 1, 3], [1, 0, 1, 0]),
    "a completion without tokens": ([3, 3], [2, 0, 1], [0, 0, 1]),
    "a prompt without completions": ([3, 4, 2], [2, 1], [0, 2]),
}


@pytest.fixture(params=[CPUKernel, ExplicitKernel, FlashKernel, EfficientKernel, "padded flash"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    is_padded = request.param == "padded flash"
    found = FlashKernel() if is_padded else request.param()
    if is_padded:
        monkeypatch.setattr(attention, "attends_in_segments", lambda kernel, query: False)
    monkeypatch.setattr(CPUKernel, "_is_small", lambda self, part: False)  # else it would be the explicit one
    monkeypatch.setattr(attention, "kernel_for", lambda query: found)
    with cuda_operators():
        yield


def states(tokens: int, generator: torch.Generator) -> list[Tensor]:
    """Queries, keys and values."""
    shapes = [(tokens, heads, SIZE) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


def whole(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of one sequence [T, heads, D], each head of keys shared by two of queries."""
    key, value = (one.repeat_interleave(HEADS // KEY_HEADS, dim=1) for one in (key, value))
    scores = torch.einsum("shd,thd->hst", query, key) * SCALE
    later = torch.ones(len(query), len(key), dtype=torch.bool).triu(1)
    return torch.einsum("hst,thd->shd", scores.masked_fill(later, -torch.inf).softmax(-1), value)


def expected(
    prompts: list[int], lengths: list[int], index: list[int], before: list[Tensor], after: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Outputs of the prompts and of the completions, packed."""
    split = [one.split(prompts) for one in before]
    own = [one.split(lengths) for one in after]
    of_prompts = [whole(*(one[p] for one in split)) for p in range(len(prompts))]
    of_completions = [
        whole(*(torch.cat([one[p], mine[i]]) for one, mine in zip(split, own, strict=True)))[prompts[p] :]
        for i, p in enumerate(index)
    ]
    return torch.cat(of_prompts), torch.cat(of_completions)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case: str) -> None:
    prompts, lengths, index = CASES[case]
    generator, cpu = torch.Generator().manual_seed(0), torch.device("cpu")
    before, after = states(sum(prompts), generator), states(sum(lengths), generator)
    wanted = expected(prompts, lengths, index, before, after)
    groups = Groups(Packing(torch.tensor(prompts), cpu), Packing(torch.tensor(lengths), cpu), torch.tensor(index))
    states_of_both = (torch.cat(pair) for pair in zip(before, after, strict=True))
    first, second = groups.attend(0, *states_of_both, SCALE).split([sum(prompts), sum(lengths)])
    pushes = [torch.randn(one.shape, generator=generator, dtype=torch.float64) for one in wanted]
    for found, right in zip((first, second), wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
    gradients = [
        torch.autograd.grad(sum((push * out).sum() for push, out in zip(pushes, outs, strict=True)), [*before, *after])
        for outs in ((first, second), wanted)
    ]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_flash_attention_in_segments_is_used_where_it_can_be(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, lengths, index = CASES[case]
    monkeypatch.setattr(attention, "kernel_for", lambda query: FlashKernel())
    cpu, generator = torch.device("cpu"), torch.Generator().manual_seed(0)
    groups = Groups(Packing(torch.tensor(prompts), cpu), Packing(torch.tensor(lengths), cpu), torch.tensor(index))
    with cuda_operators() as calls:
        groups.attend(0, *states(sum(prompts) + sum(lengths), generator), SCALE)
        calls.clear()
        groups.attend(0, *states(sum(prompts) + sum(lengths), generator), SCALE)
    in_segments = case in ("even", "a completion without tokens")
    assert (calls == {"_flash_attention_forward": 3}) == in_segments


@pytest.mark.usefixtures("kernel")
def test_a_token_at_a_time_while_completions_leave() -> None:
    """Four completions of three prompts; after two tokens the second and third go, and with them a prompt."""
    prompts, index, generator, cpu = [3, 5, 2], [0, 1, 1, 2], torch.Generator().manual_seed(0), torch.device("cpu")
    before, after = states(sum(prompts), generator), states(4 * 4, generator)
    _, wanted = expected(prompts, [4] * 4, index, before, after)
    wanted = wanted.view(4, 4, HEADS, SIZE)
    rows = [one.view(4, 4, -1, SIZE) for one in after]
    with torch.no_grad():
        prefixes = Prefixes(Packing(torch.tensor(prompts), cpu))
        prefixes.attend(7, *before, SCALE)
        steps = Steps(prefixes, torch.tensor(index), 4)
        for place in range(4):
            if place == 2:
                steps.select(torch.tensor([0, 3]))
            going = [0, 1, 2, 3] if place < 2 else [0, 3]
            found = steps.attend(7, *(one[going, place] for one in rows), SCALE)
            torch.testing.assert_close(found, wanted[going, place], rtol=1e-12, atol=1e-12)
            steps.length += 1
    assert len(prefixes.keys[7]) == 2


@pytest.mark.parametrize("lengths", [[3, 3], [1, 4, 0, 2]])
def test_packing_and_back(lengths: list[int]) -> None:
    packing = Packing(torch.tensor(lengths), torch.device("cpu"))
    packed = torch.arange(sum(lengths) * 2.0).view(-1, 2)
    padded = packing.pad(packed)
    start = 0
    for row, length in enumerate(lengths):
        assert torch.equal(padded[row, :length], packed[start : start + length])
        assert not padded[row, length:].any()
        assert packing.mask()[row].tolist() == [place < length for place in range(max(lengths))]
        start += length
    assert torch.equal(packing.unpad(padded), packed)


def test_some_of_the_sequences_stay_as_long_as_they_were_padded() -> None:
    packing = Packing(torch.tensor([2, 4, 2]), torch.device("cpu"))
    assert not packing.is_even
    some = packing.select(torch.tensor([0, 2]))
    assert not some.is_even
    assert some.mask().tolist() == [[True, True, False, False]] * 2
    packed = torch.arange(4.0)
    assert some.pad(packed).tolist() == [[0, 1, 0, 0], [2, 3, 0, 0]]
    assert torch.equal(some.unpad(some.pad(packed)), packed)
    assert some.starts.tolist() == [0, 2, 4]
    assert some.counts.tolist() == [2, 2]
    assert packing.select(torch.tensor([1])).is_even


def test_where_all_are_tokens_nothing_is_padding() -> None:
    lengths = {True: [3, 3], False: [3, 2]}
    for is_even, one in lengths.items():
        assert (Prefixes(Packing(torch.tensor(one), torch.device("cpu"))).padding is None) == is_even


@pytest.mark.parametrize("index", [[0, 0, 1, 1], [1, 0, 1], [0, 2, 2]])
def test_folding_and_back(index: list[int]) -> None:
    rows = torch.randn(len(index), HEADS, 3, SIZE)
    siblings = Siblings(torch.tensor(index), 3 if 2 in index else 2, torch.device("cpu"))
    folded = siblings.fold(rows, KEY_HEADS)
    assert torch.equal(siblings.unfold(folded, HEADS), rows)
    for prompt in set(index):
        mine = torch.cat([rows[i] for i, p in enumerate(index) if p == prompt], dim=1)
        for head in range(HEADS):
            met = folded[prompt, head // (HEADS // KEY_HEADS)]
            assert all((met == query).all(-1).any() for query in mine[head])
