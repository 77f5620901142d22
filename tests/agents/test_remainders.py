from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmenv.agents.remainders import REMAINDERS, exact_weights, remainder


def numbers() -> torch.Tensor:
    """Random bit patterns, halfway cases of bfloat16 in both directions, zeros of both signs, subnormals."""
    drawn = torch.randint(-(2**31), 2**31, (5000,), generator=torch.Generator().manual_seed(0)).int()
    halfway = ((drawn >> 16) << 16) + (1 << 15)
    edges = [struct.unpack("<i", struct.pack("<f", one))[0] for one in (0.0, -0.0, 1e-45, -1e-40, 1.0, 3.3e38)]
    bits = torch.cat([drawn, halfway, torch.tensor(edges, dtype=torch.int32)])
    values = bits.view(torch.float32)
    return values[values.isfinite()].reshape(1, -1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_files_together_hold_float32_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    whole = numbers()
    whole = whole[:, whole[0].to(dtype).isfinite()]
    stored = whole.to(dtype)
    rest = remainder("w", whole, stored)
    (tmp_path / REMAINDERS).mkdir()
    save_file({"w": stored}, tmp_path / "model.safetensors")
    save_file(rest, tmp_path / REMAINDERS / "model.safetensors")
    assert torch.equal(exact_weights(tmp_path)["w"].view(torch.int32), whole.view(torch.int32))
    assert load_file(tmp_path / "model.safetensors")["w"].dtype == dtype


def test_bfloat16_takes_16_bits_more_and_no_others() -> None:
    whole = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    rest = remainder("w", whole, whole.bfloat16())
    assert rest["w"].dtype == torch.int16
    assert sum(one.numel() for name, one in rest.items() if name != "w") <= 2


def test_nothing_is_written_where_nothing_is_lost() -> None:
    exact = torch.arange(8.0)
    assert remainder("w", exact, exact.bfloat16()) == {}
    assert remainder("w", exact, exact) == {}
    assert remainder("w", exact.bfloat16(), exact.bfloat16().float()) == {}


def test_remainders_of_other_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / REMAINDERS).mkdir()
    save_file({"w": torch.zeros(3).bfloat16()}, tmp_path / "model.safetensors")
    save_file({"w": torch.zeros(4, dtype=torch.int16)}, tmp_path / REMAINDERS / "model.safetensors")
    with pytest.raises(RuntimeError, match="does not belong to the weights beside it"):
        exact_weights(tmp_path)
