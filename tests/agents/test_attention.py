"""Packed attention with shared prefixes, against softmax over each completion's whole sequence in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from cuda_operators import cuda_operators
from torch import Tensor

from vlmenv.agents import attention
from vlmenv.agents.attention import Attention, KeysValues
from vlmenv.agents.kernels import CPUKernel, EfficientKernel, ExplicitKernel, FlashKernel
from vlmenv.agents.packing import Packing
from vlmenv.agents.passes import Groups, Prefixes, Siblings, Steps
from vlmenv.core.errors import ModelError

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
    monkeypatch.setattr(attention, "kernel_for", lambda query, masked=False: found)
    with cuda_operators():
        yield


def states(tokens: int, generator: torch.Generator) -> list[Tensor]:
    """Queries, keys and values."""
    shapes = [(tokens, heads, SIZE) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


@dataclass
class Sight:
    """What a token sees, as a question of two places in a sequence."""

    window: int | None = None
    images: tuple[int, ...] = ()
    """the image of each of a prompt's first tokens, -1 for a text's"""

    def within(self, prompt: int) -> Sight:
        """The same for a prompt of some tokens."""
        return replace(self, images=self.images[:prompt])

    def __call__(self, place: int, key: int) -> bool:
        both = [self.images[i] if i < len(self.images) else -1 for i in (place, key)]
        return (key <= place or -1 < both[0] == both[1]) and (self.window is None or place - key < self.window)


def whole(query: Tensor, key: Tensor, value: Tensor, sees: Sight) -> Tensor:
    """Attention of one sequence [T, heads, D], each head of keys shared by two of queries."""
    key, value = (one.repeat_interleave(HEADS // KEY_HEADS, dim=1) for one in (key, value))
    scores = torch.einsum("shd,thd->hst", query, key) * SCALE
    hidden = torch.tensor([[not sees(s, t) for t in range(len(key))] for s in range(len(query))])
    return torch.einsum("hst,thd->shd", scores.masked_fill(hidden, -torch.inf).softmax(-1), value)


def expected(
    prompts: list[int],
    lengths: list[int],
    index: list[int],
    before: list[Tensor],
    after: list[Tensor],
    sees: Sight = Sight(),  # noqa: B008
) -> tuple[Tensor, Tensor]:
    """Outputs of the prompts and of the completions, packed."""
    split = [one.split(prompts) for one in before]
    own = [one.split(lengths) for one in after]
    of_prompts = [whole(*(one[p] for one in split), sees.within(prompts[p])) for p in range(len(prompts))]
    of_completions = [
        whole(*(torch.cat([one[p], mine[i]]) for one, mine in zip(split, own, strict=True)), sees.within(prompts[p]))[
            prompts[p] :
        ]
        for i, p in enumerate(index)
    ]
    return torch.cat(of_prompts), torch.cat(of_completions)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case: str) -> None:
    check(case, Sight())


@pytest.mark.parametrize("kernel", [CPUKernel, ExplicitKernel, EfficientKernel], indirect=True)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("window", [1, 3, 6, 100, None])
def test_values_and_gradients_within_a_window(kernel: None, case: str, window: int | None) -> None:
    """In prompts whose images see each other, and without; a window ends within prompts and within completions."""
    check(case, Sight(window))
    check(case, Sight(window, (-1, 0, 0, 1, 1, -1, 2)))


def check(case: str, sees: Sight) -> None:
    prompts, lengths, index = CASES[case]
    generator, cpu = torch.Generator().manual_seed(0), torch.device("cpu")
    before, after = states(sum(prompts), generator), states(sum(lengths), generator)
    wanted = expected(prompts, lengths, index, before, after, sees)
    images = torch.tensor([sees.images[i] for length in prompts for i in range(length)]) if sees.images else None
    packings = [Packing(torch.tensor(one), cpu) for one in (prompts, lengths)]
    kinds = {} if images is None else dict.fromkeys(("full_attention", "sliding_attention"), images)
    groups = Groups(*packings, torch.tensor(index), kinds)
    states_of_both = (torch.cat(pair) for pair in zip(before, after, strict=True))
    first, second = groups.mix(0, Attention(SCALE, sees.window), *states_of_both).split([sum(prompts), sum(lengths)])
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
    monkeypatch.setattr(attention, "kernel_for", lambda query, masked=False: FlashKernel())
    cpu, generator = torch.device("cpu"), torch.Generator().manual_seed(0)
    groups = Groups(Packing(torch.tensor(prompts), cpu), Packing(torch.tensor(lengths), cpu), torch.tensor(index))
    with cuda_operators() as calls:
        groups.mix(0, Attention(SCALE), *states(sum(prompts) + sum(lengths), generator))
        calls.clear()
        groups.mix(0, Attention(SCALE), *states(sum(prompts) + sum(lengths), generator))
    in_segments = case in ("even", "a completion without tokens")
    assert (calls == {"_flash_attention_forward": 3}) == in_segments


@pytest.mark.usefixtures("kernel")
def test_a_token_at_a_time_while_completions_leave() -> None:
    check_steps(Sight())


@pytest.mark.parametrize("kernel", [CPUKernel, ExplicitKernel, EfficientKernel], indirect=True)
@pytest.mark.parametrize("window", [1, 2, 3, 5, 100])
def test_a_token_at_a_time_within_a_window(kernel: None, window: int) -> None:
    check_steps(Sight(window))


def check_steps(sees: Sight) -> None:
    """Four completions of three prompts; after two tokens the second and third go, and with them a prompt."""
    prompts, index, generator, cpu = [3, 5, 2], [0, 1, 1, 2], torch.Generator().manual_seed(0), torch.device("cpu")
    before, after = states(sum(prompts), generator), states(4 * 4, generator)
    _, wanted = expected(prompts, [4] * 4, index, before, after, sees)
    wanted = wanted.view(4, 4, HEADS, SIZE)
    rows = [one.view(4, 4, -1, SIZE) for one in after]
    with torch.no_grad():
        prefixes = Prefixes(Packing(torch.tensor(prompts), cpu))
        prefixes.mix(7, Attention(SCALE, sees.window), *before)
        steps = Steps(prefixes, torch.tensor(index), 4)
        for place in range(4):
            if place == 2:
                steps.select(torch.tensor([0, 3]))
            going = [0, 1, 2, 3] if place < 2 else [0, 3]
            found = steps.mix(7, Attention(SCALE, sees.window), *(one[going, place] for one in rows))
            torch.testing.assert_close(found, wanted[going, place], rtol=1e-12, atol=1e-12)
            steps.length += 1
    assert isinstance(prefixes.past[7], KeysValues)
    assert len(prefixes.past[7].keys) == 2


def test_attention_with_sinks_or_capped_scores_is_refused() -> None:
    """As gpt-oss's and Gemma 2's, in whatever family: they would be left out."""
    query, prefixes = torch.zeros(1, HEADS, 3, SIZE), Prefixes(Packing(torch.tensor([3]), torch.device("cpu")))
    for name in ("s_aux", "softcap"):
        with pytest.raises(ModelError, match=name):
            attention._attend(
                torch.nn.Identity(),
                query,
                query,
                query,
                None,
                scaling=1.0,
                packed=prefixes,
                **{name: torch.ones(HEADS)},
            )


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
