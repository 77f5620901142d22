from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from saved import recording_saved
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP, Gemma3RMSNorm
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
from transformers.models.glm4v.configuration_glm4v import Glm4vTextConfig
from transformers.models.glm4v.modeling_glm4v import Glm4vTextMLP, Glm4vVisionPatchMerger
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig
from transformers.models.internvl.modeling_internvl import InternVLVisionMLP
from transformers.models.pixtral.configuration_pixtral import PixtralVisionConfig
from transformers.models.pixtral.modeling_pixtral import PixtralMLP
from transformers.models.qwen2_vl.modeling_qwen2_vl import VisionMlp
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm, Qwen3_5RMSNormGated
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextMLP, Qwen3VLTextRMSNorm, Qwen3VLVisionMLP
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionMLP

from vlmenv.agents import lean_layers
from vlmenv.agents import saved_activations as machinery
from vlmenv.agents.lean_layers import (
    CentredRMSNorm,
    FusedGatedMLP,
    GatedMLP,
    GatedRMSNorm,
    GeluGatedMLP,
    PlainMLP,
    PowerRMSNorm,
    RMSNorm,
    TanhGeluGatedMLP,
    make_lean,
)
from vlmenv.agents.saved_activations import dropping_recomputable, keeping_activations
from vlmenv.agents.vlm import VLMAgent

GATED = {"glm4v": FusedGatedMLP, "gemma3": TanhGeluGatedMLP, "pixtral": GeluGatedMLP}
PRECISIONS = ("float32", "bfloat16", "autocast", "autocast of bfloat16")


def mlps(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "gate_proj")]


@pytest.fixture
def mlp(builtin: VLMAgent) -> tuple[nn.Module, nn.Module]:
    """An MLP of the built-in model, and the same as transformers has it."""
    lean = copy.deepcopy(mlps(builtin.family.model)[0])
    plain = copy.deepcopy(lean)
    assert type(lean) is GatedMLP
    plain.__class__ = Qwen3VLTextMLP
    return lean, plain


def norm(size: int) -> tuple[nn.Module, nn.Module]:
    """A norm of which each part of the input has its own weight, and the same as transformers has it."""
    plain = Qwen3VLTextRMSNorm(size)
    nn.init.normal_(plain.weight, generator=torch.Generator().manual_seed(2))
    lean = copy.deepcopy(plain)
    make_lean(lean)
    assert type(lean) is RMSNorm
    return lean, plain


class Block(nn.Module):
    """What blocks of language models are made of: norms of a stream whose sum goes on, and projections of these."""

    def __init__(self, norm: nn.Module, mlp: nn.Module | None = None) -> None:
        super().__init__()
        size = norm.weight.shape[0]
        self.norm, self.mlp = norm, mlp or nn.Identity()
        torch.manual_seed(3)
        self.projections = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(3))

    def forward(self, stream: Tensor) -> Tensor:
        hidden = self.norm(stream)
        for projection in self.projections:
            stream = stream + projection(hidden).tanh()
        return stream + self.mlp(hidden)


def passes(module: nn.Module, hidden: Tensor) -> list[Tensor]:
    """Output and all gradients."""
    hidden = hidden.clone().requires_grad_()
    with dropping_recomputable():
        out = module(hidden * 1)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out, *torch.autograd.grad(out, [hidden, *module.parameters()], grad)]


def assert_equal(pair: Sequence[nn.Module], hidden: Tensor, precision: str = "float32") -> None:
    """Asserts that two modules give the same, to the last digit."""
    if precision == "autocast of bfloat16":  # as the norms of queries and keys see it
        hidden = hidden.bfloat16()
    if precision == "bfloat16":
        pair, hidden = [module.bfloat16() for module in pair], hidden.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision.startswith("autocast")):
        found, expected = (passes(module, hidden) for module in pair)
        with torch.no_grad():
            assert torch.equal(pair[0](hidden), expected[0])
    assert len(found) > 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_mlp_is_that_of_transformers_to_the_last_digit(mlp: tuple[nn.Module, nn.Module], precision: str) -> None:
    hidden = torch.randn(2, 7, mlp[0].hidden_size, generator=torch.Generator().manual_seed(0))
    assert_equal(mlp, hidden, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [(1, 600, 64), (300, 4, 32), (1, 48)])
def test_a_norm_is_that_of_transformers_to_the_last_digit(precision: str, shape: tuple[int, ...]) -> None:
    hidden = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert_equal(norm(shape[-1]), hidden, precision)
    assert_equal([Block(one) for one in norm(shape[-1])], hidden, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", [Qwen3_5RMSNorm, Gemma3RMSNorm])
def test_a_centred_norm_is_that_of_transformers_to_the_last_digit(kind: type[nn.Module], precision: str) -> None:
    plain = kind(64)
    nn.init.normal_(plain.weight, generator=torch.Generator().manual_seed(1))
    lean = copy.deepcopy(plain)
    assert make_lean(lean).on == 1
    assert type(lean) is CentredRMSNorm
    hidden = 3 * torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    assert_equal([lean, plain], hidden, precision)
    assert_equal([Block(copy.deepcopy(one)) for one in (lean, plain)], hidden, precision)
    assert kept_for(plain.float(), hidden.requires_grad_()) - kept_for(lean.float(), hidden) >= 7 * 64


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("with_scale", [True, False])
def test_a_norm_by_a_power_is_that_of_transformers_to_the_last_digit(with_scale: bool, precision: str) -> None:
    plain = Gemma4RMSNorm(64, with_scale=with_scale)
    for weight in plain.parameters():
        nn.init.normal_(weight, generator=torch.Generator().manual_seed(1))
    lean = copy.deepcopy(plain)
    assert make_lean(lean).on == 1
    assert type(lean) is PowerRMSNorm
    hidden = 3 * torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    after = [nn.Sequential(copy.deepcopy(one), nn.Linear(64, 8)) for one in (lean, plain)]
    after[1][1].load_state_dict(after[0][1].state_dict())
    assert_equal(after, hidden, precision)
    assert kept_for(plain.float(), hidden.requires_grad_()) - kept_for(lean.float(), hidden) >= 7 * (
        64 if with_scale else 1
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_gated_norm_is_that_of_transformers_to_the_last_digit(precision: str) -> None:
    class Both(nn.Module):
        """Gets its gate from the same input."""

        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.inner = norm

        def forward(self, hidden: Tensor) -> Tensor:
            return self.inner(hidden, hidden.flip(0))

    plain = Qwen3_5RMSNormGated(64)
    nn.init.normal_(plain.weight, generator=torch.Generator().manual_seed(1))
    lean = copy.deepcopy(plain)
    assert make_lean(lean).on == 1
    assert type(lean) is GatedRMSNorm
    hidden = 3 * torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    assert_equal([Both(one) for one in (lean, plain)], hidden, precision)


def test_a_norm_with_frozen_weights_or_input() -> None:
    hidden = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    for wanted in ("hidden", "weight"):
        found = []
        for module in norm(16):
            stream = hidden.clone().requires_grad_(wanted == "hidden")
            module.weight.requires_grad_(wanted == "weight")
            module(stream).square().sum().backward()
            assert (stream.grad is None) == (wanted == "weight")
            assert (module.weight.grad is None) == (wanted == "hidden")
            found.append(stream.grad if wanted == "hidden" else module.weight.grad)
        assert torch.equal(*found)


def kept_for(module: nn.Module, hidden: Tensor) -> int:
    """Numbers that the backward pass keeps beside weights and input; a tensor that is kept twice counts once."""
    kept: dict[int, int] = {}
    others = {hidden.data_ptr(), *(parameter.data_ptr() for parameter in module.parameters())}

    def note(tensor: Tensor) -> None:
        if tensor.data_ptr() not in others:
            kept[tensor.data_ptr()] = tensor.numel()

    with recording_saved(note), dropping_recomputable():
        out = module(hidden)
    del out
    return sum(kept.values())


def test_an_mlp_keeps_two_tensors_of_its_inner_width_and_not_four(
    mlp: tuple[nn.Module, nn.Module],
) -> None:
    lean, plain = mlp
    hidden = torch.randn(3, 5, lean.hidden_size, requires_grad=True)
    inner = 15 * lean.intermediate_size
    assert kept_for(plain, hidden) == 4 * inner
    assert kept_for(lean, hidden) == 2 * inner
    with keeping_activations():
        assert kept_for(lean, hidden) == 3 * inner
    with torch.no_grad():
        assert kept_for(lean, hidden) == 0


def test_a_norm_keeps_its_input_and_a_number_for_a_token() -> None:
    hidden = torch.randn(5, 16, requires_grad=True)
    lean, plain = (Block(one) for one in norm(16))
    tanh = 3 * hidden.numel()
    assert kept_for(plain, hidden) == tanh + 2 * hidden.numel() + 5
    assert kept_for(lean, hidden) == tanh + 5


def counting(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """An entry for each call of a function of the module."""
    calls: list[int] = []
    called = getattr(lean_layers, name)

    def counted(*arguments: Tensor) -> Tensor:
        calls.append(1)
        return called(*arguments)  # type: ignore[no-any-return]

    monkeypatch.setattr(lean_layers, name, counted)
    return calls


def test_what_several_need_is_computed_anew_once_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counting(monkeypatch, "_scaled")
    made: list[machinery._Made] = []
    take = machinery._Made.take

    def noting(self: machinery._Made) -> Tensor:
        made.append(self)
        return take(self)

    monkeypatch.setattr(machinery._Made, "take", noting)
    block, hidden = Block(norm(16)[0]), torch.randn(5, 16, requires_grad=True)
    with dropping_recomputable():
        out = block(hidden)
    for _ in range(2):  # two backward passes of one forward pass
        calls.clear()
        made.clear()
        gradient = torch.autograd.grad(out.sum(), hidden, retain_graph=True)[0]
        assert len(made) == 3  # projections
        assert len(calls) == 2  # for them, and for the gradient of the norm's weight, which is not asked for apart
        assert made[0]._held is None
    assert torch.equal(gradient, torch.autograd.grad(out.sum(), hidden)[0])


def test_blocks_that_are_recomputed_keep_what_they_need(
    mlp: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counting(monkeypatch, "_activated")
    hidden = torch.randn(3, mlp[0].hidden_size, requires_grad=True)
    run: Callable[[Tensor], Tensor]
    # The backward pass uses the activation that was computed anew; a block that is recomputed keeps its product.
    for run, expected in ((mlp[0], 2), (lambda given: checkpoint(mlp[0], given, use_reentrant=False), 3)):
        calls.clear()
        with dropping_recomputable():
            out = run(hidden)
        out.sum().backward()
        assert len(calls) == expected


def test_nothing_is_remembered_of_tensors_that_are_gone() -> None:
    before = len(machinery._made)
    block = Block(norm(16)[0])
    for _ in range(3):
        with dropping_recomputable():
            block(torch.randn(5, 16, requires_grad=True)).sum().backward()
    assert len(machinery._made) == before


class Then(nn.Module):
    """A norm, and what is done with what it gives."""

    def __init__(self, norm: nn.Module, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.then = norm, then

    def forward(self, hidden: Tensor) -> Tensor:
        return self.then(self.norm(hidden))


def with_rows(normed: Tensor) -> Tensor:
    """Its first rows begin where all of it does."""
    return normed[:2].exp() * normed[:2] + (normed.T @ normed).sum() + normed.T.square().sum()


def changed_in_place(normed: Tensor) -> Tensor:
    return normed.add_(1).square()


@pytest.mark.parametrize("then", [with_rows, changed_in_place])
def test_what_is_not_all_of_it_or_not_as_it_was_is_kept_as_it_is(then: Callable[[Tensor], Tensor]) -> None:
    pair = [Then(one, then) for one in norm(16)]
    assert_equal(pair, torch.randn(5, 16, generator=torch.Generator().manual_seed(0)))


def test_layers_around_a_projection_work(mlp: tuple[nn.Module, nn.Module]) -> None:
    """As adapters are: more than one thing may keep the product."""

    class Twice(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner, self.more = inner, nn.Linear(inner.in_features, inner.out_features, bias=False)

        def forward(self, hidden: Tensor) -> Tensor:
            return self.inner(hidden) + self.more(hidden.square())

    torch.manual_seed(0)
    mlp[0].down_proj = Twice(mlp[0].down_proj)
    mlp[1].down_proj = copy.deepcopy(mlp[0].down_proj)
    assert_equal(mlp, torch.randn(4, mlp[0].hidden_size))


def plain_mlp(kind: str) -> tuple[nn.Module, nn.Module]:
    """An MLP of a family, lean and as it is."""
    torch.manual_seed(0)
    made: dict[str, Callable[[], nn.Module]] = {
        "qwen2_vl": lambda: VisionMlp(16, 24, "quick_gelu"),
        "qwen3_vl": lambda: Qwen3VLVisionMLP(Qwen3VLVisionConfig(hidden_size=16, intermediate_size=24)),
        "internvl": lambda: InternVLVisionMLP(InternVLVisionConfig(hidden_size=16, intermediate_size=24)),
        "smolvlm": lambda: SmolVLMVisionMLP(SmolVLMVisionConfig(hidden_size=16, intermediate_size=24)),
        "glm4v": lambda: Glm4vTextMLP(Glm4vTextConfig(hidden_size=16, intermediate_size=24)),
        "gemma3": lambda: Gemma3MLP(Gemma3TextConfig(hidden_size=16, intermediate_size=24)),
        "pixtral": lambda: PixtralMLP(PixtralVisionConfig(hidden_size=16, intermediate_size=24)),
    }
    plain = made[kind]()
    lean = copy.deepcopy(plain)
    make_lean(lean)
    return lean, plain


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl", "internvl", "smolvlm", *GATED])
def test_other_mlps_are_theirs_to_the_last_digit(kind: str, precision: str) -> None:
    pair = plain_mlp(kind)
    assert type(pair[0]) is GATED.get(kind, PlainMLP)
    assert_equal(pair, torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0)), precision)


@pytest.mark.parametrize(("kind", "saved"), [("qwen3_vl", 1), ("internvl", 1), *((kind, 2) for kind in GATED)])
def test_other_mlps_keep_fewer(kind: str, saved: int) -> None:
    """The activation's output, or both products of the gates."""
    hidden = torch.randn(15, 16, requires_grad=True)
    lean, plain = (kept_for(one, hidden) for one in plain_mlp(kind))
    assert plain - lean == saved * 15 * 24


class TestMatching:
    """By the parts of a module and a trial, whatever its source."""

    @pytest.fixture(autouse=True)
    def untold(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lean_layers, "_told", set())

    def test_other_words_for_the_same_are_matched(self) -> None:
        class ReworkedRMSNorm(Qwen3VLTextRMSNorm):
            def forward(self, given: Tensor) -> Tensor:
                wide = given.float()  # in other words
                scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
                return self.weight * (wide * scale).to(given.dtype)

        norm = ReworkedRMSNorm(8)
        found = make_lean(norm)
        assert (found.on, found.of, found.faults) == (1, 1, {})
        assert type(norm) is RMSNorm

    @pytest.mark.parametrize("change", ["shifted", "epsilon", "cast", "fails"])
    def test_another_formula_is_told_once(self, change: str, caplog: pytest.LogCaptureFixture) -> None:
        """Also one that only tiny inputs show, or only half precision."""

        class OtherRMSNorm(Qwen3VLTextRMSNorm):
            def forward(self, hidden: Tensor) -> Tensor:
                if change == "fails":
                    raise NotImplementedError
                wide = hidden.float()
                scale = torch.rsqrt(
                    wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon * (1 + (change == "epsilon"))
                )
                if change == "cast":
                    return (self.weight.float() * (wide * scale)).to(hidden.dtype)
                return (self.weight + (change == "shifted")) * (wide * scale).to(hidden.dtype)

        norms = nn.ModuleList([OtherRMSNorm(8), OtherRMSNorm(8), Qwen3VLTextRMSNorm(8)])
        found = make_lean(norms)
        assert (found.on, found.of, list(found.faults)) == (1, 3, ["OtherRMSNorm"])
        assert type(norms[0]) is OtherRMSNorm
        assert len(caplog.records) == 1
        assert "OtherRMSNorm keeps all its activations" in caplog.text
        make_lean(norms)
        assert len(caplog.records) == 1

    def test_another_activation_or_other_parts_are_told(self, mlp: tuple[nn.Module, nn.Module]) -> None:
        _, plain = mlp
        plain.act_fn = nn.Tanh()
        assert "does not compute the same" in make_lean(plain).faults["Qwen3VLTextMLP"]
        plain.more = nn.Linear(2, 2)
        assert "other parts" in make_lean(plain).faults["Qwen3VLTextMLP"]
        assert type(plain) is Qwen3VLTextMLP

    def test_what_is_no_mlp_is_not_counted(self) -> None:
        """GLM-4.1V's merger ends as an MLP does and has more before that."""
        found = make_lean(nn.ModuleList([Glm4vVisionPatchMerger(8, 16, "silu"), nn.LayerNorm(8), nn.Linear(8, 8)]))
        assert (found.on, found.of, found.faults) == (0, 0, {})

    def test_a_model_as_it_is_upstream_with_a_changed_class(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The report of an agent says so."""
        monkeypatch.setattr(Qwen3VLTextMLP, "forward", lambda self, x: self.down_proj(self.up_proj(x)))
        agent = VLMAgent.from_pretrained("builtin")
        layers = agent.family_policy.lean_layers
        assert layers.of - layers.on == len(agent.family.language_model().layers)
        assert "Qwen3VLTextMLP" in layers.faults
        assert "Qwen3VLTextMLP keeps all" in caplog.text
