"""Vision towers that attend to all segments at once, against transformers' call for each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_operators import cuda_operators
from small_models import invent
from torch import Tensor, nn

from vlmenv.agents import vision_attention
from vlmenv.agents.kernels import FlashKernel
from vlmenv.agents.vlm import VLMAgent

GRIDS = {
    "one size": [[1, 4, 4]] * 3,
    "several sizes": [[1, 4, 4], [1, 4, 4], [1, 6, 10], [1, 4, 4]],
    "windows at the edges": [[1, 10, 14], [1, 6, 6]],
}


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"])
def tower(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    folder = tmp_path_factory.mktemp(request.param)
    invent(request.param, folder)
    return VLMAgent.from_pretrained(folder).family.vision_tower()


def plain(tower: nn.Module) -> nn.Module:
    """A copy that attends as transformers does without flash attention."""
    other = copy.deepcopy(tower)
    for module in other.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "sdpa"
    return other


def results(tower: Any, grid: list[list[int]]) -> list[Tensor]:
    """Features, and the gradients of all weights."""
    grids = torch.tensor(grid)
    channels = 3 * tower.config.temporal_patch_size * tower.config.patch_size**2
    patches = torch.randn(int(grids.prod(1).sum()), channels, generator=torch.Generator().manual_seed(0))
    features = tower(patches, grid_thw=grids).pooler_output
    push = torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    weights = [weight for weight in tower.parameters() if weight.requires_grad]
    grads = torch.autograd.grad((features * push).sum(), weights, allow_unused=True)
    return [features, *(grad for grad in grads if grad is not None)]


@pytest.mark.parametrize("case", GRIDS)
def test_the_same_to_the_last_bit(tower: nn.Module, case: str) -> None:
    found, right = results(tower, GRIDS[case]), results(plain(tower), GRIDS[case])
    assert len(found) == len(right) > 10
    assert all(torch.equal(one, other) for one, other in zip(found, right, strict=True))


@pytest.mark.parametrize("case", GRIDS)
def test_by_flash_attention(tower: nn.Module, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As PyTorch's operator for CUDA is called, and with what it computes."""
    right = results(plain(tower), GRIDS[case])
    monkeypatch.setattr(vision_attention, "kernel_for", lambda query: FlashKernel())
    with cuda_operators() as calls:
        found = results(tower, GRIDS[case])
    assert calls == {"_flash_attention_forward": len(tower.blocks), "_flash_attention_backward": len(tower.blocks)}
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("grid", "kinds"), [([[1, 4, 4]] * 5, 1), ([[1, 4, 4], [1, 4, 8], [1, 4, 4], [1, 4, 8], [1, 4, 4]], 2)]
)
def test_one_call_for_all_of_one_size(
    tower: nn.Module, grid: list[list[int]], kinds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of 4 x 4 patches are of one size in every image."""
    calls = []
    attention: Callable[..., Tensor] = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        nn.functional,
        "scaled_dot_product_attention",
        lambda *states, **rest: calls.append(1) or attention(*states, **rest),
    )
    results(tower, grid)
    windowed = len(tower.blocks) - len(getattr(tower, "fullatt_block_indexes", tower.blocks))
    assert len(calls) == kinds * (len(tower.blocks) - windowed) + windowed


def test_all_of_a_tower_is_told(tower: nn.Module) -> None:
    """Where segments lie is found once per pass, and not in each block: on a GPU that would wait for it."""
    configs = [module.config for module in tower.modules() if hasattr(module, "config")]
    assert len(configs) > len(tower.blocks)
    assert all(config is tower.config for config in configs)


def test_dropout_is_refused() -> None:
    with pytest.raises(AssertionError, match="dropout"):
        vision_attention._attend(
            nn.Identity(), *torch.zeros(3, 1, 1, 1, 8), None, scaling=1, cu_seq_lens_q=None, max_length_q=1, dropout=0.1
        )


def test_the_models_own_configuration_stays(tmp_path: Path) -> None:
    """Else transformers would look for a package of flash attention in models made from it."""
    invent("qwen2_5_vl", tmp_path)
    model = VLMAgent.from_pretrained(tmp_path).family.model
    assert type(model)._from_config(copy.deepcopy(model.config)).config.vision_config._attn_implementation == "sdpa"
