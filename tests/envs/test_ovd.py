from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from conftest import shared
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlmenv.core.answers import Detection, write_detections
from vlmenv.core.coordinates import ResizeRule
from vlmenv.core.errors import DataError
from vlmenv.core.formats import AnswerFormat
from vlmenv.envs.ovd import OVDEnv

write = AnswerFormat.TAGS.write


def test_gymnasiums_checker_is_content(recwarn: pytest.WarningsRecorder) -> None:
    check_env(gymnasium.make("VLM-OVD-v0", render_mode="rgb_array").unwrapped)
    assert all("shows nothing here" in str(one.message) for one in recwarn.list)  # there may be no display


def test_the_truth_scores_the_maximum_in_every_convention() -> None:
    cases = (("original", None, 1 - 1e-12), ("norm1000", None, 0.99), ("resized", ResizeRule(), 0.85))
    for coordinates, resize, least in cases:
        env = OVDEnv(coordinates=coordinates, resize=resize)
        for index in range(15):
            env.reset(options={"index": index})
            _, _, _, _, info = env.step(env.write_answer(env.source.get(index)))
            assert info["rewards"]["od_length"] >= least
            assert info["rewards"]["format"] == 1


@pytest.mark.parametrize("name", ["tinycoco", "bccd"])
def test_real_photos_load_and_their_truth_scores_the_maximum(name: str) -> None:
    env = OVDEnv(dataset=shared(f"data/ovd/{name}/samples.jsonl"))
    check_env(env)
    assert env.source.size == {"tinycoco": 27, "bccd": 8}[name]
    empty = 0
    for index in range(env.source.size):
        observation, _ = env.reset(options={"index": index})
        assert "detect the following objects" in observation["prompt"]
        _, reward, _, _, info = env.step(env.write_answer(env.source.get(index)))
        assert reward == pytest.approx(1.1)
        empty += not info["target"]
    assert empty == {"tinycoco": 5, "bccd": 0}[name]


def test_scenes_ask_for_what_is_there_and_what_is_not() -> None:
    env, absent = OVDEnv(), 0
    for index in range(60):
        sample = env.source.get(index)
        asked = sample.question.removeprefix("Detect all of these: ").removesuffix(".").split(", ")
        found = {one.label for one in sample.target}
        assert found <= set(asked)
        absent += not found
    assert 0 < absent < 30


@pytest.mark.slow
def test_tricks_do_not_pay() -> None:
    """Ceilings for answers that game a reward, averaged over scenes."""
    env = OVDEnv()
    kinds = ("circle", "square", "triangle", "star")
    whole = (0.0, 0.0, 96.0, 96.0)
    places = [8.0 * i for i in range(10)]
    rewards: dict[str, list[float]] = {}
    for index in range(100):
        sample, other = env.source.get(index), env.source.get(index + 1)
        truth = env.target(sample)
        answers = {
            "whole image": [Detection(kind, whole) for kind in kinds],
            "every label on each box": [Detection(kind, one.box) for one in truth for kind in kinds],
            "box spam": [*truth, *truth * 19],
            "another scene's truth": list(env.target(other)),
            "every label at every place": [
                Detection(kind, (x, y, x + 24.0, y + 24.0)) for kind in kinds for x in places for y in places
            ],
            "truth": list(truth),
        }
        for name, detections in answers.items():
            score = env.score(write(write_detections(detections)), sample)
            if truth:
                rewards.setdefault(name, []).append(score.terms["od_length"])
    means = {name: float(np.mean(values)) for name, values in rewards.items()}
    assert means["truth"] == 1
    assert means["whole image"] < 0.01
    assert means["every label at every place"] < 0.01
    assert means["every label on each box"] < 0.3
    assert means["box spam"] == pytest.approx(1 / 20)
    assert means["another scene's truth"] < 0.05


def test_measures() -> None:
    env = OVDEnv()
    a, b = Detection("cat", (0.0, 0.0, 10.0, 10.0)), Detection("dog", (20.0, 20.0, 40.0, 40.0))
    measured = env.measure(write(write_detections([a, a])), (a, b), {})
    assert (measured["boxes/matched"], measured["boxes/answered"], measured["boxes/true"]) == (1, 2, 2)
    assert env.measure(write("None"), (), {})["image_ap/mean"] == 1
    assert env.measure("hm", (a,), {})["unparsable"] == 1


@given(st.text(st.characters()))
def test_any_text_is_an_action(text: str) -> None:
    env = OVDEnv(rewards=dict.fromkeys(OVDEnv.terms, 1.0))
    env.reset(options={"index": 0})
    _, reward, _, _, _ = env.step(f"<think>{text}</think><answer>{text}</answer>")
    assert -1 <= reward <= 5


def test_the_number_of_boxes_is_told() -> None:
    """Per true box, without crowds and what lies within them; where there is none, there is no such number."""
    cat, dog = (Detection(label, (20.0 * i, 0.0, 20.0 * i + 10, 10.0)) for i, label in enumerate(("cat", "dog")))
    crowd = Detection("cat", (100.0, 100.0, 200.0, 200.0), crowd=True)
    inside = Detection("cat", (110.0, 110.0, 120.0, 120.0))
    env = OVDEnv()
    told = [env.traits(answer, (cat, dog)) for answer in ((cat,), (cat, cat, dog), (), None)]
    assert [one["box_ratio"] for one in told] == [0.5, 1.5, 0, 0]
    assert env.traits((cat, inside), (cat, crowd)) == {"box_ratio": 1}
    assert env.traits((cat,), ()) == env.traits((cat,), (crowd,)) == {}


def test_a_position_without_a_label_is_no_true_detection() -> None:
    row = {
        "images": [Image.new("RGB", (64, 48))],
        "problem": "Detect dogs.",
        "solution": "[{'Position': [1, 2, 30, 40]}]",
    }
    with pytest.raises(DataError, match="neither a list"):
        gymnasium.make("VLM-OVD-v0", dataset=[row])
