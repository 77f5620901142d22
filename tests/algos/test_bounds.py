"""One token whose probability has changed by many orders of magnitude leaves the others their gradient."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import inputs
from torch import Tensor

from vlmenv.algos import ALGORITHMS, GRPO, GRPOConfig, LossInputs
from vlmenv.algos.losses import BOUND, divergence, token_ratio

FAR = 80.0
"""Nats between two log-probabilities; the square of exp(80) is no float32."""


def far_off(far: float) -> LossInputs:
    """float32 inputs whose last token is `far` nats from the old policy's, with a negative advantage."""
    given = inputs(how="token")
    for name, value in ((name, getattr(given, name)) for name in given.__dataclass_fields__):
        if isinstance(value, Tensor) and value.dtype == torch.float64:
            setattr(given, name, value.detach().float())
    given.logprobs.requires_grad_()
    given.old_logprobs[1, 0] = given.logprobs[1, 0].detach() - far
    given.masked_logprobs = given.logprobs.detach() - FAR
    given.values = torch.zeros(2, 2, requires_grad=True)
    given.old_values, given.returns = torch.zeros(2, 2), torch.ones(2, 2)
    return given


@pytest.mark.parametrize("far", [FAR, -FAR, math.inf])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_no_ratio_makes_a_gradient_infinite(name: str, far: float) -> None:
    kind, config = ALGORITHMS[name]
    algorithm = kind(config)
    near, given = far_off(math.log(1.5)), far_off(far)
    for one in (near, given):
        algorithm.loss(one).loss.backward()
    found, expected = given.logprobs.grad, near.logprobs.grad
    assert found is not None
    assert expected is not None
    assert torch.isfinite(found.norm())
    torch.testing.assert_close(found[0], expected[0])  # the other completion learns as before


def test_what_is_bounded_is_counted() -> None:
    for far, count in ((FAR, 1), (-FAR, 1), (BOUND - 1, 0)):
        sums = GRPO(GRPOConfig()).loss(far_off(far)).sums
        assert sums["policy/bounded"].item() == count
        assert torch.isfinite(sums["policy/approx_kl"])


def test_the_penalty_is_bounded_where_the_reference_is_far_above() -> None:
    """k3 grows like exp on one side alone; on the other it keeps its value and gradient."""
    logprobs = torch.tensor([[-FAR, -1.0]], requires_grad=True)
    kl = divergence(logprobs, torch.tensor([[0.0, -FAR]]), "k3")
    (slope,) = torch.autograd.grad(kl.sum(), logprobs)
    assert slope.tolist() == [[0.0, 1.0]]
    assert kl[0, 1].item() == pytest.approx(FAR - 2)
    given = far_off(0.0)
    given.ref_logprobs = given.logprobs.detach() + torch.tensor([[FAR, 0.0], [-FAR, 0.0]])
    sums = GRPO(GRPOConfig(beta=0.1)).loss(given).sums
    assert sums["policy/kl_bounded"].item() == 1
    assert torch.isfinite(sums["policy/kl"])


def test_within_the_bound_nothing_changes() -> None:
    logratio = torch.linspace(-BOUND, BOUND, 41, dtype=torch.float64)
    torch.testing.assert_close(token_ratio(logratio), logratio.exp(), rtol=0, atol=0)
