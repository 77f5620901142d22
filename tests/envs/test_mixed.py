"""Several tasks in one vector environment."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vlmenv.core.errors import ConfigError, SampleError
from vlmenv.envs.making import make_envs
from vlmenv.envs.mixed import MixedVectorEnv, by_task, merged_infos
from vlmenv.envs.vector import VisualTaskVectorEnv

WEIGHTS = {"VLM-REC-v0": 2.0, "VLM-VQA-v0": 1.0}


def tasks(groups: int = 4, **arguments: Any) -> dict[str, VisualTaskVectorEnv]:
    return {name: make_envs(name, 2 * groups, group_size=2, **arguments) for name in WEIGHTS}


def counts(infos: dict[str, Any]) -> list[int]:
    """Groups of each task."""
    return [int((infos["mix_task"] == name).sum()) // 2 for name in WEIGHTS]


def sequence(envs: MixedVectorEnv, resets: int, **first: Any) -> list[tuple[str, int]]:
    """Task and index of each environment, reset after reset."""
    shown: list[tuple[str, int]] = []
    for number in range(resets):
        _, infos = envs.reset(**(first if number == 0 else {}))
        shown += zip(infos["mix_task"].tolist(), infos["index"].tolist(), strict=True)
        envs.step([""] * envs.num_envs)
    return shown


@pytest.mark.parametrize("weights", [(2.0, 1.0), (0.3, 0.7), (1.0, 0.04), (1e9, 1.0)])
def test_groups_follow_the_weights_over_the_resets(weights: tuple[float, float]) -> None:
    """Each task is within a group of its share after every reset, also one whose share of a reset is below one."""
    envs = MixedVectorEnv(tasks(), dict(zip(WEIGHTS, weights, strict=True)))
    total, shares = np.zeros(2), np.array(weights) / sum(weights)
    for number in range(1, 31):
        _, infos = envs.reset(seed=0 if number == 1 else None)
        total += counts(infos)
        assert total.sum() == 4 * number
        assert (abs(total - 4 * number * shares) <= 1).all()


def test_each_task_scores_its_own_and_has_its_own_terms_alone() -> None:
    envs, alone = MixedVectorEnv(tasks(answers=True), WEIGHTS), tasks()
    observations, shown = envs.reset(seed=3)
    texts = [answer if i % 3 else "no" for i, answer in enumerate(shown["answer"])]
    _, rewards, ended, _, infos = envs.step(texts)
    assert ended.all()
    assert set(rewards.tolist()) > {0.0}
    begin = 0
    for name, count in zip(WEIGHTS, counts(infos), strict=True):
        rows = slice(begin, begin + 2 * count)
        alone[name].show_groups(count)
        own, _ = alone[name].reset(options={"index": infos["index"][rows][::2]})
        assert own["prompt"] == observations["prompt"][rows]
        _, expected, _, _, found = alone[name].step(texts[rows])
        np.testing.assert_array_equal(rewards[rows], expected)
        for term, values in found["rewards"].items():
            np.testing.assert_array_equal(infos["rewards"][term][rows], values)
        absent = [one for one in infos["rewards"] if not one.startswith("_") and one not in found["rewards"]]
        assert absent
        assert not any(infos["rewards"][f"_{one}"][rows].any() for one in absent)
        begin += 2 * count


def test_a_state_goes_on_and_skipped_resets_are_as_if_shown() -> None:
    whole = MixedVectorEnv(tasks(), WEIGHTS)
    expected = sequence(whole, 3, seed=5)
    state = whole.state_dict()
    rest = sequence(whole, 3)
    assert set(rest).isdisjoint(expected)
    for options in ({"state": state}, {"skip": 3}):
        assert sequence(MixedVectorEnv(tasks(), WEIGHTS), 3, seed=5, options=options) == rest
    assert sequence(MixedVectorEnv(tasks(), WEIGHTS), 3, seed=6) != expected


def test_ranks_show_the_same_numbers_and_different_samples() -> None:
    """Also where a task's share changes from reset to reset."""
    ranks = [MixedVectorEnv(tasks(shard=shard, num_shards=2), WEIGHTS) for shard in (0, 1)]
    shown = [sequence(envs, 6, seed=0) for envs in ranks]
    names = [[name for name, _ in own] for own in shown]
    assert names[0] == names[1]
    assert set(shown[0]).isdisjoint(shown[1])
    assert len(set(shown[0])) == 6 * 4


def test_a_task_of_less_than_a_group_a_reset_waits_for_its_turn() -> None:
    envs = MixedVectorEnv(tasks(1), WEIGHTS)
    names = [name for name, _ in sequence(envs, 6, seed=0)[::2]]
    assert names == ["VLM-REC-v0", "VLM-VQA-v0", "VLM-REC-v0"] * 2


def test_a_sample_is_replaced_and_named_by_its_task() -> None:
    envs = MixedVectorEnv(tasks(), WEIGHTS)
    envs.tasks["VLM-VQA-v0"].task.skip_broken = True
    _, before = envs.reset(seed=0)
    last = envs.num_envs - 1
    lost = int(before["index"][last])
    _, after = envs.reset(options={"replace": {last: "too long"}})
    assert (envs.skips_broken, list(envs.skipped)) == (True, [f"VLM-VQA-v0/{lost}"])
    assert counts(after) == counts(before)
    assert after["index"][:-2].tolist() == before["index"][:-2].tolist()
    assert lost not in after["index"]
    refusing = MixedVectorEnv(tasks(), WEIGHTS)
    refusing.reset(seed=0)
    with pytest.raises(SampleError, match="too long"):
        refusing.reset(options={"replace": {last: "too long"}})


def test_a_task_of_one_turn_waits_for_one_of_several() -> None:
    each = {name: make_envs(name, 4, group_size=2, answers=True) for name in ("VLM-Zoom-v0", "VLM-VQA-v0")}
    envs = MixedVectorEnv(each, dict.fromkeys(each, 1.0))
    _, infos = envs.reset(seed=0)
    rewards, ended = [], np.zeros(4, dtype=bool)
    while not ended.all():
        _, reward, terminated, truncated, infos = envs.step([answer or "" for answer in infos["answer"]])
        rewards.append(reward)
        ended = terminated | truncated
        assert ended[2:].all()
        assert infos["mix_task"].tolist() == ["VLM-Zoom-v0"] * 2 + ["VLM-VQA-v0"] * 2
    assert envs.max_turns >= len(rewards) > 1
    assert (rewards[0][2:] > 0).all()
    assert (np.sum(rewards[1:], axis=0)[2:] == 0).all()
    assert (np.sum(rewards, axis=0)[:2] > 0).all()
    with pytest.raises(RuntimeError, match="reset"):
        envs.step([""] * 4)


def test_what_a_mix_cannot_do_is_told() -> None:
    envs = MixedVectorEnv(tasks(1), WEIGHTS)
    with pytest.raises(RuntimeError, match="reset"):
        envs.step(["", ""])
    envs.reset(seed=0)
    with pytest.raises(ValueError, match="2 texts"):
        envs.step(["one"])
    with pytest.raises(ConfigError, match="knows no option index"):
        envs.reset(options={"index": [0]})
    with pytest.raises(ConfigError, match="a single seed"):
        envs.reset(seed=[1])
    with pytest.raises(ConfigError, match="finite and above 0"):
        MixedVectorEnv(tasks(1), dict.fromkeys(WEIGHTS, 0.0))
    uneven = tasks(1) | {"VLM-VQA-v0": make_envs("VLM-VQA-v0", 4, group_size=2)}
    with pytest.raises(ConfigError, match="equal num_envs"):
        MixedVectorEnv(uneven, WEIGHTS)


def test_infos_side_by_side_are_masked_where_they_lack_a_key() -> None:
    a = {"x": np.array([1.5]), "_x": np.array([True]), "in": {"y": np.array([2]), "_y": np.array([True])}}
    merged = merged_infos([(a | {"_in": np.array([True])}, 1), ({"z": np.array(["t"]), "_z": np.array([True])}, 1)])
    assert merged["x"].tolist() == [1.5, 0.0]
    assert [merged[name].tolist() for name in ("_x", "_in", "_z")] == [[True, False], [True, False], [False, True]]
    assert merged["in"]["_y"].tolist() == [True, False]
    single = make_envs("VLM-REC-v0", 2)
    assert by_task(single) == {"": single}
    assert by_task(None) == {}
