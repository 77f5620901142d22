from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmenv.algos.batch import Batch, Rollouts, micro_batches, minibatches, padding_share, repetition
from vlmenv.core.errors import RewardError
from vlmenv.core.rollout import Completion, Observation, Prompt, Rollout


def rollout(lengths: list[int], prompts: list[int], per_prompt: int = 1) -> Rollout:
    """Completions of these lengths, each run of `per_prompt` after the next prompt."""
    made = [Prompt(np.zeros(n, np.int64), np.zeros((3, n), np.int64), {}) for n in prompts]
    completions = [
        Completion(str(i), np.full(n, i), np.full(n, -i, np.float32), "length" if n == 4 else "stop")
        for i, n in enumerate(lengths)
    ]
    return Rollout(made, np.repeat(np.arange(len(prompts)), per_prompt), completions, 1.0)


def scored(rewards: list[float]) -> Rollouts:
    made = rollout([1] * len(rewards), [3] * (len(rewards) // 2), 2)
    records = [
        {"id": f"{reward}", "rewards": {"a": reward} | ({"b": 1.0} if i == 0 else {}), "traits": {}}
        for i, reward in enumerate(rewards)
    ]
    return Rollouts(made, torch.tensor(rewards), records)


def test_terms_with_their_weights_are_the_rewards() -> None:
    """Also of completions that do not have each term, in any order of rows, and after a checkpoint."""
    made = scored([0.5, 1.0, 0.0, 2.0])
    assert [part.tolist() for part in made.terms()] == [[[0.5], [1.0], [0.0], [2.0]], [[1.0]] * 4]
    made.weights = [{"a": 2.0, "b": 0.1}, *[{"a": 2.0}] * 3]
    made.images = [()] * 4
    restored = Rollouts.from_state(made.state_dict())
    joined = Rollouts.joined([restored[np.array([3, 0])], restored[1:3]])
    terms, weights = joined.terms()
    assert torch.isnan(terms).tolist() == [[False, True], [False, False], [False, True], [False, True]]
    assert (terms.nan_to_num() * weights).sum(dim=1).tolist() == pytest.approx([4.0, 1.1, 2.0, 0.0])


def test_tensors_of_a_rollout() -> None:
    batch = Batch.of(rollout([1, 3, 4], [2, 2, 2]), torch.device("cpu"))
    assert batch.mask.sum(dim=1).tolist() == [1, 3, 4]
    assert batch.old_logprobs[1].tolist() == [-1, -1, -1, 0]
    assert batch.truncated.tolist() == [False, False, True]
    part = batch[np.array([1, 0])]
    assert part.mask.shape == (2, 3)
    assert part.old_logprobs[:, 0].tolist() == [-1, 0]
    assert [c.text for c in part.rollout.completions] == ["1", "0"]
    batch.put("values", slice(1, 3), torch.ones(2, 2))
    assert batch.values is not None
    assert batch.values.tolist() == [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]


@given(st.integers(1, 7), st.integers(1, 4), st.integers(1, 9), st.integers(0, 5))
def test_minibatches_divide_the_groups(groups: int, group_size: int, count: int, seed: int) -> None:
    size = groups * group_size
    parts = [np.arange(size)[rows] for rows in minibatches(size, group_size, count, np.random.default_rng(seed))]
    assert len(parts) == min(count, groups)
    assert sorted(np.concatenate(parts).tolist()) == list(range(size))
    for part in parts:
        assert (part.reshape(-1, group_size) // group_size == part[::group_size, None] // group_size).all()


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=12),
    st.integers(1, 4) | st.none(),
    st.integers(1, 60) | st.none(),
)
def test_micro_batches_keep_within_their_bounds(lengths: list[int], size: int | None, tokens: int | None) -> None:
    made = rollout(lengths, [3 + i % 2 for i in range(len(lengths))])
    parts = [np.arange(len(lengths))[rows] for rows in micro_batches(made, size, tokens)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(lengths)))
    for rows in parts:
        assert size is None or len(rows) <= size
        assert tokens is None or sum(3 + i % 2 + lengths[i] for i in rows) <= tokens or len(rows) == 1
    if size is None and tokens is None:
        assert len(parts) == 1
    else:
        longest = [max(lengths[i] for i in rows) for rows in parts]
        assert longest == sorted(longest)


def test_a_prompt_that_is_shared_counts_once() -> None:
    assert len(micro_batches(rollout([2, 2, 2, 2], [10], 4), None, 18)) == 1
    assert len(micro_batches(rollout([2, 2, 2, 2], [10], 4), None, 17)) == 2


def test_siblings_stay_in_one_pass_where_they_fit() -> None:
    made = rollout([9, 1, 2, 8], [10, 10], 2)
    assert [rows.tolist() for rows in micro_batches(made, None, 20)] == [[2, 3], [1, 0]]


def test_the_share_of_padding_is_that_of_the_tensors() -> None:
    """Prompts of 10 and 6 tokens, completions of 4 and 1: 20 + 8 places for 21 tokens."""
    made = rollout([4, 1], [10, 6])
    assert padding_share(made, [slice(0, 2)]) == pytest.approx(1 - 21 / 28)
    assert padding_share(made, [slice(0, 1), slice(1, 2)]) == 0


def test_the_most_informative_groups_of_several_rounds() -> None:
    """Groups of two: equal rewards teach nothing. The informative ones come first, and the rest fill up."""
    rounds = [scored([1.0, 1.0, 0.0, 2.0, 3.0, 3.0]), scored([4.0, 4.0, 5.0, 6.0, 7.0, 7.0])]
    assert rounds[0].informative_groups(2).tolist() == [False, True, False]
    chosen = Rollouts.most_informative(rounds, 2)
    assert chosen.rewards.tolist() == [1, 1, 0, 2, 5, 6]
    assert [record["id"] for record in chosen.records] == ["1.0", "1.0", "0.0", "2.0", "5.0", "6.0"]
    assert chosen.rollout.prompt_index.tolist() == [0, 0, 1, 1, 2, 2]
    assert Rollouts.most_informative(rounds[:1], 2) is rounds[0]


def test_metrics_are_means_over_those_that_have_a_term() -> None:
    metrics = scored([1.0, 2.0]).metrics()
    assert metrics["reward/mean"] == metrics["reward/a"] == pytest.approx(1.5)
    assert metrics["reward/b"] == 1
    assert metrics["reward/std"] == pytest.approx(0.5)


def test_metrics_of_completions_and_what_environments_tell_of_them() -> None:
    made = rollout([1, 4, 2], [3, 3, 3])
    traits = {"box_ratio": np.array([0.5, 0.0, 2.0]), "_box_ratio": np.array([True, False, True])}
    metrics = Rollouts.scored(shown(3), made, np.ones(3), {"traits": traits}).metrics()
    assert metrics["completion/box_ratio"] == 1.25
    assert (metrics["completion/min_length"], metrics["completion/max_length"]) == (1, 4)
    assert metrics["completion/length"] == pytest.approx(7 / 3)
    assert metrics["completion/truncated"] == pytest.approx(1 / 3)


def test_images_stay_with_their_completions() -> None:
    rounds = [Rollouts.scored(shown(4, i), rollout([1] * 4, [3, 3], 2), np.arange(4) * i, {}) for i in (0, 1)]
    chosen = Rollouts.most_informative(rounds, 2)
    assert [images[0][0, 0, 0] for images in chosen.images] == [10, 11, 12, 13]
    assert [images[0][0, 0, 0] for images in chosen[np.array([3, 0])].images] == [13, 10]
    assert chosen[1:3].rewards.tolist() == [1, 2]


@pytest.mark.parametrize("reward", [np.nan, -np.inf, 1e39])
def test_a_reward_that_is_not_finite_is_named(reward: float) -> None:
    """Also one that float32 cannot hold, and of environments that do not look at it themselves."""
    infos = {"id": np.array(["a", "b"]), "rewards": {"t": np.array([1.0, 2.0]), "_t": np.array([True, True])}}
    with pytest.raises(RewardError, match=r"the reward of sample b is .* with the terms \{'t': 2.0\}"):
        Rollouts.scored(shown(2), rollout([1, 1], [3, 3]), np.array([0.0, reward]), infos)


def shown(count: int, first: int = 0) -> list[Observation]:
    """Observations, each with an image of its own colour."""
    return [{"images": (np.full((2, 2, 3), 10 * first + i, np.uint8),), "prompt": f"{i}"} for i in range(count)]


def test_repeated_runs_of_tokens() -> None:
    """1 2 3 4 1 2 3 4 1: of its six runs of four, the last two have occurred before."""
    assert repetition(np.array([1, 2, 3, 4, 1, 2, 3, 4, 1])) == pytest.approx(2 / 6)
    assert repetition(np.array([5] * 11)) == pytest.approx(7 / 8)
    assert repetition(np.arange(9)) == 0
    assert repetition(np.array([1, 1, 1])) == 0
    made = rollout([3, 9], [3, 3])
    made.completions[1].token_ids[:] = 7
    metrics = Rollouts.scored(shown(2), made, np.ones(2), {}).metrics()
    assert metrics["completion/repetition"] == pytest.approx(5 / 6 / 2)


def test_records_have_the_mean_advantage_of_their_tokens() -> None:
    rollouts = scored([1.0, 0.0, 0.5])
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    rollouts.record_advantages(torch.tensor([[1.0, 2.0, 9.0], [-1.0, 9.0, 9.0], [5.0, 5.0, 5.0]]), mask)
    assert [record["advantage"] for record in rollouts.records] == [1.5, -1.0, None]
    rollouts.record_advantages(torch.tensor([[0.5], [float("nan")], [1.0]]), mask)
    assert [record["advantage"] for record in rollouts.records] == [0.5, None, None]


def test_records_have_prediction_and_truth_as_json() -> None:
    infos = {
        "prediction": np.array([None, (1.0, 2.0)], dtype=object),
        "target": np.array(["None", {1: "a"}], dtype=object),
    }
    made = Rollouts.scored(shown(2), rollout([1, 1], [1], 2), np.zeros(2), infos)
    assert [record["prediction"] for record in made.records] == [None, [1.0, 2.0]]
    assert [record["target"] for record in made.records] == ["None", {"1": "a"}]
