"""Reward terms of one's own by name: registered ones, and those in a module."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gymnasium
import pytest

from vlmenv.core.errors import ConfigError
from vlmenv.envs import BatchTerm, register_reward
from vlmenv.envs.rec import RECEnv
from vlmenv.envs.rewards import registry

MODULE = """
from vlmenv.envs import BatchTerm

def brevity(text, target, count_tokens):
    return 1 / (1 + count_tokens(text))

def iou(text, target):
    return 0.5

class Half(BatchTerm):
    name = "half"
    def batch(self, texts, targets, images, answer_format):
        return [0.5] * len(texts)

half, number = Half(), 3
"""


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
    (tmp_path / "own_rewards.py").write_text(MODULE)


def terms(name: str, rewards: dict[Any, float], text: str = "a b c") -> tuple[float, dict[str, float]]:
    env = gymnasium.make(name, rewards=rewards)
    env.reset(seed=0)
    _, reward, _, _, info = env.step(text)
    return float(reward), info["rewards"]


@pytest.mark.usefixtures("module")
def test_a_function_is_named_with_its_module() -> None:
    rewards = {"format": 1.0, "own_rewards:brevity": 2.0, "own_rewards:half": 4.0}
    reward, told = terms("VLM-REC-v0", rewards)
    assert told == {"format": 0.0, "brevity": 0.25, "half": 0.5}
    assert reward == 2.5
    envs = gymnasium.make_vec("VLM-VQA-v0", num_envs=2, rewards={"own_rewards:half": 1.0})
    envs.reset(seed=0)
    assert envs.step(["a", "b"])[1].tolist() == [0.5, 0.5]


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ({"own_rewards:brevty": 1}, "'own_rewards:brevty': unknown name in module own_rewards 'brevty'. Did you mean"),
        ({"own_reward:brevity": 1}, "there is no module 'own_reward'"),
        ({"own_rewards:number": 1}, "'own_rewards:number' is a int"),
        ({"own_rewards:Half": 1}, "is a class: give a function, or an instance"),
        ({"iou": 1, "own_rewards:iou": 1}, "two reward terms have the same name, iou"),
        ({"brevity": 1}, "unknown reward term 'brevity'.*A function of your own is named as module:function"),
        ({"own_rewards:brevity": float("nan")}, "the weight of reward term 'brevity' is nan"),
    ],
)
def test_what_cannot_be_used_is_named(rewards: dict[Any, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        gymnasium.make("VLM-REC-v0", rewards=rewards)


def half(text: str, target: Any) -> float:
    return 0.5


def quarter(text: str, target: Any) -> float:
    return 0.25


def test_a_registered_term_has_a_name_in_every_task() -> None:
    register_reward("own", half)
    for name in ("VLM-REC-v0", "VLM-VQA-v0"):
        assert terms(name, {"format": 1, "own": 2}) == (1.0, {"format": 0.0, "own": 0.5})
    assert terms("VLM-REC-v0", {"iou": 1})[1] == {"iou": 0.0}


def test_a_term_may_be_for_some_tasks_alone() -> None:
    register_reward("own", half, tasks=["VLM-VQA-v0"])

    class Derived(RECEnv):
        pass

    assert terms("VLM-VQA-v0", {"own": 1})[0] == 0.5
    assert terms("VLM-Math-v0", {"own": 1})[0] == 0.5  # which derives from it
    for make in (lambda: gymnasium.make("VLM-REC-v0", rewards={"own": 1}), lambda: Derived(rewards={"own": 1})):
        with pytest.raises(ConfigError, match="unknown reward term 'own'"):
            make()
    register_reward("own", half, tasks=["VLM-REC-v0"])
    assert Derived(rewards={"own": 1}).score("", Derived().source.get(0)).terms == {"own": 0.5}


def test_names_that_clash_are_refused() -> None:
    register_reward("own", half)
    register_reward("own", half)  # as a cell of a notebook that is run again
    with pytest.raises(ConfigError, match=r"'own' is registered already: .*test_registry\.half"):
        register_reward("own", quarter)
    register_reward("iou", half)
    assert terms("VLM-VQA-v0", {"iou": 1})[0] == 0.5
    with pytest.raises(ConfigError, match="the task has a reward term 'iou' of its own"):
        gymnasium.make("VLM-REC-v0", rewards={"iou": 1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a:b", half), "without ':'"),
        (("", half), "by a name"),
        (("a", 3), "is a int"),
        (("a", BatchTerm), "is a class"),
        (("a", half, "VLM-REC-v0"), r"give \['VLM-REC-v0'\]"),
    ],
)
def test_what_is_no_term_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        register_reward(*arguments)


def test_a_term_may_ask_for_the_parsed_answer() -> None:
    def wide(text: str, target: Any, prediction: Any, count_tokens: Any) -> float:
        return 0.0 if prediction is None else prediction[2] - prediction[0] + 100 * (count_tokens(text) == 0)

    assert terms("VLM-REC-v0", {wide: 1}, "<answer>[1,2,30,4]</answer>")[0] == 29
    assert terms("VLM-REC-v0", {wide: 1}, "hm")[0] == 0
