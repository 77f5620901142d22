from __future__ import annotations

import math

import pytest
import torch

from vlmenv.algos.losses import clipped_surrogate, is_clipped, k3_divergence


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, False),
        (1.1, 2.0, -2.2, False),
        (1.5, 2.0, -2.56, True),  # 1.28 * 2: clipped above
        (0.5, 2.0, -1.0, False),  # too low, but to raise it is right
        (0.5, -2.0, 1.6, True),  # 0.8 * -2: clipped below
        (1.5, -2.0, 3.0, False),  # too high, and to lower it is right
    ],
)
def test_clipped_surrogate_by_hand(ratio: float, advantage: float, loss: float, clipped: bool) -> None:
    r = torch.tensor([[ratio]], requires_grad=True)
    a = torch.tensor([[advantage]])
    value = clipped_surrogate(r, a, 0.2, 0.28)
    value.sum().backward()
    assert value.item() == pytest.approx(loss)
    assert bool(is_clipped(r, a, 0.2, 0.28)) is clipped
    assert r.grad is not None
    assert r.grad.item() == pytest.approx(0.0 if clipped else -advantage)


def test_k3_by_hand() -> None:
    logprobs, reference = (
        torch.tensor([[math.log(0.5), math.log(0.2)]]),
        torch.tensor([[math.log(0.25), math.log(0.2)]]),
    )
    value = k3_divergence(logprobs, reference)
    assert value.tolist() == [[pytest.approx(0.5 - math.log(0.5) - 1), pytest.approx(0.0, abs=1e-7)]]


def test_k3_is_an_unbiased_estimate_of_the_divergence() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    exact = (p * (p / q).log()).sum()
    assert (p * k3_divergence(p.log(), q.log())).sum().item() == pytest.approx(exact.item(), rel=1e-5)
