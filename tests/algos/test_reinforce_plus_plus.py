from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import inputs, scored

from vlmenv.algos import ReinforcePlusPlus, ReinforcePlusPlusConfig
from vlmenv.core.errors import ConfigError


def test_advantages_are_whitened_over_the_batch() -> None:
    """Returns 0, 0, 0, 0, 3, 3, 3, 3 over eight tokens: mean 1.5, deviation 1.5."""
    credit = ReinforcePlusPlus(ReinforcePlusPlusConfig()).credit(scored([0.0, 0.0, 3.0, 3.0]))
    assert credit.advantages.flatten().tolist() == pytest.approx([-1] * 4 + [1] * 4)


def test_the_statistics_are_of_all_processes() -> None:
    """Another process has as many tokens again, all of return 3: the mean is 2.25, the deviation sqrt(1.6875)."""
    others = torch.tensor([8.0, 24.0, 72.0], dtype=torch.float64)
    given = scored([0.0, 0.0, 3.0, 3.0], total=lambda x: x + others)
    credit = ReinforcePlusPlus(ReinforcePlusPlusConfig()).credit(given)
    assert credit.advantages[0, 0].item() == pytest.approx(-2.25 / math.sqrt(1.6875))


def test_divergence_and_discount_by_hand() -> None:
    """Token rewards -0.1 and 1 - 0.2, the first discounted by half; the same again without divergence."""
    ref = torch.tensor([[-1.0, -2.0], [0.0, 0.0]], dtype=torch.float64)
    algorithm = ReinforcePlusPlus(ReinforcePlusPlusConfig(beta=0.1, gamma=0.5))
    returns = torch.tensor([[-0.1 + 0.5 * 0.8, 0.8], [0.5, 1.0]], dtype=torch.float64)
    expected = (returns - returns.mean()) / returns.std(correction=0)
    torch.testing.assert_close(algorithm.credit(scored([1.0, 1.0], ref_logprobs=ref)).advantages, expected)


def test_the_variant_with_a_baseline() -> None:
    """Rewards against the group first; the divergence is in the loss."""
    algorithm = ReinforcePlusPlus(ReinforcePlusPlusConfig(baseline=True, group_size=2, beta=0.5))
    credit = algorithm.credit(scored([0.0, 2.0, 5.0, 5.0], ref_logprobs=torch.ones(4, 2)))
    assert credit.advantages[:, 0].tolist() == pytest.approx([-math.sqrt(2), math.sqrt(2), 0, 0])
    loss = algorithm.loss(inputs(reference=True)).loss.item()
    assert loss == pytest.approx((-1 - 1.2 + 1.5 + 0.5 * math.log(2) ** 2 / 2) / 3)


def test_without_a_baseline_the_divergence_is_not_in_the_loss() -> None:
    algorithm = ReinforcePlusPlus(ReinforcePlusPlusConfig(beta=0.5))
    assert algorithm.loss(inputs(reference=True)).loss.item() == pytest.approx((-1 - 1.2 + 1.5) / 3)


@pytest.mark.parametrize("options", [{"group_size": 1, "baseline": True}, {"gamma": 1.1}, {"beta": -1}, {"epsilon": 0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ReinforcePlusPlusConfig(**options)
