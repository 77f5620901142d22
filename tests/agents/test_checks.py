"""What an engine has to have in common with the trainer's model."""

from __future__ import annotations

import pytest
import torch

from vlmenv.agents.engines.checks import fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fingerprints_are_the_same_however_they_are_summed_up(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And tell a tensor from one whose numbers have changed places, also between parts."""
    weight = torch.arange(10.0).to(dtype)
    swapped = weight[[7, 1, 2, 3, 4, 5, 6, 0, 8, 9]]
    whole = fingerprint([weight])
    monkeypatch.setattr("vlmenv.agents.engines.checks._CHUNK", 4)
    in_parts = fingerprint([weight, swapped])
    assert (in_parts[0] - whole[0]) % 2**64 == 0
    assert in_parts[0] != in_parts[1]
