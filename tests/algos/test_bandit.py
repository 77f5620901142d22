"""Every algorithm, trained by the real trainer on a bandit, comes to the policy that its equations call for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from vlmenv.algos import (
    ALGORITHMS,
    GRPO,
    PPO,
    RLOO,
    Algorithm,
    GRPOConfig,
    PPOConfig,
    ReinforcePlusPlus,
    ReinforcePlusPlusConfig,
    RLOOConfig,
)
from vlmenv.algos.bandit import ALLOWED, ANSWERS, MASK, MEANS, PATHS, START, TOKENS, Table, learn, solve

REWARDS = MEANS.double()
REFERENCE = Table(START, critic=False).tokens().detach().double()
"""Log-probabilities of tokens, [C, S, V]."""
LENGTHS = MASK.sum(dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_best_answer_is_learnt_in_every_context(name: str) -> None:
    """Rewards are 0 or 1, and the best answer, at first a rare one, has the highest chance of 1.

    So it is for 16 seeds out of 16. With rates much higher all of them but sft may settle on an answer that was lucky
    early on, after which they hardly sample others; ppo does so first, since it takes four steps on each batch.
    """
    kind, config = ALGORITHMS[name]
    found = solve(kind(config))
    assert (found > 0.95).all(), found


Payoff = Callable[[Tensor], Tensor]
"""From a policy, the probabilities of the answers [C, A], to the advantages that answers have on average [C, A]."""
Solution = Callable[[Tensor, float], Tensor]
"""From the mean advantages of tokens [C, S, V] and beta to log-probabilities of tokens [C, S, V]."""


def of_answers(tokens: Tensor) -> Tensor:
    """Log-probabilities of the tokens of answers, [C, A, L], from those of tokens after prefixes, [C, S, V]."""
    return tokens[:, PATHS, TOKENS].masked_fill(~MASK, 0)


def in_the_reward(beta: float) -> Tensor:
    """What maximises E[r] - beta * KL(pi || ref): pi ~ ref * exp(r / beta), over whole answers."""
    return (of_answers(REFERENCE).sum(dim=-1) + REWARDS / beta).softmax(dim=-1)


def in_the_loss(payoff: Payoff, solution: Solution, beta: float) -> Tensor:
    """Where the policy gradient and that of each token's own divergence cancel, at every prefix by itself.

    There a token's payoff is the mean of those of the answers that it leads to under the policy itself, since no
    token answers for the divergence of later ones.
    """
    tokens = REFERENCE
    for _ in range(100):
        logprobs = of_answers(tokens)
        payoffs, of_tokens = payoff(logprobs.sum(dim=-1).exp()), torch.zeros_like(REFERENCE)
        for i, answer in enumerate(ANSWERS):
            for t in range(len(answer)):
                rest = logprobs[:, i, t + 1 :].sum(dim=-1).exp()
                of_tokens[:, PATHS[i, t], TOKENS[i, t]] += rest * payoffs[:, i]
        tokens = ((tokens.exp() + solution(of_tokens, beta).exp()) / 2).log()
    return of_answers(tokens).sum(dim=-1).exp()


def k2(payoffs: Tensor, beta: float) -> Tensor:
    """k2 has the gradient of KL(pi || ref): pi ~ ref * exp(Q / beta)."""
    return (REFERENCE + payoffs / beta).masked_fill(~ALLOWED, -1e9).log_softmax(dim=-1)


def k3(payoffs: Tensor, beta: float) -> Tensor:
    """k3 has the gradient of KL(ref || pi): pi = beta * ref / (x - Q), with the x above Q for which that sums to 1."""
    ref, payoffs = REFERENCE.exp(), payoffs.masked_fill(~ALLOWED, -1e9)
    low = payoffs.amax(dim=-1, keepdim=True)
    high = low + beta
    for _ in range(60):
        middle = (low + high) / 2
        too_low = (beta * ref / (middle - payoffs)).sum(dim=-1, keepdim=True) > 1
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    return (beta * ref / (high - payoffs)).log().masked_fill(~ALLOWED, -1e9)


def k1(payoffs: Tensor, beta: float) -> Tensor:
    """k1 in the loss has a gradient of mean 0: the best token, as without a penalty."""
    return k2(payoffs, beta=1e-3)


def against_the_group(size: int) -> Payoff:
    """r less its group's mean, which holds r itself: r * (G - 1) / G and a part that does not depend on the answer."""
    return lambda policy: REWARDS * (size - 1) / size


def of_pairs(policy: Tensor) -> Tensor:
    """Two rewards that differ are half their difference from their mean and have a deviation of 1/sqrt(2) of it.

    So the advantage is 1/sqrt(2) for the better of the two, and what counts is the chance to be it.
    """
    difference = REWARDS[:, :, None] - REWARDS[:, None, :]
    return ((difference / 2 / (difference.abs() / 2**0.5 + 1e-4)) * policy[:, None, :]).sum(dim=-1)


def whitened(size: int) -> Payoff:
    """r less its group's mean, by the deviation of that over the tokens of all contexts."""

    def payoff(policy: Tensor) -> Tensor:
        mean = (policy * REWARDS).sum(dim=1, keepdim=True)
        variance = (policy * (REWARDS - mean).square()).sum(dim=1, keepdim=True)
        first = (REWARDS - mean) * (size - 1) / size
        second = first.square() + variance * (size - 1) / size**2  # of the others' mean
        share = policy * LENGTHS / (policy * LENGTHS).sum()
        deviation = ((share * second).sum() - (share * first).sum().square()).sqrt()
        return REWARDS * (size - 1) / size / deviation

    return payoff


@dataclass(frozen=True)
class Case:
    """An algorithm and the policy that it must come to."""

    algorithm: Algorithm
    policy: Tensor
    """[C, A]"""
    within: float = 0.03
    """total variation"""
    completions: int = 288
    """in a step; with the divergence in the reward few will do, as noise fades on the way there"""


def grpo(group_size: int, **options: Any) -> Algorithm:
    return GRPO(GRPOConfig(group_size=group_size, beta=0.3, scale="none", **options))


CASES = {
    "rloo": Case(RLOO(RLOOConfig(group_size=4, beta=0.3)), in_the_reward(0.3), within=0.01, completions=96),
    "reinforce++": Case(ReinforcePlusPlus(ReinforcePlusPlusConfig(beta=0.3)), in_the_reward(0.3), within=0.02),
    "ppo": Case(PPO(PPOConfig(beta=0.3)), in_the_reward(0.3), within=0.01, completions=96),
    "k1 in the loss": Case(grpo(4, kl_estimator="k1"), in_the_loss(against_the_group(4), k1, 0.3)),
    "k2 in the loss": Case(grpo(4, kl_estimator="k2"), in_the_loss(against_the_group(4), k2, 0.3)),
    "k3 in the loss": Case(grpo(4, aggregation="constant"), in_the_loss(against_the_group(4), k3, 0.3)),
    "cispo": Case(grpo(3, kl_estimator="k2", objective="cispo"), in_the_loss(against_the_group(3), k2, 0.3)),
    "grpo of pairs": Case(
        GRPO(GRPOConfig(group_size=2, beta=0.6)), in_the_loss(of_pairs, k3, 0.6), within=0.04, completions=384
    ),
    "reinforce++ with a baseline": Case(
        ReinforcePlusPlus(ReinforcePlusPlusConfig(group_size=4, beta=1.5, baseline=True)),
        in_the_loss(whitened(4), k2, 1.5),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_with_a_divergence_the_policy_is_the_known_one(name: str) -> None:
    """Rewards are without noise here, and gradients are not clipped, which would bend them.

    With the divergence in the reward the whole answer is weighed, and beta is what it says. In the loss, beside
    advantages that are not divided, a reward counts (G - 1) / G of that, which is GRPO's own doing: its baseline holds
    the reward itself, but the penalty has no baseline. Divided by deviations of more than two rewards, or with losses
    averaged over completions of several lengths, there is no such closed form.
    """
    case = CASES[name]
    options = {"steps": 140, "lr": 0.08, "lr_schedule": "cosine", "max_grad_norm": 1e9}
    found = learn(case.algorithm, completions=case.completions, noisy=False, **options)
    assert ((found - case.policy).abs().sum(dim=1) / 2 < case.within).all(), found
