"""Against log-softmax of all logits at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vlmenv.agents import linear_logprobs as module
from vlmenv.agents.linear_logprobs import linear_logprobs

BANNED = torch.tensor([0, 7])


def inputs(dtype: torch.dtype, bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator, dtype=dtype) for n in (13, 50))
    return hidden, weight, torch.randn(50, generator=generator, dtype=dtype) if bias else None


@pytest.fixture(params=[1, 100, 2**24], ids=["a row at a time", "two rows", "all at once"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FEW_LOGITS", request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_full_logits(bias: bool, cap: float | None) -> None:
    hidden, weight, offset = inputs(torch.float64, bias)
    targets, push = torch.arange(1, 14) % 6 + 1, torch.linspace(-1, 1, 13, dtype=torch.float64)
    leaves = [one.requires_grad_() for one in (hidden, weight, offset) if one is not None]
    logits = torch.nn.functional.linear(hidden, weight, offset)
    logits = (logits if cap is None else cap * torch.tanh(logits / cap)) / 0.7
    kept = [i for i in range(50) if i not in BANNED]
    expected = torch.log_softmax(logits.index_fill(-1, BANNED, -torch.inf), -1).gather(-1, targets[:, None])[:, 0]
    spread = torch.distributions.Categorical(logits=logits[:, kept]).entropy()
    found, entropy = linear_logprobs(hidden, weight, offset, targets, BANNED, 0.7, cap)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy, spread)
    for other, one in ((0.0, 1.0), (1.0, 0.0), (0.3, 1.0)):
        wanted = torch.autograd.grad((push * (one * expected + other * spread)).sum(), leaves, retain_graph=True)
        loss = (push * found).sum() if not other else (push * (one * found + other * entropy)).sum()
        gradients = torch.autograd.grad(loss, leaves, retain_graph=True)
        torch.testing.assert_close(gradients, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("cap", [None, 0.5])
def test_autograd_agrees_with_differences(cap: float | None) -> None:
    hidden, weight, offset = (None if one is None else one[:5].requires_grad_() for one in inputs(torch.float64, True))
    targets = torch.tensor([1, 2, 3, 4, 2])
    banned = torch.tensor([0])
    assert torch.autograd.gradcheck(
        lambda *given: linear_logprobs(*given, targets, banned, 1.3, cap), (hidden, weight, offset)
    )


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, _ = inputs(torch.float32, False)
    linear_logprobs(hidden.requires_grad_(), weight, None, torch.ones(13).long(), BANNED, 1.0)[0].sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.any()
    assert weight.grad is None


def test_under_autocast_it_computes_in_low_precision_and_answers_in_float32() -> None:
    hidden, weight, _ = inputs(torch.float32, False)
    targets = torch.ones(13).long()
    exact, _ = linear_logprobs(hidden, weight, None, targets, BANNED, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough, _ = linear_logprobs(hidden, weight.requires_grad_(), None, targets, BANNED, 1.0)
    rough.sum().backward()
    assert rough.dtype == weight.grad.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.2


def test_memory_does_not_grow_with_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of tokens times vocabulary is made in either pass."""
    monkeypatch.setattr(module, "_FEW_LOGITS", 1000)
    hidden, weight = torch.randn(64, 8, requires_grad=True), torch.randn(500, 8, requires_grad=True)

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            for one in result if isinstance(result, tuple) else [result]:
                if isinstance(one, torch.Tensor):
                    Sizes.largest = max(Sizes.largest, one.numel())
            return result

    with Sizes():
        linear_logprobs(hidden, weight, None, torch.ones(64).long(), BANNED, 1.0)[0].sum().backward()
    assert Sizes.largest == weight.numel()
