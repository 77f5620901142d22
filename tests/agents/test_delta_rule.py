"""Gated delta rules over packed sequences, against the recurrence of their paper, sequence by sequence in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_conformance import InDouble
from torch import Tensor, nn
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from vlmenv.agents.delta_rule import States, keep_states_apart
from vlmenv.agents.packing import Packing
from vlmenv.agents.passes import Groups, Prefixes, Steps

SIZE, TAPS = 16, 4
CASES = {
    "even": ([70, 70], [3, 3, 3, 3], [0, 0, 1, 1]),
    "ragged, of several chunks": ([150, 2, 67], [3, 70, 4, 2, 1], [0, 0, 0, 2, 1]),
    "shuffled": ([4, 6], [2, 5, 1, 3], [1, 0, 1, 0]),
    "a completion without tokens": ([3, 3], [2, 0, 1], [0, 0, 1]),
    "prompts shorter than the convolution": ([1, 2], [1, 2, 6], [0, 1, 1]),
    "a prompt without completions": ([3, 4, 2], [2, 1], [0, 2]),
}
CPU = torch.device("cpu")


@pytest.fixture
def layer() -> nn.Module:
    """A layer of random weights, as the only one of a model, whose states decay slowly."""
    config = Qwen3_5TextConfig(
        hidden_size=SIZE,
        linear_key_head_dim=4,
        linear_value_head_dim=6,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_conv_kernel_dim=TAPS,
        num_hidden_layers=1,
    )
    torch.manual_seed(0)
    layer = Qwen3_5GatedDeltaNet(config, 0).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    nn.init.constant_(layer.A_log, -3)
    keep_states_apart(nn.ModuleList([layer]))
    return layer


def recurrence(layer: nn.Module, hidden: Tensor) -> Tensor:
    """One sequence [T, SIZE], token by token: `S = a S (I - b k k') + b v k'`, in the paper's equation 10."""
    of = SimpleNamespace(**{name: getattr(layer, name) for name in ("key_dim", "value_dim", "head_k_dim")})
    mixed = nn.functional.pad(layer.in_proj_qkv(hidden), (0, 0, TAPS - 1, 0))
    taps = layer.conv1d.weight[:, 0]
    mixed = torch.stack([(mixed[t : t + TAPS] * taps.T).sum(0) for t in range(len(hidden))])
    query, key, value = nn.functional.silu(mixed).split([of.key_dim, of.key_dim, of.value_dim], dim=-1)
    query, key = (one.view(len(hidden), 2, 4).repeat_interleave(2, dim=1) for one in (query, key))
    query, key = (one / (one.square().sum(-1, keepdim=True) + 1e-6).sqrt() for one in (query, key))
    value, rate = value.view(len(hidden), 4, 6), layer.in_proj_b(hidden).sigmoid()
    decay = (-layer.A_log.exp() * nn.functional.softplus(layer.in_proj_a(hidden) + layer.dt_bias)).exp()
    state, outs = hidden.new_zeros(4, 6, 4), []
    for t in range(len(hidden)):
        q, k, v, a, b = query[t], key[t], value[t], decay[t][:, None, None], rate[t][:, None, None]
        state = a * (state - b * (state @ k[:, :, None]) @ k[:, None]) + b * v[:, :, None] @ k[:, None]
        outs.append((state @ q[:, :, None])[..., 0] / 2)  # by the root of the size of a head
    out = torch.stack(outs)
    out = out * (out.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * layer.norm.weight
    gated = out * nn.functional.silu(layer.in_proj_z(hidden).view(len(hidden), 4, 6))
    return layer.out_proj(gated.flatten(1))


def expected(layer: nn.Module, prompts: list[Tensor], completions: list[Tensor], index: list[int]) -> list[Tensor]:
    """Outputs of each prompt, and of each completion behind its prompt."""
    pairs = list(zip(index, completions, strict=True))
    after = [recurrence(layer, torch.cat([prompts[p], one]))[len(prompts[p]) :] for p, one in pairs]
    return [*(recurrence(layer, one) for one in prompts), *after]


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(layer: nn.Module, case: str) -> None:
    """Every sequence is as if it were alone: a state that ran into its neighbour would change it."""
    lengths, own, index = CASES[case]
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(sum(lengths) + sum(own), SIZE, generator=random, dtype=torch.float64, requires_grad=True)
    parts = hidden.split([*lengths, *own])
    wanted = torch.cat(expected(layer, list(parts[: len(lengths)]), list(parts[len(lengths) :]), index))
    groups = Groups(Packing(torch.tensor(lengths), CPU), Packing(torch.tensor(own), CPU), torch.tensor(index))
    with InDouble():
        found = layer(hidden[None], packed=groups)[0]
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
        push, inputs = torch.randn(wanted.shape, generator=random, dtype=torch.float64), [hidden, *layer.parameters()]
        gradients = [torch.autograd.grad((push * out).sum(), inputs) for out in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("fixed", [(), (0, 1, 2, 3), (1, 2), (0, 3)], ids=str)
def test_a_token_at_a_time_while_completions_leave(fixed: tuple[int, ...], layer: nn.Module) -> None:
    """Three completions of two prompts; after two tokens the first goes, and with it a prompt.

    Steps of fixed shapes, at some places, are computed twice, and change nothing the second time.
    """
    lengths, index, random = [5, 70], [0, 1, 1], torch.Generator().manual_seed(0)
    prompts = [torch.randn(length, SIZE, generator=random, dtype=torch.float64) for length in lengths]
    completions = torch.randn(3, 4, SIZE, generator=random, dtype=torch.float64)
    with torch.no_grad(), InDouble():
        wanted = torch.stack(expected(layer, prompts, list(completions), index)[2:])
        prefixes = Prefixes(Packing(torch.tensor(lengths), CPU))
        layer(torch.cat(prompts)[None], packed=prefixes)
        steps, kept = Steps(prefixes, torch.tensor(index), 4), prefixes.past[0]
        before = kept.rule.clone(), kept.inputs.clone()
        for place in range(4):
            if place == 2:
                steps.select(torch.tensor([1, 2]))
            going = [0, 1, 2] if place < 2 else [1, 2]
            steps.place = torch.tensor([place]) if place in fixed else None
            for _ in range(2 if place in fixed else 1):
                found = layer(completions[going, place][None], packed=steps)[0]
                torch.testing.assert_close(found, wanted[going, place], rtol=1e-11, atol=1e-11)
            held = sum(one.numel() for one in steps.own[0].tensors if one.is_floating_point())
            assert held == len(going) * sum(one[0].numel() for one in before) * (2 if place in fixed else 1)
            steps.length += 1
    assert torch.equal(kept.rule, before[0])
    assert torch.equal(kept.inputs, before[1])
    assert not prefixes.past  # the completions have states of their own
    assert len(steps.own[0].rule) == 2


def test_prompts_of_several_passes_are_joined(layer: nn.Module) -> None:
    random = torch.Generator().manual_seed(0)
    parts = [torch.randn(length, SIZE, generator=random, dtype=torch.float64) for length in (5, 3, 70)]
    with torch.no_grad(), InDouble():
        whole, several = Prefixes(Packing(torch.tensor([5, 3, 70]), CPU)), []
        layer(torch.cat(parts)[None], packed=whole)
        for own in (parts[:2], parts[2:]):
            several.append(Prefixes(Packing(torch.tensor([len(one) for one in own]), CPU)))
            layer(torch.cat(own)[None], packed=several[-1])
        joined = Prefixes.joined(several)
    assert isinstance(joined.past[0], States)
    torch.testing.assert_close(joined.past[0].rule, whole.past[0].rule)
    torch.testing.assert_close(joined.past[0].inputs, whole.past[0].inputs)
