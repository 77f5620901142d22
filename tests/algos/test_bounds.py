"""One token whose probability has changed by many orders of magnitude leaves the others their gradient."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import inputs
from torch import Tensor

from vlmenv.algos import (
    ALGORITHMS,
    GRPO,
    PAPO,
    PPO,
    RLOO,
    Algorithm,
    GRPOConfig,
    LossInputs,
    PAPOConfig,
    PPOConfig,
    RLOOConfig,
)
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


def test_bounded_ratios_of_completions_are_counted() -> None:
    """A completion of thirty tokens, each one nat off, has a ratio of exp(30), which is bounded; its mean is not."""
    mask = torch.ones(2, 30, dtype=torch.bool)
    for size, sums, means in ((1.0, 60, 0), (0.5, 0, 0), (21.0, 60, 60)):
        for sign in (1, -1):
            old, advantages = torch.full((2, 30), -sign * size), torch.full((2, 1), float(sign))
            given = LossInputs(torch.zeros(2, 30, requires_grad=True), old, advantages, mask, mask / 60)
            ways: list[tuple[Algorithm, int]] = [
                (RLOO(RLOOConfig()), sums),
                (GRPO(GRPOConfig(ratio="sequence")), means),
                (GRPO(GRPOConfig()), means),
            ]
            for algorithm, count in ways:
                assert algorithm.loss(given).sums["policy/bounded"].item() == count


def test_a_bounded_geometric_mean_is_counted() -> None:
    """One token far above leaves its completion's mean, of clipped log-ratios, as it is; all far below do not."""
    mask, advantages = torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 1)
    old = torch.tensor([[60.0, 60.0, 19.0], [0.0, 0.0, -60.0]])
    given = LossInputs(torch.zeros(2, 3, requires_grad=True), old, advantages, mask, mask / 6)
    gmpo = GRPO(GRPOConfig(objective="gmpo", aggregation="sequence", epsilon=0.4))
    assert gmpo.loss(given).sums["policy/bounded"].item() == 3 + 1


def test_bounded_visual_dependence_is_counted() -> None:
    logprobs = torch.full((2, 3), -1.0, requires_grad=True)
    blind = torch.tensor([[-81.0, -1.0, -2.0], [-13.0, -3.0, -1.0]], requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    given = LossInputs(logprobs, logprobs.detach(), torch.zeros(2, 1), mask, mask / 5, masked_logprobs=blind)
    output = PAPO(PAPOConfig(group_size=2)).loss(given)
    assert output.sums["policy/perception_bounded"].item() == 2
    (slope,) = torch.autograd.grad(output.loss, blind)
    assert ((slope == 0) == torch.tensor([[True, True, False], [True, False, True]])).all()  # the first is at equality


def test_a_bounded_penalty_in_the_reward_is_counted() -> None:
    given = far_off(0.0)
    given.ref_logprobs = given.old_logprobs + torch.tensor([[FAR, 0.0], [-FAR, 0.0]])
    assert PPO(PPOConfig(beta=0.1, kl_estimator="k3")).loss(given).sums["policy/kl_bounded"].item() == 1


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
