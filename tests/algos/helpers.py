"""Small batches that several tests of algorithms need."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmenv.algos import LossInputs, Scored
from vlmenv.algos.losses import token_weights

LENGTHS = torch.tensor([6, 2, 5, 1, 3, 6, 4, 6])
MASK = torch.arange(6) < LENGTHS[:, None]
REWARDS = [0.0, 1.0, 1.0, 0.0, 0.3, 0.9, 0.1, 0.2]
"""Of eight completions of several lengths."""


def numbers(seed: int) -> Tensor:
    """A random number for each of their tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 6, dtype=torch.float64, generator=generator)


OLD = -numbers(0).exp() * MASK
"""Their log-probabilities before an update."""


def inputs(reference: bool = False, *, how: str = "token", **changes: Any) -> LossInputs:
    """Two completions, of two tokens and of one; ratios 1 and 1.5, and 1.5."""
    logprobs = torch.log(torch.tensor([[0.5, 0.6], [0.3, 1.0]], dtype=torch.float64)).requires_grad_()
    old = torch.log(torch.tensor([[0.5, 0.4], [0.2, 1.0]], dtype=torch.float64))
    ref = torch.log(torch.tensor([[0.25, 0.6], [0.3, 1.0]], dtype=torch.float64)) if reference else None
    mask = torch.tensor([[True, True], [True, False]])
    weights = token_weights(mask, how, num_tokens=3, num_sequences=2, max_tokens=4)  # type: ignore[arg-type]
    advantages = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    made = LossInputs(logprobs, old, advantages, mask, weights, ref)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def scored(rewards: list[float], **changes: Any) -> Scored:
    """Completions of two tokens each."""
    count = len(rewards)
    mask = torch.ones(count, 2, dtype=torch.bool)
    old = torch.zeros(count, 2, dtype=torch.float64)
    made = Scored(
        torch.tensor(rewards, dtype=torch.float64),
        mask,
        old,
        None,
        None,
        torch.zeros(count, dtype=torch.bool),
        10,
        lambda x: x,
        lambda x: x,
        torch.tensor(rewards, dtype=torch.float64)[:, None],
        torch.ones(count, 1, dtype=torch.float64),
        np.random.default_rng(0),
    )
    for name, value in changes.items():
        setattr(made, name, value)
    return made
