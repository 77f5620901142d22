from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import inputs, scored

from vlmenv.algos import ALGORITHMS, GRPO, PRESETS, GRPOConfig
from vlmenv.core.errors import ConfigError


def test_the_loss_by_hand() -> None:
    """Ratios 1, 1.5, 1.5; the second is clipped to 1.2, the third not, since its advantage is negative."""
    output = GRPO(GRPOConfig()).loss(inputs())
    assert output.loss.item() == pytest.approx((-1 - 1.2 + 1.5) / 3)
    assert output.sums["policy/clip_frac"].item() == 1
    k3 = 0.5 - math.log(1.5)
    assert output.sums["policy/approx_kl"].item() == pytest.approx(2 * k3)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("token", (-1 - 1.2 + 1.5) / 3),
        ("sequence", ((-1 - 1.2) / 2 + 1.5) / 2),
        ("constant", (-1 - 1.2 + 1.5) / (2 * 4)),
    ],
)
def test_means_over_tokens_by_hand(how: Any, expected: float) -> None:
    algorithm = GRPO(GRPOConfig(aggregation=how))
    assert algorithm.aggregation == how
    assert algorithm.loss(inputs(how=how)).loss.item() == pytest.approx(expected)


def test_the_kl_penalty_by_hand() -> None:
    for estimator, kl in (("k1", math.log(2)), ("k2", math.log(2) ** 2 / 2), ("k3", 0.5 - math.log(0.5) - 1)):
        output = GRPO(GRPOConfig(beta=0.04, kl_estimator=estimator)).loss(inputs(reference=True))  # type: ignore[arg-type]
        assert output.loss.item() == pytest.approx((-1 - 1.2 + 1.5 + 0.04 * kl) / 3)
        assert output.sums["policy/kl"].item() == pytest.approx(kl)


def test_clip_higher_and_dual_clip() -> None:
    assert GRPO(GRPOConfig(epsilon_high=0.28)).loss(inputs()).loss.item() == pytest.approx((-1 - 1.28 + 1.5) / 3)
    assert GRPO(GRPOConfig(dual_clip=1.3)).loss(inputs()).loss.item() == pytest.approx((-1 - 1.2 + 1.3) / 3)


def test_gspo_by_hand() -> None:
    """The ratio of the first completion is sqrt(1 * 1.5), clipped to 1.1; of the second 1.5."""
    config = GRPOConfig(ratio="sequence", aggregation="sequence", epsilon=0.1)
    assert GRPO(config).loss(inputs(how="sequence")).loss.item() == pytest.approx((-1.1 + 1.5) / 2)


def test_cispo_by_hand() -> None:
    """Weights 1, 1.2, 1.2 times the log-probability; no token is without a gradient."""
    given = inputs()
    output = GRPO(GRPOConfig(objective="cispo")).loss(given)
    logs = [math.log(0.5), 1.2 * math.log(0.6), -1.2 * math.log(0.3)]
    assert output.loss.item() == pytest.approx(-sum(logs) / 3)
    output.loss.backward()
    gradient = given.logprobs.grad
    assert gradient is not None
    torch.testing.assert_close(gradient, torch.tensor([[-1.0, -1.2], [1.2, 0.0]], dtype=torch.float64) / 3)


def test_advantages_by_hand() -> None:
    rewards = [0.0, 2.0, 5.0, 5.0]
    std = math.sqrt(2)
    everyone = torch.tensor(rewards, dtype=torch.float64).std().item()
    for scale, expected in (
        ("group", [-1 / (std + 1e-4), 1 / (std + 1e-4), 0, 0]),
        ("none", [-1, 1, 0, 0]),
        ("batch", [-1 / (everyone + 1e-4), 1 / (everyone + 1e-4), 0, 0]),
    ):
        credit = GRPO(GRPOConfig(group_size=2, scale=scale)).credit(scored(rewards))  # type: ignore[arg-type]
        assert credit.advantages.flatten().tolist() == pytest.approx(expected)


def test_completions_that_were_cut_off_teach_nothing_on_request() -> None:
    given = scored([0.0, 1.0], truncated=torch.tensor([True, False]))
    assert GRPO(GRPOConfig(group_size=2)).credit(given).mask.all()
    mask = GRPO(GRPOConfig(group_size=2, mask_truncated=True)).credit(given).mask
    assert mask.tolist() == [[False, False], [True, True]]


def test_long_completions_are_punished_softly() -> None:
    """Of 10 tokens the last 4 cost: 8 tokens half a point."""
    mask = torch.arange(10) < torch.tensor([[6], [8]])
    credit = GRPO(GRPOConfig(group_size=2, overlong_share=0.4, scale="none")).credit(scored([1.0, 1.0], mask=mask))
    assert credit.advantages.flatten().tolist() == pytest.approx([0.25, -0.25])


def test_each_turn_of_an_episode_has_the_length_limit() -> None:
    """Two turns of 6 tokens cost nothing, as one does; of 2 and 8 tokens the longer one half a point."""
    turns = [[1] * 6 + [0] + [1] * 6, [1] * 2 + [0] + [1] * 8 + [0] * 2]
    config = GRPOConfig(group_size=2, overlong_share=0.4, scale="none")
    credit = GRPO(config).credit(scored([1.0, 1.0], mask=torch.tensor(turns, dtype=torch.bool)))
    assert credit.advantages.flatten().tolist() == pytest.approx([0.25, -0.25])


def test_a_reference_is_wanted_only_for_the_penalty() -> None:
    assert not GRPO(GRPOConfig()).wants_reference
    assert GRPO(GRPOConfig(beta=0.01)).wants_reference


def test_the_published_variants_can_be_named() -> None:
    assert {"grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "gmpo", "gdpo"} == set(PRESETS)
    for name in PRESETS:
        kind, config = ALGORITHMS[name]
        assert isinstance(kind(config), GRPO)


LOGS = math.log(0.5), math.log(0.6), math.log(0.3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("grpo", (-1 - 1.2 + 1.5) / 3),
        ("dr_grpo", (-1 - 1.2 + 1.5) / (2 * 4)),  # two completions of up to four tokens
        ("dapo", (-1 - 1.28 + 1.5) / 3),
        ("gspo", (-1.0004 + 1.5) / 2),  # sqrt(1 * 1.5) is clipped
        ("cispo", (-LOGS[0] - 1.5 * LOGS[1] + 1.5 * LOGS[2]) / 3),
        ("sapo", (-(2 + 4 / (1 + math.exp(-0.5))) / 2 + 4 / 1.05 / (1 + math.exp(-0.525))) / 2),
        ("gmpo", (-math.exp(0.4 / 2) + 1.5) / 2),  # log 1.5 is clipped where its advantage is positive
        ("gdpo", (-1 - 1.2 + 1.5) / 3),
    ],
)
def test_the_published_variants_by_hand(name: str, expected: float) -> None:
    algorithm = GRPO(PRESETS[name])
    assert algorithm.loss(inputs(how=algorithm.aggregation)).loss.item() == pytest.approx(expected)


def test_the_weights_of_cispo_have_an_upper_bound_alone() -> None:
    """Ratios 0.01, 10 and 1.5: weights 0.01, 5 and 1.5."""
    given = inputs()
    given.old_logprobs = given.logprobs.detach() - torch.tensor([[0.01, 10], [1.5, 1]], dtype=torch.float64).log()
    expected = (-0.01 * LOGS[0] - 5 * LOGS[1] + 1.5 * LOGS[2]) / 3
    assert GRPO(PRESETS["cispo"]).loss(given).loss.item() == pytest.approx(expected)


def test_the_advantages_of_dr_grpo_are_not_divided() -> None:
    credit = GRPO(PRESETS["dr_grpo"]).credit(scored([0.0] * 7 + [8.0]))
    assert credit.advantages.flatten().tolist() == pytest.approx([-1.0] * 7 + [7.0])


def test_advantages_per_term_by_hand() -> None:
    """Each term is compared within its group, with its weight; a term that a completion does not have adds nothing."""
    nan = math.nan
    terms = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, nan]], dtype=torch.float64)
    weights = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.5, 1.0], [0.5, 0.0]], dtype=torch.float64)
    given = scored([1.0, 1.0, 1.0, 0.0], terms=terms, term_weights=weights)
    found = GRPO(GRPOConfig(group_size=2, per_term=True)).credit(given).advantages[:, 0]
    one = 0.5 / (math.sqrt(0.5) + 1e-4)
    two = 0.5 / (math.sqrt(2) + 1e-4)
    sums = torch.tensor([one - one, one - one, two, -two], dtype=torch.float64)
    torch.testing.assert_close(found, (sums - sums.mean()) / (sums.std() + 1e-4))


def test_dapo_by_hand() -> None:
    """Of 10 tokens the last two cost up to a point, so rewards 1, 1, 1, 0.5 and 1; what was cut off is left out."""
    lengths = torch.tensor([[1], [8], [8], [9], [10], [8], [8], [8]])
    mask, truncated = torch.arange(10) < lengths, torch.arange(8) == 4
    credit = GRPO(PRESETS["dapo"]).credit(scored([1.0] * 3 + [1.0, 2.0] + [1.0] * 3, mask=mask, truncated=truncated))
    rewards = torch.tensor([1.0, 1, 1, 0.5, 1, 1, 1, 1], dtype=torch.float64)
    torch.testing.assert_close(credit.advantages[:, 0], (rewards - rewards.mean()) / (rewards.std() + 1e-4))
    assert credit.mask.sum(dim=1).tolist() == [1, 8, 8, 9, 0, 8, 8, 8]
    assert GRPO(PRESETS["dapo"]).most_rounds > 1


@pytest.mark.parametrize(
    "options",
    [
        {"group_size": 1},
        {"mu": 0},
        {"minibatches": 0},
        {"epsilon": 0},
        {"epsilon": 1.0},
        {"epsilon_high": 0.0},
        {"dual_clip": 1.0},
        {"objective": "cispo", "dual_clip": 2.0},
        {"objective": "cispo", "ratio": "sequence"},
        {"objective": "sapo", "epsilon": 0.1},
        {"objective": "sapo", "tau_positive": 0.0},
        {"tau_negative": 2.0},
        {"per_term": True, "scale": "none"},
        {"per_term": True, "most_rounds": 2},
        {"overlong_share": 1.0},
        {"most_rounds": 0},
        {"beta": -1.0},
        {"beta": math.nan},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        GRPOConfig(**options)
