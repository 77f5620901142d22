"""Patches embedded as matrix products, against PyTorch's own convolution."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vlmenv.agents.patch_embedding import PatchProjection, embed_patches_by_matmul
from vlmenv.agents.vlm import VLMAgent, find_model


def convolution(**options: Any) -> nn.Conv3d:
    torch.manual_seed(0)
    return nn.Conv3d(3, 5, **{"kernel_size": (2, 4, 4), "stride": (2, 4, 4), "dtype": torch.float64} | options)


@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_the_convolutions(bias: bool) -> None:
    plain = convolution(bias=bias)
    fast = nn.Sequential(copy.deepcopy(plain))
    embed_patches_by_matmul(fast)
    assert isinstance(fast[0], PatchProjection)
    patches = torch.randn(7, 3, 2, 4, 4, dtype=torch.float64)
    push = torch.randn(7, 5, 1, 1, 1, dtype=torch.float64)
    found = []
    for module in (plain, fast):
        given = patches.clone().requires_grad_()
        embedded = module(given)
        (embedded * push).sum().backward()
        found.append([embedded, given.grad, *(parameter.grad for parameter in module.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


def test_it_is_a_matrix_product(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = nn.Sequential(convolution())
    embed_patches_by_matmul(fast)
    monkeypatch.setattr(nn.Conv3d, "forward", lambda *_: pytest.fail("convolved"))
    fast(torch.randn(7, 3, 2, 4, 4, dtype=torch.float64))


def test_what_is_larger_than_a_patch_is_convolved() -> None:
    plain = convolution()
    fast = nn.Sequential(copy.deepcopy(plain))
    embed_patches_by_matmul(fast)
    images = torch.randn(2, 3, 4, 12, 8, dtype=torch.float64)
    torch.testing.assert_close(fast(images), plain(images))
    assert fast(images).shape == (2, 5, 2, 3, 2)


@pytest.mark.parametrize("options", [{"padding": 1}, {"padding": "same", "stride": 1}, {"dilation": 2}])
def test_other_convolutions_stay_what_they_are(options: dict[str, Any]) -> None:
    other = nn.Sequential(convolution(**options))
    embed_patches_by_matmul(other)
    assert type(other[0]) is nn.Conv3d


def test_vision_towers_embed_so(qwen2_5_vl_folder: Path) -> None:
    for folder in (find_model("builtin"), qwen2_5_vl_folder):
        tower = VLMAgent.from_pretrained(folder).family.vision_tower()
        assert type(tower.get_submodule("patch_embed.proj")) is PatchProjection
