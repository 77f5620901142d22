from __future__ import annotations

import math

import pytest
import torch
from helpers import inputs, scored

from vlmenv.algos import SFT, SFTConfig
from vlmenv.core.errors import ConfigError


def test_the_loss_by_hand() -> None:
    """Minus the mean over tokens of log .5, log .6 and log .3, whatever was sampled and whatever it earned."""
    given = inputs()
    output = SFT(SFTConfig()).loss(given)
    assert output.loss.item() == pytest.approx(-(math.log(0.5) + math.log(0.6) + math.log(0.3)) / 3)
    output.loss.backward()
    expected = torch.tensor([[-1.0, -1.0], [-1.0, 0.0]], dtype=torch.float64) / 3
    torch.testing.assert_close(given.logprobs.grad, expected)


def test_every_true_answer_counts_alike() -> None:
    credit = SFT(SFTConfig()).credit(scored([0.0, 2.0]))
    assert credit.advantages.tolist() == [[1], [1]]
    assert credit.mask.all()


def test_there_is_one_true_answer() -> None:
    with pytest.raises(ConfigError, match="group_size must be 1, not 2"):
        SFTConfig(group_size=2)
