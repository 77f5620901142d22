from __future__ import annotations

import math

import pytest
import torch

from vlmenv.algos import GRPO, GRPOConfig, LossInputs
from vlmenv.core.errors import ConfigError


def inputs(reference: bool) -> LossInputs:
    """Two completions, of two tokens and of one."""
    logprobs = torch.log(torch.tensor([[0.5, 0.6], [0.3, 1.0]])).requires_grad_()
    old = torch.log(torch.tensor([[0.5, 0.4], [0.2, 1.0]]))
    ref = torch.log(torch.tensor([[0.25, 0.6], [0.3, 1.0]])) if reference else None
    return LossInputs(logprobs, old, ref, torch.tensor([1.0, -1.0]), torch.tensor([[True, True], [True, False]]))


def test_the_loss_by_hand() -> None:
    """Ratios 1, 1.5, 1.5; the second is clipped to 1.2, the third not, since its advantage is negative."""
    output = GRPO(GRPOConfig()).loss(inputs(reference=False), num_tokens=6)
    assert output.loss.item() == pytest.approx((-1 - 1.2 + 1.5) / 6)
    assert output.sums["policy/clip_frac"].item() == 1
    k3 = 0.5 - math.log(1.5)
    assert output.sums["policy/approx_kl"].item() == pytest.approx(2 * k3, rel=1e-5)


def test_the_kl_penalty_by_hand() -> None:
    output = GRPO(GRPOConfig(beta=0.04)).loss(inputs(reference=True), num_tokens=3)
    kl = 0.5 - math.log(0.5) - 1
    assert output.loss.item() == pytest.approx((-1 - 1.2 + 1.5 + 0.04 * kl) / 3)
    assert output.sums["policy/kl"].item() == pytest.approx(kl)


def test_clip_higher() -> None:
    output = GRPO(GRPOConfig(epsilon_high=0.28)).loss(inputs(reference=False), num_tokens=1)
    assert output.loss.item() == pytest.approx(-1 - 1.28 + 1.5)


def test_a_reference_is_wanted_only_for_the_penalty() -> None:
    assert not GRPO(GRPOConfig()).wants_reference
    assert GRPO(GRPOConfig(beta=0.01)).wants_reference


@pytest.mark.parametrize(
    "options",
    [
        {"group_size": 1},
        {"mu": 0},
        {"epsilon": 0},
        {"epsilon": 1.0},
        {"epsilon_high": 0.0},
        {"beta": -1.0},
        {"beta": math.nan},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        GRPOConfig(**options)  # type: ignore[arg-type]
