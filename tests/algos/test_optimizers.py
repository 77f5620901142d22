"""AdamW with less memory, beside PyTorch's own."""

from __future__ import annotations

import copy
import io
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlmenv.algos.optimizers import AdamW8bit, OffloadedAdamW, RoundingAdamW, make_optimizer, state_bytes
from vlmenv.core.errors import ConfigError

KINDS = [RoundingAdamW, AdamW8bit, OffloadedAdamW]
CPU = torch.device("cpu")


def weights(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """A large weight of an odd size, and a small one."""
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in ((97, 91), (7,))]


def make(kind: Any, own: list[nn.Parameter], **options: Any) -> Any:
    if kind is AdamW8bit:
        pytest.importorskip("bitsandbytes")
    return kind([{"params": own[:1]}, {"params": own[1:], "lr": 3e-3}], lr=1e-2, weight_decay=0.1, **options)


def run(optimizer: Any, own: list[nn.Parameter], steps: range, scale: float = 1.0) -> list[Tensor]:
    for step in steps:
        generator = torch.Generator().manual_seed(step + 1)
        for one in own:
            one.grad = (scale * torch.randn(one.shape, generator=generator)).to(one.dtype)
        optimizer.step()
        optimizer.zero_grad()
    return [one.detach().clone() for one in own]


def right(steps: int = 5, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """By PyTorch, in float64 for float32 weights that begin as those of `weights(dtype)`."""
    own = [nn.Parameter(one.detach().double()) for one in weights(dtype)]
    optimizer = make(torch.optim.AdamW, own)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step + 1)
        for one in own:
            one.grad = torch.randn(one.shape, generator=generator).to(dtype).double()
        optimizer.step()
    return [one.detach() for one in own]


@pytest.mark.parametrize("kind", [RoundingAdamW, OffloadedAdamW])
def test_in_float32_it_is_pytorchs_adamw(kind: Any) -> None:
    for ours, theirs in zip(run(make(kind, own := weights()), own, range(5)), right(), strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bits_are_near(dtype: torch.dtype) -> None:
    """Five steps of at most .01 each, so that the largest change is about .05."""
    own = weights(dtype)
    before = [one.detach().clone().double() for one in own]
    found = run(optimizer := make(AdamW8bit, own), own, range(5))
    kept = optimizer.state[own[0]]
    assert {name: kept[name].dtype for name in ("codes1", "codes2")} == dict.fromkeys(("codes1", "codes2"), torch.uint8)
    errors = [(a.double() - b).abs().mean() for a, b in zip(found, right(dtype=dtype), strict=True)]
    moved = [(b - a).abs().mean() for a, b in zip(before, right(dtype=dtype), strict=True)]
    rounding = 0 if dtype == torch.float32 else 2e-3
    assert errors[0] < 0.1 * moved[0] + rounding
    assert errors[1] < (1e-6 if dtype == torch.float32 else 1e-2)


def test_offloaded_updates_of_bfloat16_weights_are_those_of_float32() -> None:
    own = weights(torch.bfloat16)
    found = run(make(OffloadedAdamW, own), own, range(5))
    for ours, theirs in zip(found, right(dtype=torch.bfloat16), strict=True):
        assert torch.equal(ours, theirs.float().bfloat16())


@pytest.mark.parametrize("kind", [RoundingAdamW, AdamW8bit])
def test_small_updates_of_bfloat16_weights_add_up(kind: Any) -> None:
    """A hundred steps down by 1e-4 from 1. Neighbours lie .004 apart: rounded to the nearest, none would count."""
    if kind is AdamW8bit:
        pytest.importorskip("bitsandbytes")
    own = nn.Parameter(torch.ones(8192, dtype=torch.bfloat16))
    optimizer = kind([own], lr=1e-4)
    for _ in range(100):
        own.grad = torch.ones_like(own)
        optimizer.step()
    assert float(own.detach().float().mean()) == pytest.approx(0.99, abs=5e-4)
    nearest = nn.Parameter(torch.ones(8192, dtype=torch.bfloat16))
    plain = torch.optim.AdamW([nearest], lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        nearest.grad = torch.ones_like(nearest)
        plain.step()
    assert torch.equal(nearest, torch.ones_like(nearest))


def test_rounding_is_to_a_neighbour_and_right_in_the_mean() -> None:
    own = nn.Parameter(torch.full((1 << 16,), -1.0, dtype=torch.bfloat16))
    optimizer = RoundingAdamW([own], lr=1e-3)
    own.grad = torch.ones_like(own)
    optimizer.step()
    found = own.detach().float()
    step = 2**-7  # below -1
    assert set(found.unique().tolist()) == {-1.0, -1.0 - step}
    assert float(found.mean()) == pytest.approx(-1.001, abs=5 * step * 0.5 / 256)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_optimizer_goes_on_bit_for_bit(kind: Any, dtype: torch.dtype) -> None:
    own = weights(dtype)
    optimizer = make(kind, own)
    run(optimizer, own, range(3))
    again = [nn.Parameter(one.detach().clone()) for one in own]
    resumed = make(kind, again)
    stream = io.BytesIO()
    torch.save(optimizer.state_dict(), stream)
    stream.seek(0)
    resumed.load_state_dict(torch.load(stream, weights_only=True))
    there, here = run(optimizer, own, range(3, 6)), run(resumed, again, range(3, 6))
    assert all(map(torch.equal, there, here))
    fresh = [nn.Parameter(one.detach().clone()) for one in weights(dtype)]
    assert all(map(torch.equal, run(make(kind, fresh), fresh, range(6)), there))


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_of_the_state_are_as_told(name: Any, dtype: torch.dtype) -> None:
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    own = nn.Parameter(torch.ones(64, 256, dtype=dtype))
    optimizer = make_optimizer(name, [{"params": [own]}], lr=1e-3, weight_decay=0.0, device=CPU)
    own.grad = torch.ones_like(own)
    optimizer.step()
    kept = [one for one in optimizer.state[own].values() if isinstance(one, Tensor) and one.numel() > 1]
    found = sum(one.numel() * one.element_size() for one in kept)
    assert found == own.numel() * state_bytes(name, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_of_an_offloaded_state_are_as_told(dtype: torch.dtype) -> None:
    own = nn.Parameter(torch.ones(64, 256, dtype=dtype))
    optimizer = OffloadedAdamW([own])
    own.grad = torch.ones_like(own)
    optimizer.step()
    kept = [one for one in optimizer.state[own].values() if isinstance(one, Tensor)]
    assert sum(one.numel() * 4 for one in kept) == own.numel() * state_bytes("adamw_offload", dtype)


def test_state_of_other_parameters_or_of_another_optimizer_is_refused() -> None:
    own = weights()
    optimizer = make(RoundingAdamW, own)
    run(optimizer, own, range(1))
    state = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="of other parameters"):
        RoundingAdamW(weights()).load_state_dict(state)
    state["state"][0]["codes1"] = torch.zeros(1)
    with pytest.raises(ValueError, match="of another optimizer"):
        make(RoundingAdamW, weights()).load_state_dict(state)


def test_offloading_needs_a_gpu() -> None:
    with pytest.raises(ConfigError, match="moves state to the CPU, where this model is already"):
        make_optimizer("adamw_offload", [{"params": weights()}], lr=1e-3, weight_decay=0.0, device=CPU)


def test_without_bitsandbytes_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r'adamw_8bit needs the extra "quantize": pip install "vlmenv\[quantize\]"'):
        AdamW8bit(weights())
