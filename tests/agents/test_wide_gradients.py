"""Linear layers with float32 gradients at once: what they compute on GPUs, tried on CPUs, and where they fall back."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmenv.agents import wide_gradients
from vlmenv.agents.fusing import Fused, numbers
from vlmenv.agents.wide_gradients import WideLinear, both, widen_gradients

BF16 = torch.bfloat16


def summed(left: Tensor, right: Tensor) -> Tensor:
    """What a GPU's product with float32 results is."""
    return left.float() @ right.float()


@pytest.fixture
def as_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fused, "__call__", lambda self, *arguments: self.function(*arguments))
    monkeypatch.setattr(wide_gradients, "sums_wide", lambda device, dtype: True)
    monkeypatch.setattr(wide_gradients, "_wide_product", summed)


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def layers(request: pytest.FixtureRequest) -> nn.ModuleList:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.ModuleList([nn.Linear(16, size, bias=request.param) for size in (24, 40)])


def passes(layers: nn.ModuleList, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Outputs and gradients of two layers of the same input, under autocast to bfloat16 if it is float32."""
    hidden = numbers(2, 300, 16, seed=2).to(dtype).requires_grad_()
    with torch.autocast("cpu", BF16, enabled=dtype == torch.float32):
        outputs = both(hidden, *layers)
    push = [numbers(*one.shape, seed=seed) for seed, one in enumerate(outputs)]
    parameters = [hidden, *layers.parameters()]
    grads = torch.autograd.grad(
        outputs, parameters, [one.to(out.dtype) for one, out in zip(push, outputs, strict=True)]
    )
    return [*outputs, *grads]


def errors(layers: nn.ModuleList) -> tuple[list[Tensor], list[float]]:
    """Results, and how far each is from float64, relative to its size."""
    true = passes(copy.deepcopy(layers).double(), torch.float64)
    true, found = ([one.detach() for one in results] for results in (true, passes(layers)))
    return found, [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, true, strict=True)]


def test_gradients_of_weights_are_not_rounded_to_half_precision(as_on_gpus: None, layers: nn.ModuleList) -> None:
    """They are nearer to float64 than autograd's; outputs are the same, and the input's gradient is as near."""
    plain, plain_errors = errors(layers)
    widen_gradients(layers)
    wide, wide_errors = errors(layers)
    assert [one.dtype for one in wide] == [one.dtype for one in plain]
    assert torch.equal(wide[0], plain[0])
    assert torch.equal(wide[1], plain[1])
    assert wide_errors[2] < 1.2 * plain_errors[2]
    for own, before in zip(wide_errors[3:], plain_errors[3:], strict=True):
        assert own < before < 0.02


def test_one_product_computes_both(as_on_gpus: None, layers: nn.ModuleList, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    linear: Callable[..., Tensor] = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *args: calls.append(len(args[1])) or linear(*args))
    widen_gradients(layers)
    passes(layers)
    assert calls == [64]
    layers[0].weight.ds_numel = 24 * 16  # of ZeRO of stage 3, which gathers the weights of a layer that is called
    passes(layers)
    assert calls == [64, 24, 40]


def test_a_recomputed_block_does_not_compute_its_last_product_again(
    as_on_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    linear: Callable[..., Tensor] = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *args: calls.append(len(args[1])) or linear(*args))
    block = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8))
    widen_gradients(block)
    with torch.autocast("cpu", BF16):
        out = checkpoint(block, numbers(5, 16).requires_grad_(), use_reentrant=False)
    assert calls == [24, 8]
    out.sum().backward()
    assert calls == [24, 8, 24]


@pytest.mark.parametrize("case", ["frozen", "narrow", "no autocast", "no gradient", "another class"])
def test_other_layers_compute_as_ever(
    case: str, as_on_gpus: None, layers: nn.ModuleList, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wide_gradients, "_products", lambda *_: pytest.fail("this case has nothing to widen"))
    if case == "another class":
        layers[0].__class__ = type("Own", (nn.Linear,), {})
        layers[1].__class__ = type("Own", (nn.Linear,), {})
    widen_gradients(layers)
    assert all(isinstance(one, WideLinear) == (case != "another class") for one in layers)
    if case == "frozen":
        layers.requires_grad_(False)
    if case == "narrow":
        layers.to(BF16)
    with torch.autocast("cpu", BF16, enabled=case != "no autocast"), torch.set_grad_enabled(case != "no gradient"):
        both(numbers(5, 16).to(layers[0].weight.dtype if case == "narrow" else torch.float32), *layers)


def test_cpus_compute_as_ever() -> None:
    assert not wide_gradients.sums_wide("cpu", BF16)


class TestTrial:
    def attempt(self) -> str:
        return wide_gradients.fault_of.__wrapped__("cpu", BF16)

    def test_right_sums_have_no_fault(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(wide_gradients, "_wide_product", summed)
        assert self.attempt() == ""

    def test_what_is_missing_is_told(self, caplog: pytest.LogCaptureFixture) -> None:
        """PyTorch has no such products for CPUs."""
        assert "NotImplementedError" in self.attempt()
        assert caplog.text.count("products have no float32 results") == 1

    @pytest.mark.parametrize("wrong", [lambda a, b: a @ b, lambda a, b: 1.1 * summed(a, b)])
    def test_other_results_are_a_fault(
        self, wrong: Callable[[Tensor, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(wide_gradients, "_wide_product", wrong)
        assert "not what they should be" in self.attempt()

    def test_a_full_device_is_no_fault(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(left: Tensor, right: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("full")

        monkeypatch.setattr(wide_gradients, "_wide_product", full)
        with pytest.raises(torch.OutOfMemoryError):
            self.attempt()
