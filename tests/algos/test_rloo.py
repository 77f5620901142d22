from __future__ import annotations

import math

import pytest
import torch
from helpers import inputs, scored

from vlmenv.algos import RLOO, RLOOConfig
from vlmenv.core.errors import ConfigError


def test_advantages_by_hand() -> None:
    credit = RLOO(RLOOConfig(group_size=3)).credit(scored([1.0, 2.0, 6.0]))
    assert credit.advantages.flatten().tolist() == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5])


def test_the_divergence_of_a_whole_completion_is_taken_from_its_reward() -> None:
    ref = torch.tensor([[-1.0, -2.0], [0.0, 0.0]], dtype=torch.float64)
    given = scored([1.0, 1.0], ref_logprobs=ref)
    credit = RLOO(RLOOConfig(group_size=2, beta=0.1)).credit(given)
    assert credit.advantages.flatten().tolist() == pytest.approx([-0.3, 0.3])


def test_the_loss_by_hand() -> None:
    """A completion is one action: ratios 1.5 and 1.5, the first clipped to 1.2; the mean over completions."""
    output = RLOO(RLOOConfig()).loss(inputs(how="sequence"))
    assert output.loss.item() == pytest.approx((-1.2 + 1.5) / 2)


def test_on_the_samplers_weights_the_gradient_is_reinforces() -> None:
    logs = torch.log(torch.tensor([[0.5, 0.4], [0.2, 1.0]], dtype=torch.float64))
    given = inputs(how="sequence", logprobs=logs.clone().requires_grad_(), old_logprobs=logs)
    RLOO(RLOOConfig()).loss(given).loss.backward()
    gradient = given.logprobs.grad
    assert gradient is not None
    torch.testing.assert_close(gradient, torch.tensor([[-0.5, -0.5], [0.5, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("options", [{"group_size": 1}, {"epsilon": 1.0}, {"beta": math.inf}])
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        RLOOConfig(**options)  # type: ignore[arg-type]
