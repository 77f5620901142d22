from __future__ import annotations

import numpy as np
import torch

from vlmenv.algos.advantages import group_relative, zero_variance_share


def test_group_relative_by_hand() -> None:
    """(1, 0, 0, 1): mean .5, sample standard deviation sqrt(1/3); the second group teaches nothing."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.7, 0.7, 0.7, 0.7])
    expected = 0.5 / (np.sqrt(1 / 3) + 1e-4)
    advantages = group_relative(rewards, 4)
    np.testing.assert_allclose(advantages[:4], [expected, -expected, -expected, expected], rtol=1e-6)
    np.testing.assert_array_equal(advantages[4:], 0)


def test_group_relative_equals_numpy_in_float64() -> None:
    rewards = np.random.default_rng(0).uniform(size=(6, 8))
    expected = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(group_relative(torch.from_numpy(rewards.ravel()), 8), expected.ravel(), atol=1e-12)


def test_zero_variance_share() -> None:
    assert zero_variance_share(torch.tensor([1.0, 1.0, 0.0, 1.0, 2.0, 2.0, 3.0, 3.0]), 2) == 0.75
