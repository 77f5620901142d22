"""Entropy control against verl's formulas, written out here in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import MASK, OLD, REWARDS, numbers, scored
from torch import Tensor

from vlmenv.algos import GRPO, GRPOConfig, LossInputs
from vlmenv.algos.bandit import START, TabularAgent, learn
from vlmenv.core.errors import ConfigError


def step(config: GRPOConfig, now: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages, loss and its gradient, of the algorithm."""
    algorithm = GRPO(config)
    credit = algorithm.credit(scored(REWARDS, mask=MASK, old_logprobs=OLD))
    logprobs = now.clone().requires_grad_()
    weights = MASK.double() / MASK.sum()
    inputs = LossInputs(logprobs, OLD, credit.advantages, credit.mask, weights, chosen=credit.chosen)
    loss = algorithm.loss(inputs).loss
    return credit.advantages, loss.detach(), *torch.autograd.grad(loss, logprobs)


def products(advantages: Tensor) -> Tensor:
    """Each token's part of the covariance; the first of the padding."""
    advantages = advantages.expand(8, 6)
    parts = (advantages - advantages[MASK].mean()) * (OLD - OLD[MASK].mean())
    return parts.masked_fill(~MASK, -torch.inf)


def test_clip_cov() -> None:
    """All tokens within the bounds are chosen; on the policy that sampled, no ratio is clipped."""
    advantages, loss, slope = step(
        GRPOConfig(group_size=4, entropy_control="clip_cov", cov_share=1.0, cov_low=0.2, cov_high=1.5), OLD
    )
    parts = products(advantages)
    corr = torch.ones_like(OLD)
    corr[(parts > 0.2) & (parts < 1.5)] = 0
    assert 2 < (corr == 0).sum() < MASK.sum() - 2
    logprobs = OLD.clone().requires_grad_()
    expected = (-advantages * (logprobs - OLD).exp() * corr)[MASK].mean()
    torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(slope, *torch.autograd.grad(expected, logprobs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("objective", ["clip", "cispo", "sapo"])
def test_clip_cov_leaves_chosen_tokens_without_gradient(objective: Any) -> None:
    """Also after the policy has changed, and the others with one."""
    config = GRPOConfig(
        group_size=4, objective=objective, entropy_control="clip_cov", cov_share=1.0, cov_low=0.2, cov_high=1.5
    )
    advantages, _, slope = step(config, OLD + 0.01 * numbers(1) * MASK)
    chosen = (products(advantages) > 0.2) & (products(advantages) < 1.5)
    assert chosen.any()
    assert (slope[chosen] == 0).all()
    assert (slope[MASK & ~chosen] != 0).all()


def test_clip_cov_draws_a_share_of_them() -> None:
    config = GRPOConfig(group_size=4, entropy_control="clip_cov", cov_share=0.1, cov_low=0.2)
    first, again = (GRPO(config).credit(scored(REWARDS, mask=MASK, old_logprobs=OLD)).chosen for _ in range(2))
    assert first is not None
    assert again is not None
    assert first.sum() == int(0.1 * MASK.sum())
    assert torch.equal(first, again)  # the generator of the step decides


def test_kl_cov() -> None:
    """No ratio is clipped, and the tokens of the largest covariance have a penalty."""
    now = (OLD + 0.5 * numbers(1)) * MASK
    config = GRPOConfig(group_size=4, minibatches=2, entropy_control="kl_cov", cov_share=0.2, cov_weight=0.7)
    advantages, loss, slope = step(config, now)
    count = max(1, int(MASK.sum() * 0.2))
    places = products(advantages).flatten().topk(count).indices
    logprobs = now.clone().requires_grad_()
    losses = -advantages * (logprobs - OLD).exp()
    penalised = (losses + 0.7 * (logprobs - OLD).abs()).flatten()
    expected = losses.flatten().index_copy(0, places, penalised[places]).view(8, 6)[MASK].mean()
    torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(slope, *torch.autograd.grad(expected, logprobs), rtol=0, atol=1e-12)


def test_the_bonus_is_the_entropy() -> None:
    """Of a real policy: its gradient is that of the entropies of all next tokens, times the weight."""
    agent = TabularAgent(START)
    agent.seed(0)
    rollout = agent.rollout([{"images": (), "prompt": f"context {i // 4 % 3}"} for i in range(12)])
    table, now = agent.table, agent.logprobs(rollout)
    weights = now.mask / now.mask.sum()
    zeros = torch.zeros(12, 1)
    given: Any = (now.values, now.values.detach(), zeros, now.mask, weights)
    GRPO(GRPOConfig(group_size=4, entropy_bonus=0.3)).loss(LossInputs(*given, entropy=now.entropy)).loss.backward()
    found, table.logits.grad = table.logits.grad, None
    total = torch.zeros(())
    for i, completion in enumerate(rollout.completions):
        context, prefix = int(rollout.prompts[rollout.prompt_index[i]].input_ids[0]), ""
        for letter in completion.text:
            row = table.tokens()[context, ["", "b", "c", "ca"].index(prefix)]
            total = total + torch.distributions.Categorical(logits=row).entropy()
            prefix += letter
    (-0.3 * total / now.mask.sum()).backward()
    torch.testing.assert_close(found, table.logits.grad)


@pytest.mark.slow
def test_a_bonus_keeps_the_policy_of_the_bandit_wide() -> None:
    """Rewards are without noise; the larger the bonus, the less sure the policy, and the best answer stays the best."""
    found = [learn(GRPO(GRPOConfig(entropy_bonus=weight)), noisy=False, steps=40) for weight in (0.0, 1.0)]
    spread = [torch.special.entr(one).sum(dim=1).mean() for one in found]
    assert spread[1] > spread[0] + 0.1
    assert torch.equal(found[1].argmax(dim=1), found[0].argmax(dim=1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"entropy_control": "clip_cov", "cov_low": 0.1}, {"entropy_control": "kl_cov", "minibatches": 2}]
)
def test_the_bandit_is_solved_with_entropy_control(options: dict[str, Any]) -> None:
    found = learn(GRPO(GRPOConfig(cov_share=0.02, **options)))
    assert (found.max(dim=1).values > 0.8).all(), found


@pytest.mark.parametrize(
    "options",
    [
        {"entropy_bonus": -1.0},
        {"cov_share": 0.1},
        {"entropy_control": "clip_cov", "cov_weight": 2.0},
        {"entropy_control": "clip_cov", "cov_low": 5.0},
        {"entropy_control": "kl_cov"},
        {"entropy_control": "kl_cov", "mu": 2, "epsilon": 0.1},
        {"entropy_control": "kl_cov", "mu": 2, "objective": "cispo"},
        {"entropy_control": "clip_cov", "ratio": "sequence", "aggregation": "sequence"},
        {"entropy_control": "clip_cov", "objective": "gmpo", "aggregation": "sequence"},
    ],
)
def test_options_without_use_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        GRPOConfig(**options)
