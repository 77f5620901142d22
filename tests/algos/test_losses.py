from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmenv.algos.losses import (
    Aggregation,
    Estimator,
    cispo,
    clipped_surrogate,
    clipped_value_loss,
    divergence,
    is_clipped,
    is_value_clipped,
    is_weight_clipped,
    sequence_ratio,
    token_weights,
)

LENGTHS = (4, 1, 3, 0)
MASK = torch.arange(4) < torch.tensor(LENGTHS)[:, None]
GENERATOR = torch.Generator().manual_seed(0)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR)


LOGPROBS, LOGRATIO, ADVANTAGES = -noise(4, 4).exp(), noise(4, 4) / 2, noise(4, 1)


def gradient(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.clone().requires_grad_()
    (slope,) = torch.autograd.grad(function(at).sum(), at)
    return slope


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, False),
        (1.1, 2.0, -2.2, False),
        (1.5, 2.0, -2.56, True),  # 1.28 * 2: clipped above
        (0.5, 2.0, -1.0, False),  # too low, but to raise it is right
        (0.5, -2.0, 1.6, True),  # 0.8 * -2: clipped below
        (1.5, -2.0, 3.0, False),  # too high, and to lower it is right
    ],
)
def test_clipped_surrogate_by_hand(ratio: float, advantage: float, loss: float, clipped: bool) -> None:
    r, a = torch.tensor([[ratio]]), torch.tensor([[advantage]])
    assert clipped_surrogate(r, a, 0.2, 0.28).item() == pytest.approx(loss)
    assert bool(is_clipped(r, a, 0.2, 0.28)) is clipped
    slope = gradient(lambda r: clipped_surrogate(r, a, 0.2, 0.28), r)
    assert slope.item() == pytest.approx(0.0 if clipped else -advantage)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (2.5, -2.0, 5.0, False),
        (5.0, -2.0, 6.0, True),  # 3 * 2: no more than that, for one token
        (5.0, 2.0, -2.4, True),  # a positive advantage knows only the one clip
        (0.5, -2.0, 1.6, True),
    ],
)
def test_dual_clip_by_hand(ratio: float, advantage: float, loss: float, clipped: bool) -> None:
    r, a = torch.tensor([[ratio]]), torch.tensor([[advantage]])
    assert clipped_surrogate(r, a, 0.2, 0.2, dual_clip=3.0).item() == pytest.approx(loss)
    assert bool(is_clipped(r, a, 0.2, 0.2, dual_clip=3.0)) is clipped


@pytest.mark.parametrize("dual_clip", [None, 1.1, 3.0])
def test_the_surrogate_equals_its_equations_and_what_is_clipped_has_no_gradient(dual_clip: float | None) -> None:
    ratio = torch.linspace(0.05, 5, 100, dtype=torch.float64)[None]
    advantages = torch.tensor([[1.5], [0.5], [0.0], [-0.5]], dtype=torch.float64)
    loss = clipped_surrogate(ratio, advantages, 0.2, 0.28, dual_clip)
    for row, a in enumerate(advantages.flatten().tolist()):
        for column, r in enumerate(ratio.flatten().tolist()):
            objective = min(r * a, min(max(r, 0.8), 1.28) * a)
            if dual_clip is not None and a < 0:
                objective = max(objective, dual_clip * a)
            assert loss[row, column].item() == pytest.approx(-objective, abs=1e-12)
    slope = gradient(lambda r: clipped_surrogate(r, advantages, 0.2, 0.28, dual_clip), ratio.expand(4, -1))
    clipped = is_clipped(ratio, advantages, 0.2, 0.28, dual_clip)
    np.testing.assert_array_equal(clipped, (slope == 0) & (advantages != 0))


def test_sequence_ratio_by_hand() -> None:
    """Probabilities that went from 1/2 and 1/8 to 1 and 1: a mean factor of 4, the geometric one, and 16 in all."""
    logratio = torch.tensor([[2.0, 8.0, 100.0]]).log()
    mask = torch.tensor([[True, True, False]])
    np.testing.assert_allclose(sequence_ratio(logratio, mask), [[4, 4, 4]], rtol=1e-6)
    np.testing.assert_allclose(sequence_ratio(logratio, mask, length_normalised=False), [[16, 16, 16]], rtol=1e-6)
    assert sequence_ratio(logratio, ~mask.any(dim=1, keepdim=True).expand(1, 3)).tolist() == [[1, 1, 1]]


def test_gspo_has_the_papers_gradient() -> None:
    """Equation 10, without clipping: that of log pi at each token is `-s * A / length`, over the completions."""
    weights = token_weights(MASK, "sequence", num_tokens=8, num_sequences=4, max_tokens=4)
    slope = gradient(lambda x: weights * clipped_surrogate(sequence_ratio(x, MASK), ADVANTAGES, 1e9, 1e9), LOGRATIO)
    for row, length in enumerate(LENGTHS):
        for t in range(4):
            s = math.exp(sum(LOGRATIO[row, :length].tolist()) / max(length, 1))
            expected = -s * ADVANTAGES[row].item() / length / 4 if t < length else 0
            assert slope[row, t].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
def test_gspo_equals_gspo_token(how: Aggregation) -> None:
    """Equation 14: the same value, with the gradient of the token's own probability."""
    weights = token_weights(MASK, how, num_tokens=8, num_sequences=4, max_tokens=4)

    def gspo(logratio: Tensor) -> Tensor:
        return weights * clipped_surrogate(sequence_ratio(logratio, MASK), ADVANTAGES, 0.2, 0.2)

    def gspo_token(logratio: Tensor) -> Tensor:
        ratio = sequence_ratio(logratio, MASK).detach() * (logratio - logratio.detach()).exp()
        return weights * clipped_surrogate(ratio, ADVANTAGES, 0.2, 0.2)

    torch.testing.assert_close(gspo(LOGRATIO), gspo_token(LOGRATIO))
    torch.testing.assert_close(gradient(gspo, LOGRATIO), gradient(gspo_token, LOGRATIO))


@pytest.mark.parametrize(
    ("ratio", "epsilon_low", "weight"),
    [(1.5, 1.0, 1.5), (3.5, 1.0, 3.0), (0.01, 1.0, 0.01), (0.01, 1e9, 0.01), (0.5, 0.2, 0.8)],
)
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_cispo_by_hand(ratio: float, epsilon_low: float, weight: float, advantage: float) -> None:
    """No token is left without gradient, and none flows through the weight."""
    a = torch.tensor([[advantage]])

    def loss(logprobs: Tensor) -> Tensor:
        return cispo(logprobs, ratio * (logprobs + 0.7).exp(), a, epsilon_low, 2.0)

    logprobs = torch.tensor([[-0.7]])
    assert loss(logprobs).item() == pytest.approx(0.7 * weight * advantage)
    assert gradient(loss, logprobs).item() == pytest.approx(-weight * advantage)
    assert bool(is_weight_clipped(torch.tensor(ratio), epsilon_low, 2.0)) is (weight != ratio)


def test_divergences_by_hand() -> None:
    """Probabilities 1/2 and 1/5 against 1/4 and 1/5: d = log 2 and 0."""
    logprobs, reference = torch.tensor([[0.5, 0.2]]).log(), torch.tensor([[0.25, 0.2]]).log()
    expected = {"k1": math.log(2), "k2": math.log(2) ** 2 / 2, "k3": 0.5 - math.log(0.5) - 1}
    for estimator, value in expected.items():
        estimates = divergence(logprobs, reference, estimator)  # type: ignore[arg-type]
        assert estimates.tolist() == [[pytest.approx(value), pytest.approx(0.0, abs=1e-7)]]


LOGITS, OLD, REFERENCE = noise(5), noise(5).log_softmax(0), noise(5).log_softmax(0)
"""A policy, the one that sampled and the reference, over five tokens."""


def kl(logits: Tensor) -> Tensor:
    policy = logits.log_softmax(0)
    return (policy.exp() * (policy - REFERENCE)).sum()


def opposite_kl(logits: Tensor) -> Tensor:
    return (REFERENCE.exp() * (REFERENCE - logits.log_softmax(0))).sum()


def expected_in_loss(estimator: Estimator) -> Callable[[Tensor], Tensor]:
    """The mean, over tokens of the policy, of the estimate that is differentiated."""

    def mean(logits: Tensor) -> Tensor:
        policy = logits.log_softmax(0)
        return (policy.exp().detach() * divergence(policy, REFERENCE, estimator)).sum()

    return mean


def expected_in_reward(estimator: Estimator) -> Callable[[Tensor], Tensor]:
    """The mean, over tokens of the policy, of the estimate times log pi: what a policy gradient differentiates."""

    def mean(logits: Tensor) -> Tensor:
        policy = logits.log_softmax(0)
        return (policy.exp().detach() * divergence(policy, REFERENCE, estimator).detach() * policy).sum()

    return mean


def expected_with_ratio(estimator: Estimator) -> Callable[[Tensor], Tensor]:
    """The mean, over tokens of the old policy, of the estimate times the ratio."""

    def mean(logits: Tensor) -> Tensor:
        policy = logits.log_softmax(0)
        return (OLD.exp() * (policy - OLD).exp() * divergence(policy, REFERENCE, estimator)).sum()

    return mean


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased_divergences(estimator: Estimator) -> None:
    assert expected_in_loss(estimator)(LOGITS).item() == pytest.approx(kl(LOGITS).item())


@pytest.mark.parametrize(
    ("estimate", "exact"),
    [
        (expected_in_loss("k1"), lambda logits: 0 * logits),
        (expected_in_loss("k2"), kl),
        (expected_in_loss("k3"), opposite_kl),
        (expected_in_reward("k1"), kl),
        (expected_with_ratio("k1"), kl),
        (expected_with_ratio("k3"), kl),
    ],
)
def test_gradients_of_divergences(estimate: Callable[[Tensor], Tensor], exact: Callable[[Tensor], Tensor]) -> None:
    torch.testing.assert_close(gradient(estimate, LOGITS), gradient(exact, LOGITS), rtol=0, atol=1e-12)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_in_the_reward_k2_and_k3_are_biased(estimator: Estimator) -> None:
    assert (gradient(expected_in_reward(estimator), LOGITS) - gradient(kl, LOGITS)).abs().max() > 0.01


@pytest.mark.parametrize(
    ("value", "loss", "clipped"),
    [
        (0.1, 0.405, False),
        (0.5, 0.32, True),  # went .5 towards the return of 1, when .2 would do: (.2 - 1)^2 / 2
        (-0.5, 1.125, False),  # went the wrong way
        (3.0, 2.0, False),  # went too far
    ],
)
def test_clipped_value_loss_by_hand(value: float, loss: float, clipped: bool) -> None:
    v, old, target = torch.tensor([[value]]), torch.zeros(1, 1), torch.ones(1, 1)
    assert clipped_value_loss(v, old, target, 0.2).item() == pytest.approx(loss)
    assert bool(is_value_clipped(v, old, target, 0.2)) is clipped
    slope = gradient(lambda v: clipped_value_loss(v, old, target, 0.2), v)
    assert slope.item() == pytest.approx(0 if clipped else value - 1)


def test_clipped_value_loss_equals_a_loop() -> None:
    old, returns = noise(50, 4), noise(50, 4)
    values = old + noise(50, 4) / 2
    expected = [
        max((v - r) ** 2, (min(max(v, o - 0.3), o + 0.3) - r) ** 2) / 2
        for v, o, r in zip(*(x.flatten().tolist() for x in (values, old, returns)), strict=True)
    ]
    np.testing.assert_allclose(clipped_value_loss(values, old, returns, 0.3).flatten(), expected, atol=1e-12)
    slope = gradient(lambda v: clipped_value_loss(v, old, returns, 0.3), values)
    np.testing.assert_array_equal(is_value_clipped(values, old, returns, 0.3), slope == 0)


@pytest.mark.parametrize(
    ("how", "rows"),
    [
        ("token", [[1 / 10] * 4, [1 / 10], [1 / 10] * 3, []]),
        ("sequence", [[1 / 24] * 4, [1 / 6], [1 / 18] * 3, []]),
        ("constant", [[1 / 30] * 4, [1 / 30], [1 / 30] * 3, []]),
    ],
)
def test_token_weights_by_hand(how: Aggregation, rows: list[list[float]]) -> None:
    """Four completions out of a batch of 6, which has 10 tokens and could have 5 each."""
    expected = [row + [0.0] * (4 - len(row)) for row in rows]
    weights = token_weights(MASK, how, num_tokens=10, num_sequences=6, max_tokens=5)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
def test_a_batch_without_tokens_has_no_weight(how: Aggregation) -> None:
    weights = token_weights(torch.zeros(2, 3, dtype=torch.bool), how, num_tokens=0, num_sequences=2, max_tokens=3)
    assert not weights.any()


def surrogate_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return clipped_surrogate((logprobs - old).exp(), advantages, 0.2, 0.28, dual_clip=3.0)


def gspo_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return clipped_surrogate(sequence_ratio(logprobs - old, mask), advantages, 0.2, 0.28)


def cispo_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return cispo(logprobs, (logprobs - old).exp(), advantages, 1.0, 0.28)


Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
LOSSES = pytest.mark.parametrize("loss", [surrogate_loss, gspo_loss, cispo_loss])
WEIGHTS = pytest.mark.parametrize("how", ["token", "sequence", "constant"])


def learn(
    loss: Loss,
    how: Aggregation,
    *,
    advantages: Tensor = ADVANTAGES,
    sides: tuple[int, int] = (0, 0),
    cuts: Sequence[slice] = (slice(None),),
    garbage: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """The loss of the batch and its gradient with respect to the log-probs, by columns and rows as told."""
    logprobs = pad(LOGPROBS.masked_fill(~MASK, garbage), sides).to(dtype).requires_grad_()
    old = pad((LOGPROBS - LOGRATIO).masked_fill(~MASK, garbage / 2), sides).to(dtype)
    mask = pad(MASK, sides)
    total = torch.zeros((), dtype=dtype)
    for rows in cuts:
        per_token = loss(logprobs[rows], old[rows], advantages[rows].to(dtype), mask[rows])
        weights = token_weights(mask[rows], how, num_tokens=8, num_sequences=4, max_tokens=5)
        total = total + (weights * per_token).sum()
    (slope,) = torch.autograd.grad(total, logprobs)
    return total.detach(), slope


@LOSSES
@WEIGHTS
def test_micro_batches_do_not_change_the_gradient(loss: Loss, how: Aggregation) -> None:
    """1 + 3 and 1 + 1 + 2 completions give what 4 give, in float32 too."""
    for cuts in ([slice(0, 1), slice(1, 4)], [slice(0, 1), slice(1, 2), slice(2, 4)]):
        torch.testing.assert_close(learn(loss, how, cuts=cuts), learn(loss, how), rtol=0, atol=1e-12)
        torch.testing.assert_close(
            learn(loss, how, cuts=cuts, dtype=torch.float32), learn(loss, how, dtype=torch.float32), rtol=0, atol=1e-6
        )


@LOSSES
@WEIGHTS
def test_what_is_masked_never_matters(loss: Loss, how: Aggregation) -> None:
    value, slope = learn(loss, how, garbage=-5.0)
    torch.testing.assert_close((value, slope), learn(loss, how), rtol=0, atol=0)
    assert not slope[~MASK].any()


@LOSSES
@WEIGHTS
def test_padding_changes_nothing(loss: Loss, how: Aggregation) -> None:
    value, slope = learn(loss, how)
    for sides in ((0, 3), (2, 0)):
        torch.testing.assert_close(learn(loss, how, sides=sides), (value, pad(slope, sides)), rtol=0, atol=1e-15)


@LOSSES
@WEIGHTS
def test_no_advantage_no_gradient(loss: Loss, how: Aggregation) -> None:
    value, slope = learn(loss, how, advantages=torch.zeros_like(ADVANTAGES))
    assert value == 0
    assert not slope.any()
    ratio = LOGRATIO.exp()
    assert not is_clipped(ratio, torch.zeros_like(ADVANTAGES), 0.2, 0.28, dual_clip=1.1).any()
