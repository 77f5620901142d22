from __future__ import annotations

import math

import gymnasium
import pytest
import torch
from helpers import inputs, scored

from vlmenv.agents import VLMAgent
from vlmenv.agents.sampling import Sampling
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


def test_the_temperature_of_sampling_does_not_matter() -> None:
    envs = gymnasium.make_vec("VLM-REC-v0", num_envs=2, answers=True)
    observations, infos = envs.reset(seed=0)
    losses = []
    for temperature in (1.0, 0.5):
        agent = VLMAgent.from_pretrained("builtin", sampling=Sampling(temperature=temperature))
        losses.append(agent.logprobs(agent.imitate(observations, list(infos["answer"]))).values)
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)


def test_every_true_answer_counts_alike() -> None:
    credit = SFT(SFTConfig()).credit(scored([0.0, 2.0]))
    assert credit.advantages.tolist() == [[1], [1]]
    assert credit.mask.all()


def test_there_is_one_true_answer() -> None:
    with pytest.raises(ConfigError, match="group_size must be 1, not 2"):
        SFTConfig(group_size=2)
