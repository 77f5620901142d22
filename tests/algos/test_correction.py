from __future__ import annotations

import math

import pytest
import torch

from vlmenv.algos.correction import Correction, importance_weights, mismatch

RATIOS = torch.tensor([[0.25, 2.0, 4.0], [1.0, 0.5, 9.0]])
MASK = torch.tensor([[True, True, True], [True, True, False]])


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("none", [[1, 1, 1], [1, 1]]),
        ("token", [[0.25, 2, 3], [1, 0.5]]),
        ("token-mask", [[0, 2, 0], [1, 0.5]]),
        ("sequence", [[2, 2, 2], [0.5, 0.5]]),
        ("sequence-mask", [[2, 2, 2], [0.5, 0.5]]),
    ],
)
def test_weights_by_hand(how: Correction, expected: list[list[float]]) -> None:
    """The rows' ratios multiply to 2 and to 0.5; what is outside the mask has no part in that."""
    found = importance_weights(RATIOS.log(), MASK, how, 3.0)
    for row, weights in zip(found, expected, strict=True):
        assert row[: len(weights)].tolist() == pytest.approx(weights)


def test_whole_completions_are_cut_off_and_left_out() -> None:
    ratios, mask = torch.tensor([[2.0, 4.0], [0.5, 0.25], [2.0, 1.0]]).log(), torch.ones(3, 2, dtype=torch.bool)
    assert importance_weights(ratios, mask, "sequence", 3.0)[:, 0].tolist() == pytest.approx([3, 0.125, 2])
    assert importance_weights(ratios, mask, "sequence-mask", 3.0)[:, 0].tolist() == pytest.approx([0, 0, 2])


def test_the_mismatch_by_hand() -> None:
    found = mismatch(RATIOS.log(), MASK, "token", 3.0)
    ratios = [0.25, 2, 4, 1, 0.5]
    assert found["policy/sampler_kl"] == pytest.approx(sum(r - 1 - math.log(r) for r in ratios) / 5)
    assert found["policy/correction_clipped"] == pytest.approx(1 / 5)
    assert found["policy/effective_samples"] == pytest.approx(sum(ratios) ** 2 / sum(r * r for r in ratios) / 5)
    assert mismatch(RATIOS.log(), MASK, "token-mask", 3.0)["policy/correction_clipped"] == pytest.approx(2 / 5)
    assert mismatch(RATIOS.log(), MASK, "none", 3.0)["policy/correction_clipped"] == 0


@pytest.mark.parametrize("how", ["sequence", "sequence-mask"])
def test_ratios_beyond_all_numbers_are_bounded_or_left_out(how: Correction) -> None:
    """The likelier one's product over its tokens is exp(100), which float32 cannot hold."""
    logratio, mask = torch.tensor([[0.2] * 500, [0.0] * 500]), torch.ones(2, 500, dtype=torch.bool)
    weights = importance_weights(logratio, mask, how, 2.0)[:, 0].tolist()
    assert weights == [2.0 if how == "sequence" else 0.0, 1.0]
    found = mismatch(logratio, mask, how, 2.0)
    assert found["policy/effective_samples"] == pytest.approx(0.5)
    assert found["policy/correction_clipped"] == 0.5


def test_equal_policies_do_not_differ() -> None:
    found = mismatch(torch.zeros(2, 3), MASK, "sequence", 2.0)
    assert found == {"policy/sampler_kl": 0, "policy/correction_clipped": 0, "policy/effective_samples": 1}


@pytest.mark.parametrize("how", ["token", "sequence"])
def test_a_weighted_mean_over_the_samplers_samples_is_the_policys(how: Correction) -> None:
    """Completions of two tokens from a vocabulary of three, all nine of them; the second token depends on the first.

    Where the cap does nothing, weights of whole completions give the policy's expectation of any function of them;
    weights of tokens that of a function of the first token.
    """
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.rand(2, *size, generator=generator) + 0.2 for size in ((3,), (3, 3)))
    first, second = first / first.sum(-1, keepdim=True), second / second.sum(-1, keepdim=True)
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    policy, sampler = (
        torch.stack([first[i][pairs[:, 0]], second[i][pairs[:, 0], pairs[:, 1]]], dim=1) for i in range(2)
    )
    weights = importance_weights((policy / sampler).log(), torch.ones(9, 2, dtype=torch.bool), how, 1e9)
    value = torch.rand(9, generator=generator) if how == "sequence" else pairs[:, 0].float()
    found = (sampler.prod(dim=1) * weights[:, 0] * value).sum()
    torch.testing.assert_close(found, (policy.prod(dim=1) * value).sum())
