from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation
from transformers.models.glm4v.modeling_glm4v import Glm4vVisionPatchMerger
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextMLP

from vlmenv.agents import lean as lean_module
from vlmenv.agents.lean import GatedMLP, make_lean
from vlmenv.agents.vlm import VLMAgent


def mlps(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "gate_proj")]


def kept_for(mlp: nn.Module, hidden: Tensor) -> int:
    """Numbers that the backward pass keeps, weights and input among them; a tensor that is kept twice counts once."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mlp(hidden)
    return sum(kept.values())


def passes(mlp: nn.Module, hidden: Tensor) -> list[Tensor]:
    """Output and all gradients."""
    hidden = hidden.clone().requires_grad_()
    out = mlp(hidden)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out, *torch.autograd.grad(out, [hidden, *mlp.parameters()], grad)]


@pytest.fixture
def pair(builtin: VLMAgent) -> tuple[nn.Module, nn.Module]:
    """An MLP of the built-in model, and the same as transformers has it."""
    lean = copy.deepcopy(mlps(builtin.family.model)[0])
    plain = copy.deepcopy(lean)
    assert type(lean) is GatedMLP
    plain.__class__ = Qwen3VLTextMLP
    return lean, plain


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_values_and_gradients_are_those_of_transformers_to_the_last_digit(
    pair: tuple[nn.Module, nn.Module], precision: str
) -> None:
    hidden = torch.randn(2, 7, pair[0].hidden_size, generator=torch.Generator().manual_seed(0))
    if precision == "bfloat16":
        pair, hidden = (pair[0].bfloat16(), pair[1].bfloat16()), hidden.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        found, expected = (passes(mlp, hidden) for mlp in pair)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_two_tensors_of_the_inner_width_are_kept_and_not_four(pair: tuple[nn.Module, nn.Module]) -> None:
    lean, plain = pair
    hidden = torch.randn(3, 5, lean.hidden_size, requires_grad=True)
    inner = 15 * lean.intermediate_size
    weights = sum(parameter.numel() for parameter in lean.parameters())
    assert kept_for(plain, hidden) == 4 * inner + weights + hidden.numel()
    with torch.no_grad():
        assert kept_for(lean, hidden) == 0
    seen: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        seen.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        lean(hidden)
    assert seen.count(inner) == 2  # and what its own hooks keep inside is seen below


def test_the_product_is_computed_anew_in_the_backward_pass(
    pair: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, and where the block around it is computed anew, not at all: it is kept there."""
    calls: list[int] = []

    def counted(gate: Tensor, up: Tensor) -> Tensor:
        calls.append(1)
        return nn.functional.silu(gate) * up

    monkeypatch.setattr(lean_module, "_gated", counted)
    mlp, _ = pair
    for mlp.recomputed, expected in ((False, 2), (True, 1)):
        calls.clear()
        mlp(torch.randn(3, mlp.hidden_size)).sum().backward()
        assert len(calls) == expected


def test_layers_around_a_projection_work(pair: tuple[nn.Module, nn.Module]) -> None:
    """As adapters are: more than one thing may keep the product."""

    class Twice(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner, self.more = inner, nn.Linear(inner.in_features, inner.out_features, bias=False)

        def forward(self, hidden: Tensor) -> Tensor:
            return self.inner(hidden) + self.more(hidden.square())

    torch.manual_seed(0)
    pair[0].down_proj = Twice(pair[0].down_proj)
    pair[1].down_proj = copy.deepcopy(pair[0].down_proj)
    hidden = torch.randn(4, pair[0].hidden_size)
    found, expected = (passes(mlp, hidden) for mlp in pair)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_is_not_known_stays_as_it_is(pair: tuple[nn.Module, nn.Module]) -> None:
    """Another activation; and GLM-4.1V's merger, which ends as an MLP does and has more before that."""
    _, plain = pair
    plain.act_fn = GELUActivation()
    merger = Glm4vVisionPatchMerger(8, 16, "silu")
    for module in (plain, merger):
        kind = type(module)
        make_lean(module)
        assert type(module) is kind


def test_where_blocks_are_recomputed_nothing_more_is_spared(builtin: VLMAgent) -> None:
    builtin.enable_gradient_checkpointing()
    found = mlps(builtin.family.language_model())
    assert found
    assert all(mlp.recomputed for mlp in found)
