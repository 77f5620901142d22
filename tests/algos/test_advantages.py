from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmenv.algos.advantages import (
    Scale,
    gae,
    group_relative,
    leave_one_out,
    moments,
    overlong_penalty,
    reinforce_plus_plus,
    returns_to_go,
    term_relative,
    token_rewards,
    whiten,
    zero_variance_share,
)

LENGTHS = (5, 1, 3, 0, 5, 2)
MASK = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
GENERATOR = torch.Generator().manual_seed(0)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR)


REWARDS, KL, VALUES, TOKEN_REWARDS = noise(6), noise(6, 5), noise(6, 5), noise(6, 5)


def assert_rows(actual: Tensor, rows: list[list[float]]) -> None:
    """`actual` holds the rows, and zeros where they are shorter."""
    expected = [row + [0.0] * (actual.shape[1] - len(row)) for row in rows]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)


def test_group_relative_by_hand() -> None:
    """(1, 0, 0, 1): mean .5, sample standard deviation sqrt(1/3); the second group teaches nothing."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.7, 0.7, 0.7, 0.7])
    expected = 0.5 / (np.sqrt(1 / 3) + 1e-4)
    advantages = group_relative(rewards, 4)
    np.testing.assert_allclose(advantages[:4], [expected, -expected, -expected, expected], rtol=1e-6)
    np.testing.assert_array_equal(advantages[4:], 0)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_relative_equals_numpy_in_float64(scale: Scale) -> None:
    rewards = np.random.default_rng(0).uniform(size=(6, 8))
    stds = {"group": rewards.std(1, ddof=1, keepdims=True), "batch": rewards.std(ddof=1), "none": 1 - 1e-4}
    expected = (rewards - rewards.mean(1, keepdims=True)) / (stds[scale] + 1e-4)
    np.testing.assert_allclose(
        group_relative(torch.from_numpy(rewards.ravel()), 8, scale), expected.ravel(), atol=1e-12
    )


def test_the_scale_of_a_batch_is_that_of_all_processes() -> None:
    parts = REWARDS.split([2, 4])
    pieces = torch.cat([group_relative(part, 2, "batch", REWARDS) for part in parts])
    torch.testing.assert_close(pieces, group_relative(REWARDS, 2, "batch"), rtol=0, atol=1e-12)


def test_leave_one_out_by_hand() -> None:
    """Others' means of (1, 2, 6): 4, 3.5, 1.5."""
    advantages = leave_one_out(torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0]), 3)
    np.testing.assert_allclose(advantages, [-3, -1.5, 4.5, 0, 0, 0], rtol=1e-6)


def test_leave_one_out_equals_a_loop() -> None:
    groups = np.random.default_rng(0).normal(size=(5, 4))
    expected = [[group[i] - np.delete(group, i).mean() for i in range(4)] for group in groups]
    np.testing.assert_allclose(leave_one_out(torch.from_numpy(groups.ravel()), 4), np.ravel(expected), atol=1e-12)


def test_zero_variance_share() -> None:
    assert zero_variance_share(torch.tensor([1.0, 1.0, 0.0, 1.0, 2.0, 2.0, 3.0, 3.0]), 2) == 0.75


@pytest.mark.parametrize("size", [3, 5, 8])
def test_equal_rewards_give_exactly_0(size: int) -> None:
    """In float32 the mean of equal numbers often differs from them, and AdamW or normalisation would enlarge that."""
    rewards = torch.tensor([0.99, 0.97, 0.83]).repeat_interleave(size)
    assert any(torch.full((size,), one).mean() != one for one in torch.rand(99, generator=GENERATOR))
    for scale in ("group", "batch", "none"):
        assert (group_relative(rewards, size, scale) == 0).all()
    assert (leave_one_out(rewards, size) == 0).all()
    terms = torch.stack([rewards, rewards.flip(0)], dim=1)
    terms[0, 1] = torch.nan
    weights = torch.ones_like(terms)
    weights[0, 1] = 0
    assert (term_relative(terms, weights, size) == 0).all()
    mask = torch.ones(len(rewards), 2, dtype=torch.bool)
    assert (whiten(reinforce_plus_plus(rewards, mask, group_size=size), mask) == 0).all()


def test_a_term_that_is_equal_in_a_group_leaves_the_others() -> None:
    """By hand: the second group's sums are those of its second term alone, (-1, 1) / sqrt(2) of the deviation."""
    terms = torch.tensor([[0.99, 1.0], [0.99, 1.0], [0.3, 0.0], [0.3, 2.0]], dtype=torch.float64)
    sums = np.array([0, 0, -1, 1]) / np.sqrt(2)
    np.testing.assert_allclose(term_relative(terms, torch.ones_like(terms), 2), sums / np.std(sums, ddof=1), rtol=1e-3)


def test_overlong_penalty_by_hand() -> None:
    """L_max 100, L_cache 20: nothing up to 80, -1 from 100 on."""
    penalties = overlong_penalty(torch.tensor([0, 80, 81, 90, 100, 101, 5000]), 100, 20)
    np.testing.assert_allclose(penalties, [0, 0, -0.05, -0.5, -1, -1, -1], atol=1e-7)


def test_token_rewards_by_hand() -> None:
    kl = torch.tensor([[0.5, -1.0, 9.0], [2.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    rewards = token_rewards(torch.tensor([3.0, 4.0]), mask, kl, beta=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 3.1, 0.0], [3.8, 0.0, 0.0]]))
    torch.testing.assert_close(
        token_rewards(torch.tensor([3.0, 4.0]), mask), torch.tensor([[0.0, 3.0, 0.0], [4.0, 0.0, 0.0]])
    )


def test_token_rewards_sum_to_the_penalised_reward() -> None:
    sums = token_rewards(REWARDS, MASK, KL, beta=0.3).sum(dim=1)
    expected = [REWARDS[i].item() - 0.3 * sum(KL[i, :n].tolist()) if n else 0 for i, n in enumerate(LENGTHS)]
    np.testing.assert_allclose(sums, expected, atol=1e-12)


def test_gae_by_hand() -> None:
    """Deltas 0 + .5 * 2 - 1 = 0 and 4 - 2 = 2, so A_1 = 2 and A_0 = 0 + .5 * .5 * 2."""
    mask = torch.tensor([[True, True, False]])
    advantages, returns = gae(torch.tensor([[0.0, 4.0, 7.0]]), torch.tensor([[1.0, 2.0, 8.0]]), mask, 0.5, 0.5)
    assert advantages.tolist() == [[0.5, 2.0, 0.0]]
    assert returns.tolist() == [[1.5, 4.0, 0.0]]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (0.9, 0.0), (0.9, 1.0), (1.0, 1.0)])
def test_gae_equals_its_definition(gamma: float, lam: float) -> None:
    """Equation 16: the sum over l of (gamma * lam)^l times the TD error l steps on."""
    advantages, returns = gae(TOKEN_REWARDS, VALUES, MASK, gamma, lam)
    rows, targets = [], []
    for rewards, values, length in zip(TOKEN_REWARDS.tolist(), VALUES.tolist(), LENGTHS, strict=True):
        after = [*values[:length], 0.0][1:]
        deltas = [r + gamma * v_next - v for r, v_next, v in zip(rewards, after, values, strict=False)]
        row = [sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, length)) for t in range(length)]
        rows.append(row)
        targets.append([a + v for a, v in zip(row, values, strict=False)])
    assert_rows(advantages, rows)
    assert_rows(returns, targets)


def test_rewards_and_discounts_of_turns_by_hand() -> None:
    """Turns of two tokens and of one, then of one; of the second episode, the last answer had no room."""
    mask = torch.tensor([[True, True, False, True], [True, False, False, False]])
    turns = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    rewards = token_rewards(turns.sum(dim=1), mask, turns=turns)
    assert rewards.tolist() == [[0, 1, 0, 2], [12, 0, 0, 0]]
    advantages, returns = gae(rewards, torch.tensor([[1.0, 2.0, 9.0, 4.0]] * 2), mask, 0.5, turn_gamma=0.5)
    assert returns.tolist() == [[0.75, 1.5, 0, 2], [12, 0, 0, 0]]
    assert advantages.tolist() == [[-0.25, -0.5, 0, -2], [11, 0, 0, 0]]


def test_returns_to_go_by_hand() -> None:
    """8, 4 + 8 / 2 and 2 + 8 / 2."""
    mask = torch.tensor([[True, True, True, False]])
    assert returns_to_go(torch.tensor([[2.0, 4.0, 8.0, 9.0]]), mask, 0.5).tolist() == [[6, 8, 8, 0]]
    assert returns_to_go(torch.tensor([[2.0, 4.0, 8.0, 9.0]]), mask).tolist() == [[14, 12, 8, 0]]


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_returns_to_go_equal_their_definition(gamma: float) -> None:
    rows = [
        [sum(gamma ** (s - t) * rewards[s] for s in range(t, length)) for t in range(length)]
        for rewards, length in zip(TOKEN_REWARDS.tolist(), LENGTHS, strict=True)
    ]
    assert_rows(returns_to_go(TOKEN_REWARDS, MASK, gamma), rows)


def test_reinforce_plus_plus_equals_equation_4() -> None:
    """A_t = r - beta * (the KL of token t and of all after it)."""
    rows = [
        [reward - 0.1 * sum(kl[t:length]) for t in range(length)]
        for reward, kl, length in zip(REWARDS.tolist(), KL.tolist(), LENGTHS, strict=True)
    ]
    assert_rows(reinforce_plus_plus(REWARDS, MASK, KL, beta=0.1), rows)


def test_reinforce_plus_plus_with_baseline_equals_equations_6_and_7() -> None:
    """Groups of 3; whitened over tokens."""
    groups = REWARDS.view(2, 3).numpy()
    centred = (groups - groups.mean(axis=1, keepdims=True)).ravel()
    tokens = np.repeat(centred, LENGTHS)
    normalised = (centred - tokens.mean()) / (tokens.std() + 1e-8)
    advantages = whiten(reinforce_plus_plus(REWARDS, MASK, group_size=3), MASK)
    assert_rows(advantages, [[a] * n for a, n in zip(normalised.tolist(), LENGTHS, strict=True)])


def test_reinforce_plus_plus_discounts() -> None:
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages = reinforce_plus_plus(torch.tensor([4.0]), mask, torch.ones(1, 3), beta=1.0, gamma=0.5)
    assert advantages.tolist() == [[-1 - 0.5 + 0.75, -1 + 1.5, 3.0]]


def test_moments_by_hand() -> None:
    """Of 1, 2 and -4: three values of sum -1 and sum of squares 21."""
    mask = torch.tensor([[True, True], [True, False]])
    assert moments(torch.tensor([[1.0, 2.0], [-4.0, 9.0]]), mask).tolist() == [3, -1, 21]
    assert moments(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.bool)).tolist() == [0, 0, 0]


def test_whitening_by_hand() -> None:
    """Of 1, 3 and 5: mean 3 and deviation sqrt(8 / 3), that of the whole and not of a sample."""
    mask = torch.tensor([[True, True], [True, False]])
    whitened = whiten(torch.tensor([[1.0, 3.0], [5.0, 9.0]], dtype=torch.float64), mask)
    deviation = (8 / 3) ** 0.5 + 1e-8
    assert_rows(whitened, [[-2 / deviation, 0], [2 / deviation]])


def test_whitened_values_have_mean_0_and_variance_1() -> None:
    chosen = whiten(VALUES, MASK)[MASK]
    assert chosen.mean().item() == pytest.approx(0, abs=1e-12)
    assert chosen.var(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert whiten(VALUES.float(), MASK).dtype == torch.float32


def test_whitening_by_the_moments_of_all_processes_is_whitening_everything() -> None:
    parts = [slice(0, 1), slice(1, 4), slice(4, 6)]
    stats = torch.stack([moments(VALUES[rows], MASK[rows]) for rows in parts]).sum(dim=0)
    pieces = torch.cat([whiten(VALUES[rows], MASK[rows], stats) for rows in parts])
    torch.testing.assert_close(pieces, whiten(VALUES, MASK), rtol=0, atol=1e-12)


def test_whitening_small_differences_of_large_numbers() -> None:
    """In float32 the squares' difference would be lost."""
    values = torch.tensor([[1000.0, 1000.5, 1001.0]])
    whitened = whiten(values, torch.ones(1, 3, dtype=torch.bool))
    np.testing.assert_allclose(whitened, [[-np.sqrt(1.5), 0, np.sqrt(1.5)]], rtol=1e-5, atol=1e-6)


def test_whitening_equal_values_gives_zeros() -> None:
    whitened = whiten(torch.full((2, 3), 0.7), torch.ones(2, 3, dtype=torch.bool))
    np.testing.assert_allclose(whitened, 0, atol=1e-6)


def of_tokens(rewards: Tensor, kl: Tensor, values: Tensor, mask: Tensor) -> list[Tensor]:
    """Everything above that has to do with tokens."""
    shaped = token_rewards(REWARDS, mask, kl, beta=0.1)
    return [
        shaped,
        *gae(rewards, values, mask, 0.9, 0.8),
        returns_to_go(rewards, mask, 0.9),
        reinforce_plus_plus(REWARDS, mask, kl, beta=0.1, gamma=0.9, group_size=3),
        whiten(values, mask),
    ]


@pytest.mark.parametrize("garbage", [1e6, torch.nan, torch.inf])
def test_what_is_masked_never_matters(garbage: float) -> None:
    clean = of_tokens(TOKEN_REWARDS, KL, VALUES, MASK)
    dirty = of_tokens(*(x.masked_fill(~MASK, garbage) for x in (TOKEN_REWARDS, KL, VALUES)), MASK)
    for expected, actual in zip(clean, dirty, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        assert not actual[~MASK].any()


@pytest.mark.parametrize("sides", [(0, 3), (2, 0)])
def test_padding_changes_nothing(sides: tuple[int, int]) -> None:
    """On either side."""
    plain = of_tokens(TOKEN_REWARDS, KL, VALUES, MASK)
    padded = of_tokens(*(pad(x, sides, value=9.0) for x in (TOKEN_REWARDS, KL, VALUES)), pad(MASK, sides))
    for expected, actual in zip(plain, padded, strict=True):
        torch.testing.assert_close(actual, pad(expected, sides), rtol=0, atol=0)
