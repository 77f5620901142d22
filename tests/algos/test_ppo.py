from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import inputs, scored

from vlmenv.algos import PPO, PPOConfig
from vlmenv.core.errors import ConfigError


def test_advantages_and_returns_by_hand() -> None:
    """One completion, reward 1 at its end, values 0.5 and 0.2; gamma 1, lambda 0.5."""
    values = torch.tensor([[0.5, 0.2]], dtype=torch.float64)
    credit = PPO(PPOConfig(lam=0.5)).credit(scored([1.0], values=values))
    last, first = 1 - 0.2, 0.2 - 0.5 + 0.5 * 0.8
    assert credit.returns is not None
    assert credit.returns.flatten().tolist() == pytest.approx([first + 0.5, last + 0.2])
    mean, deviation = (first + last) / 2, (last - first) / 2
    assert credit.advantages.flatten().tolist() == pytest.approx([(first - mean) / deviation, 1])


def test_the_divergence_is_taken_from_the_reward_of_each_token() -> None:
    values, ref = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[-1.0, -2.0]], dtype=torch.float64)
    credit = PPO(PPOConfig(lam=1.0, beta=0.1)).credit(scored([1.0], values=values, ref_logprobs=ref))
    assert credit.returns is not None
    assert credit.returns.flatten().tolist() == pytest.approx([1 - 0.1 - 0.2, 1 - 0.2])


def test_the_loss_by_hand() -> None:
    """The policy's as GRPO's; values 1 off, one of them clipped to 0.2 from its old one and so 1.8 off."""
    zeros = torch.zeros(2, 2, dtype=torch.float64)
    values = torch.tensor([[1.0, 0.1], [1.0, 9.0]], dtype=torch.float64)
    returns = torch.tensor([[2.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    given = inputs(values=values, old_values=zeros, returns=returns)
    output = PPO(PPOConfig(value_weight=0.5)).loss(given)
    critic = (1.8**2 + 0.1**2 + 1.8**2) / 2
    assert output.loss.item() == pytest.approx((-1 - 1.2 + 1.5 + 0.5 * critic) / 3)
    assert output.sums["value/loss"].item() == pytest.approx(critic)
    assert output.sums["value/clip_frac"].item() == 2
    assert output.sums["value/mean"].item() == pytest.approx(2.1)


def test_it_wants_values_and_for_a_penalty_a_reference() -> None:
    assert PPO(PPOConfig()).wants_values
    assert not PPO(PPOConfig()).wants_reference
    assert PPO(PPOConfig(beta=0.1)).wants_reference


@pytest.mark.parametrize(
    "options", [{"epsilon": 1}, {"dual_clip": 1}, {"value_epsilon": 0}, {"lam": 2}, {"value_weight": -1}, {"mu": 0}]
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        PPOConfig(**options)
