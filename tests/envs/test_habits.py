"""What users of Gymnasium expect of an environment: seeds, ways to render, registration, a name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from typing import Any

import gymnasium
import matplotlib
import numpy as np
import pytest

import vlmenv
from vlmenv.core.errors import ConfigError

ENV = "VLM-REC-v0"
SEEDS = [3, 4, 3, 9]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_all_ways_to_vectorise_show_the_same_samples_for_a_seed(mode: str) -> None:
    unshared = {"vector_kwargs": {"shared_memory": False}} if mode == "async" else {}
    plain = gymnasium.make_vec(ENV, num_envs=4, vectorization_mode=mode, **unshared)
    batched = gymnasium.make_vec(ENV, num_envs=4)
    (one, own), (other, ours) = plain.reset(seed=list(SEEDS)), batched.reset(seed=SEEDS)  # type: ignore[arg-type]
    assert one["prompt"] == other["prompt"]
    assert all(map(np.array_equal, one["images"], other["images"]))
    np.testing.assert_array_equal(own["index"], ours["index"])
    single = gymnasium.make(ENV)
    assert [single.reset(seed=seed)[1]["index"] for seed in SEEDS] == ours["index"].tolist()
    plain.close()
    batched.close()


def test_seeds_are_for_groups() -> None:
    envs = gymnasium.make_vec(ENV, num_envs=6, group_size=2)
    _, infos = envs.reset(seed=[5, 6, 7])  # type: ignore[arg-type]
    assert [len(set(infos["index"][start : start + 2])) for start in (0, 2, 4)] == [1, 1, 1]
    assert len(set(infos["index"])) == 3
    with pytest.raises(ConfigError, match="3 seeds, one per group"):
        envs.reset(seed=[5, 6])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no other option"):
        envs.reset(seed=[5, 6, 7], options={"index": [0, 1, 2]})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": "56"}, "a seed is a whole number, not '5'"),
        ({"seed": [5.7, 6]}, "a seed is a whole number, not 5.7"),
        ({"seed": [5, None]}, "a seed is a whole number, not None"),
        ({"options": {"index": 3}}, "reset wants 2 indices, one per group, not 3"),
        ({"options": {"index": [True, 3]}}, "a sample's index is a whole number, not True"),
        ({"seed": 0, "options": {"skip": 1.5}}, "skip is a number of batches, not 1.5"),
        ({"seed": 0, "options": {"skip": -1}}, "skip is a number of batches, not -1"),
    ],
)
def test_what_chooses_no_samples_is_told(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        gymnasium.make_vec(ENV, num_envs=4, group_size=2).reset(**arguments)


@pytest.mark.parametrize("index", [True, 1.0, "1", None])
def test_an_index_is_a_whole_number(index: Any) -> None:
    with pytest.raises(ConfigError, match=f"a sample's index is a whole number, not {index!r}"):
        gymnasium.make(ENV).reset(options={"index": index})


def test_later_resets_go_on_in_their_order() -> None:
    one, other = (gymnasium.make_vec(ENV, num_envs=2) for _ in range(2))
    for envs in (one, other):
        envs.reset(seed=1)
    one.reset(seed=[8, 9])  # type: ignore[arg-type]
    np.testing.assert_array_equal(one.reset()[1]["index"], other.reset()[1]["index"])


def test_text_is_rendered() -> None:
    env: Any = gymnasium.make(ENV, render_mode="ansi", system_prompt="Look \x1b[31mtwice.")
    observation, _ = env.reset(seed=0)
    asked = env.render()
    assert asked.splitlines()[0] == "system: Look \\x1b[31mtwice."
    assert asked.endswith(observation["prompt"].splitlines()[-1])
    env.step("<answer>[1, 2, 3, 4]</answer>\r")
    told = env.render().splitlines()
    assert told[-3] == "answer: <answer>[1, 2, 3, 4]</answer>\\r"
    assert told[-2].startswith("reward: 0")
    assert "iou 0" in told[-2]
    assert told[-1].startswith("truth: (")
    env.reset(seed=0)
    assert env.render() == asked


def test_a_vector_environment_renders_pictures_alone() -> None:
    with pytest.raises(ConfigError, match="single environment"):
        gymnasium.make_vec(ENV, num_envs=2, render_mode="ansi")


def test_without_a_display_it_is_told_that_there_is_no_window() -> None:
    matplotlib.use("agg")
    env = gymnasium.make(ENV, render_mode="human")
    with pytest.warns(RuntimeWarning, match="shows nothing here: matplotlib's backend agg"):
        env.reset(seed=0)
    with warnings.catch_warnings(action="error"):
        env.step("")
        env.close()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("Xvfb") is None, reason="needs Xvfb, a display without a screen")
def test_a_window_follows() -> None:
    pytest.importorskip("tkinter")
    code = (
        "import gymnasium, vlmenv; from matplotlib import pyplot\n"
        f"env = gymnasium.make({ENV!r}, render_mode='human')\n"
        "env.reset(seed=0); asked = pyplot.gca().images[0].get_array().copy()\n"
        "env.step('<answer>[1, 2, 60, 70]</answer>'); answered = pyplot.gca().images[0].get_array()\n"
        "print(asked.shape, (asked != answered).any(), 'reward' in pyplot.gca().get_title('left'), env.render())\n"
        "env.close(); print(pyplot.get_fignums())\n"
    )
    display = f":{200 + os.getpid() % 20_000}"
    with subprocess.Popen(["Xvfb", display, "-screen", "0", "800x600x24"], stderr=subprocess.DEVNULL) as screen:
        try:
            told = {**os.environ, "DISPLAY": display, "MPLBACKEND": "tkagg"}
            done = subprocess.run([sys.executable, "-c", code], env=told, capture_output=True, text=True, check=False)
        finally:
            screen.terminate()
    assert done.stdout.splitlines() == ["(384, 384, 3) True True None", "[]"], done.stderr


def test_the_package_registers_itself() -> None:
    gymnasium.register_envs(vlmenv)
    assert ENV in gymnasium.registry


def test_a_task_says_what_it_is() -> None:
    env = gymnasium.make("VLM-OVD-v0", coordinates="norm1000").unwrapped
    assert repr(env).startswith("OVDEnv(rewards={")
    assert repr(env).endswith("coordinates='norm1000')")
