from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from broken_rows import write_rows
from gymnasium.vector import AutoresetMode
from test_dataset import row, write

from vlmenv.core.errors import ConfigError, DataError, SampleError
from vlmenv.envs.data.scenes import ReferringScenes, Split
from vlmenv.envs.data.source import Sample, Source
from vlmenv.envs.rec import RECEnv
from vlmenv.envs.vector import VisualTaskVectorEnv

ANSWER = "<think>t</think><answer>[20,20,60,60]</answer>"


def make(num_envs: int, **arguments: Any) -> Any:
    return gymnasium.make_vec("VLM-REC-v0", num_envs=num_envs, **arguments)


def test_groups_are_neighbouring_copies_that_share_their_images() -> None:
    envs = make(64, group_size=8)
    observations, infos = envs.reset(seed=0)
    assert envs.observation_space.contains(observations)
    assert envs.metadata["autoreset_mode"] is AutoresetMode.DISABLED
    assert len(set(infos["id"])) == 8
    for start in range(0, 64, 8):
        assert len(set(infos["id"][start : start + 8])) == 1
        assert len({id(images[0]) for images in observations["images"][start : start + 8]}) == 1


def test_it_agrees_with_single_environments_and_gymnasiums_own_vectors(tmp_path: Path) -> None:
    envs = make(6)
    observations, infos = envs.reset(seed=5)
    answers = [ANSWER, "None", "", "<answer>None</answer>", "<answer>[1,2,3]</answer>", ANSWER]
    ours = envs.step(answers)
    single = gymnasium.make("VLM-REC-v0")
    for i, index in enumerate(infos["index"]):
        observation, _ = single.reset(options={"index": index})
        np.testing.assert_equal(observation["images"], observations["images"][i])
        _, reward, _, _, info = single.step(answers[i])
        assert reward == ours[1][i]
        assert info["prediction"] == ours[4]["prediction"][i]
    file = write(tmp_path, row())  # the one sample that all of them show
    answers[5] = "<answer>[1,2,3,4]</answer>"
    envs = make(6, dataset=file)
    envs.reset(seed=5)
    ours = envs.step(answers)
    for mode, extra in (("sync", {}), ("async", {"shared_memory": False})):
        theirs = make(6, vectorization_mode=mode, vector_kwargs=extra, dataset=file)
        theirs.reset(seed=5)
        step = theirs.step(answers)
        assert theirs.observation_space.contains(step[0])
        np.testing.assert_equal(step[1:], ours[1:])
        theirs.close()


def test_the_order_of_samples_does_not_depend_on_the_number_of_environments() -> None:
    def shown(num_envs: int, resets: int) -> list[int]:
        envs = make(num_envs)
        indices = list(envs.reset(seed=9)[1]["index"])
        for _ in range(resets - 1):
            indices += list(envs.reset()[1]["index"])
        return indices

    assert shown(12, 1) == shown(4, 3) == shown(1, 12)


def test_shards_divide_the_order_among_processes(tmp_path: Path) -> None:
    file = write(tmp_path, *(row(id=i) for i in range(8)))
    together = make(4, dataset=file)
    parts = [make(2, dataset=file, shard=i, num_shards=2) for i in range(2)]
    for seed in (1, None):
        whole = list(together.reset(seed=seed)[1]["id"])
        assert whole == [name for part in parts for name in part.reset(seed=seed)[1]["id"]]


@pytest.mark.parametrize(("shard", "num_shards"), [(0, 1), (0, 2), (1, 2)])
def test_an_order_can_be_taken_up_in_its_middle(shard: int, num_shards: int) -> None:
    envs = make(4, group_size=2, shard=shard, num_shards=num_shards)
    whole = [list(envs.reset(seed=3)[1]["index"])] + [list(envs.reset()[1]["index"]) for _ in range(3)]
    again = make(4, group_size=2, shard=shard, num_shards=num_shards)
    assert [list(again.reset(seed=3, options={"skip": 2})[1]["index"]), list(again.reset()[1]["index"])] == whole[2:]


def test_samples_are_loaded_by_several_threads() -> None:
    """Two loads that wait for one another: one after the other they would break the barrier."""
    barrier = threading.Barrier(2)

    class Waiting(RECEnv):
        def builtin_source(self, split: Split) -> Source:
            return WaitingScenes(split)

    class WaitingScenes(ReferringScenes):
        def get(self, index: int) -> Sample:
            barrier.wait(timeout=30)
            return super().get(index)

    envs = VisualTaskVectorEnv(Waiting, 4, group_size=2)
    _, infos = envs.reset(options={"index": [3, 4]})
    assert infos["index"].tolist() == [3, 3, 4, 4]


def test_given_samples_can_be_shown() -> None:
    envs = make(4, group_size=2, split="eval")
    _, infos = envs.reset(options={"index": [11, 12]})
    assert infos["id"].tolist() == ["scene-eval-11"] * 2 + ["scene-eval-12"] * 2
    with pytest.raises(ConfigError, match="wants 2 indices"):
        envs.reset(options={"index": [1]})
    with pytest.raises(ConfigError, match="no option mask"):
        envs.reset(options={"mask": [1]})


def test_all_episodes_are_reset_together() -> None:
    envs = make(2)
    envs.reset(seed=0)
    _, _, terminated, truncated, _ = envs.step([ANSWER, ANSWER])
    envs.reset(options={"reset_mask": terminated | truncated})
    envs.step([ANSWER, ANSWER])
    with pytest.raises(ConfigError, match="True for all 2"):
        envs.reset(options={"reset_mask": np.array([True, False])})


def test_targets_and_predictions_may_be_of_any_type() -> None:
    """A task whose truth is 3 in one row and 2.5 in another, and whose answers are numbers or nothing."""

    class Numbers(RECEnv):
        def target(self, sample: Sample) -> Any:
            return 3 if sample.id.endswith("-0") else 2.5

        def parse(self, text: str) -> Any:
            return float(text) if text else None

    def always(text: str, target: object) -> float:
        return 1.0

    envs = VisualTaskVectorEnv(Numbers, 2, rewards={always: 1.0})
    envs.reset(options={"index": [0, 1]})
    _, _, _, _, infos = envs.step(["1.5", ""])
    assert infos["prediction"].tolist() == [1.5, None]
    assert infos["target"].tolist() == [3, 2.5]


def test_a_sample_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    envs = make(1, dataset=write(tmp_path, row()))
    with pytest.raises(ConfigError, match="no sample 1"):
        envs.reset(options={"index": [1]})


@pytest.mark.parametrize(("num_envs", "group_size"), [(6, 4), (4, 8), (4, 0)])
def test_a_group_size_that_does_not_divide_is_refused(num_envs: int, group_size: int) -> None:
    with pytest.raises(ConfigError, match=f"group_size={group_size} does not divide num_envs={num_envs}"):
        make(num_envs, group_size=group_size)


def test_each_step_wants_a_reset_and_a_text_per_environment() -> None:
    envs = make(2)
    with pytest.raises(RuntimeError, match="reset"):
        envs.step([ANSWER, ANSWER])
    envs.reset(seed=0)
    with pytest.raises(ValueError, match="2 texts"):
        envs.step([ANSWER])
    envs.step([ANSWER, ANSWER])
    with pytest.raises(RuntimeError, match="reset"):
        envs.step([ANSWER, ANSWER])


def test_pictures() -> None:
    envs = make(4, group_size=2, render_mode="rgb_array")
    envs.reset(seed=0)
    envs.step([ANSWER, "", ANSWER, ""])
    pictures = envs.render()
    assert len(pictures) == 4
    assert not np.array_equal(pictures[0], pictures[1])


def test_samples_that_teach_nothing_are_passed_over(tmp_path: Path) -> None:
    """Those whose answers earned the same when they were last shown; but never so many that none is left."""
    file = write(tmp_path, *(row(id=i) for i in range(8)))
    envs = make(8, group_size=2, dataset=file, revisit=0.0)
    right, wrong = "<think>x</think><answer>[1, 2, 3, 4]</answer>", "none"
    shown = []
    for seed in (5, *[None] * 5):
        _, infos = envs.reset(seed=seed)
        shown.append(list(infos["index"][::2]))
        teaches = [index < 3 for index in shown[-1]]  # the answers to the others are all right
        envs.step([text for good in teaches for text in (right, wrong if good else right)])
    assert sorted(shown[0] + shown[1]) == list(range(8))
    later = [index for batch in shown[2:] for index in batch]
    assert {index for index in later if index < 3} == {0, 1, 2}
    assert sum(index < 3 for index in later) > len(later) / 2
    assert len(later) == 16  # though no more than three teach anything


@pytest.mark.slow
@pytest.mark.parametrize("revisit", [0.5, 1.0])
def test_settled_samples_keep_a_chance(revisit: float, tmp_path: Path) -> None:
    file = write(tmp_path, *(row(id=i) for i in range(400)))
    envs = make(400, group_size=2, dataset=file, revisit=revisit)
    envs.reset(seed=0)
    envs.step(["none"] * 400)
    first = set(envs.reset()[1]["index"])
    envs.step(["none"] * 400)
    again = envs.reset()[1]["index"][::2]  # the second epoch; all are settled
    seen = envs.state_dict()["taken"] - 400
    assert len(first) == len(again) == 200
    assert seen == pytest.approx(200 / revisit, rel=0.15)


def test_what_is_known_of_samples_can_be_taken_up(tmp_path: Path) -> None:
    file = write(tmp_path, *(row(id=i) for i in range(12)))
    rng = np.random.default_rng(0)
    envs, again = (make(8, group_size=2, dataset=file, revisit=0.3) for _ in range(2))
    answers = [["none" if x < 0.7 else "<answer>[1, 2, 3, 4]</answer>" for x in rng.random(8)] for _ in range(9)]
    envs.reset(seed=2)
    for texts in answers[:5]:
        envs.step(texts)
        state = envs.state_dict()
        expected = list(envs.reset()[1]["index"])
    assert state["settled"]
    assert list(again.reset(seed=2, options={"state": state})[1]["index"]) == expected
    for texts in answers[5:]:
        envs.step(texts)
        again.step(texts)
        assert list(envs.reset()[1]["index"]) == list(again.reset()[1]["index"])
        assert envs.state_dict() == again.state_dict()


@pytest.mark.parametrize("revisit", [-0.1, 1.1, float("nan")])
def test_a_chance_of_revisiting_is_a_chance(revisit: float, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a chance from 0 to 1"):
        make(2, dataset=write(tmp_path, row()), revisit=revisit)
    with pytest.raises(ConfigError, match="of the built-in samples none is seen twice"):
        make(2, revisit=0.5)


def test_a_sample_that_cannot_be_shown_gives_way_to_the_next(tmp_path: Path) -> None:
    """As if it had not been there: found out at once or later, and by whichever group."""
    envs = make(6, group_size=2, dataset=write_rows(tmp_path), skip_broken=True)
    shown = [envs.reset(seed=seed)[1]["id"] for seed in (3, *[None] * 6)]
    assert list(envs.skipped) == [2]
    assert envs.skipped[2].startswith(f"{tmp_path / 'rows.jsonl'}:4 (id 2): {tmp_path / 'half.jpg'} cannot be read")
    ids = np.concatenate([one[::2] for one in shown])
    np.testing.assert_array_equal(ids, np.concatenate([one[1::2] for one in shown]))  # all of a group show the same
    assert sorted(ids[:11], key=int) == [str(i) for i in range(12) if i != 2]
    again = [envs.reset(seed=seed)[1]["id"] for seed in (3, *[None] * 6)]  # now that it is known
    np.testing.assert_array_equal(shown, again)


def test_a_sample_that_an_agent_cannot_take_is_replaced(tmp_path: Path) -> None:
    envs, other = (make(6, group_size=2, dataset=write_rows(tmp_path), skip_broken=True) for _ in range(2))
    first = envs.reset(seed=3)[1]["id"][::2]
    infos = envs.reset(options={"replace": {3: "too long"}})[1]
    left = infos["id"][::2]
    assert list(left[:2]) == [first[0], first[2]]
    assert left[2] not in first
    assert envs.skipped[int(first[1])].endswith(f"(id {first[1]}): too long")
    after = [envs.reset()[1]["id"] for _ in range(7)]
    assert not any(first[1] in ids for ids in after)
    other.reset(seed=3)
    other.reset(options={"replace": {2: "too long"}})
    np.testing.assert_array_equal([other.reset()[1]["id"] for _ in range(7)], after)
    rewards = envs.step(["<answer>[1, 2, 30, 40]</answer>"] * 6)[1]
    assert (rewards >= 1).all()


def test_what_was_skipped_can_be_taken_up(tmp_path: Path) -> None:
    envs, again = (make(3, dataset=write_rows(tmp_path), skip_broken=True) for _ in range(2))
    for seed in (1, None, None, None):
        envs.reset(seed=seed)
    envs.reset(options={"replace": {1: "too long"}})
    state = envs.state_dict()
    assert len(state["skipped"]) == 2
    expected = [list(envs.reset()[1]["id"]) for _ in range(6)]
    found = [again.reset(seed=1, options={"state": state})[1]["id"], *(again.reset()[1]["id"] for _ in range(5))]
    np.testing.assert_array_equal(found, expected)
    assert again.state_dict() == envs.state_dict()


def test_a_sample_that_cannot_be_shown_is_refused(tmp_path: Path) -> None:
    """Unless such are to be left out; and where none is left it is an error too."""
    envs = make(12, dataset=write_rows(tmp_path))
    with pytest.raises(SampleError, match=r"rows\.jsonl:4 \(id 2\): .*half\.jpg cannot be read") as caught:
        envs.reset(seed=0)
    assert caught.value.index == 2
    envs.reset(options={"index": [0] * 12})
    with pytest.raises(SampleError, match=r"rows\.jsonl:2 \(id 0\): too long"):
        envs.reset(options={"replace": {0: "too long"}})
    for image in ("whole.png", "long.png"):
        (tmp_path / image).write_bytes(b"")
    envs = make(4, dataset=tmp_path / "rows.jsonl", skip_broken=True)
    with pytest.raises(DataError, match="none of the data set's 12 samples can be shown"):
        envs.reset(seed=0)
    env = RECEnv(dataset=tmp_path / "rows.jsonl", skip_broken=True)
    with pytest.raises(DataError, match="none of the data set's 12 samples can be shown"):
        env.reset(seed=0)


def test_a_single_environment_passes_over_what_cannot_be_shown(tmp_path: Path) -> None:
    env = RECEnv(dataset=write_rows(tmp_path), skip_broken=True)
    ids = [env.reset(seed=seed)[1]["id"] for seed in (0, *[None] * 10)]
    assert sorted(map(int, ids)) == [i for i in range(12) if i != 2]
    with pytest.raises(SampleError, match=r"\(id 2\)"):
        env.reset(options={"index": 2})


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda envs: pickle.loads(pickle.dumps(envs))])
def test_copies_go_on_from_where_the_environments_are(copied: Callable[[Any], Any]) -> None:
    """Also those that are sent to another process."""
    envs = make(4, group_size=2)
    envs.reset(seed=3)
    other = copied(envs)
    envs.close()
    rewards = other.step([ANSWER] * 4)[1]
    same = make(4, group_size=2)
    same.reset(seed=3)
    assert rewards.tolist() == same.step([ANSWER] * 4)[1].tolist()
    assert other.reset()[1]["id"].tolist() == same.reset()[1]["id"].tolist()


def test_closed_environments_say_so() -> None:
    envs = make(2)
    envs.reset(seed=0)
    envs.close()
    envs.close()  # twice does no harm
    for use in (lambda: envs.reset(seed=0), lambda: envs.reset(options={"index": [0, 1]}), lambda: envs.step(["", ""])):
        with pytest.raises(ConfigError, match=r"closed: make new ones by gymnasium\.make_vec"):
            use()


def test_large_seeds_are_seeds() -> None:
    assert make(2).reset(seed=2**64)[1]["id"].tolist() != make(2).reset(seed=0)[1]["id"].tolist()
