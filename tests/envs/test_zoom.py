"""Zoom, and what holds for every task of several turns."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlmenv.core.coordinates import ResizeRule
from vlmenv.core.errors import ConfigError
from vlmenv.envs.base import VisualTaskEnv
from vlmenv.envs.data.details import SIDES, Detail, Dots
from vlmenv.envs.data.scenes import COLOURS, SHAPES
from vlmenv.envs.data.source import Sample
from vlmenv.envs.episodes import Reply
from vlmenv.envs.selfcheck import self_check
from vlmenv.envs.vector import VisualTaskVectorEnv
from vlmenv.envs.zoom import ZoomEnv, crops_term, pixels_of, read_crop


def answer(content: str) -> str:
    return f"<think></think><answer>{content}</answer>"


def crop_of(*box: float, image: int | None = None) -> str:
    number = {} if image is None else {"image": image}
    return answer(json.dumps({"bbox_2d": box} | number))


def begun(index: int = 0, **arguments: Any) -> tuple[ZoomEnv, Any]:
    env = gymnasium.make("VLM-Zoom-v0", **arguments).unwrapped
    assert isinstance(env, ZoomEnv)
    return env, env.reset(options={"index": index})[0]


class Doubting(VisualTaskEnv):
    """Asks until an answer is "sure"."""

    terms = {"accuracy": lambda text, target: float(text == target), "said": lambda text, target: 1.0}  # noqa: RUF012
    default_rewards = {"accuracy": 1.0, "said": -0.1}  # noqa: RUF012
    prompt_template = "{question}"
    needs_image = False
    turn_terms = ("said",)
    max_turns = 4

    def builtin_source(self, split: Any) -> Any:
        source = Dots(split)
        source.get = lambda index: Sample("a", (), "An <image>?", "sure")  # type: ignore[method-assign]
        return source

    def respond(self, sample: Sample, texts: Sequence[str]) -> Reply | None:
        return None if texts[-1] == "sure" else Reply(f"Sure of {len(texts)}?")


def test_the_truth_scores_one_with_and_without_a_crop() -> None:
    for index in range(6):
        env, _ = begun(index, rewards={"accuracy": 1.0, "crops": -0.25})
        sample = env.source.get(index)
        assert env.step(env.write_answer(sample))[1:4] == (1.0, True, False)
        env.reset(options={"index": index})
        asked = env.write_turn(sample, ())
        observation, reward, terminated, truncated, info = env.step(asked)
        assert (reward, terminated, truncated, info["rewards"]) == (-0.25, False, False, {"crops": 1.0})
        assert len(observation["images"]) == 2
        last = env.step(env.write_turn(sample, (asked,)))
        assert last[1:4] == (1.0, True, False)
        assert last[4]["rewards"] == {"accuracy": 1.0, "crops": 1.0}
        assert last[4]["traits"] == {"turns": 2.0}
        with pytest.raises(gymnasium.error.ResetNeeded):
            env.step("x")
    assert not self_check(env)


def test_dots_are_tiny_have_the_answers_colour_and_lie_within_their_place() -> None:
    for sample in of_kind("tiny", 12):
        cut = place_of(sample)
        near = (np.abs(cut - COLOURS[sample.target.text]).max(axis=2) <= 12).nonzero()
        spans = [int(np.ptp(axis)) + 1 for axis in near]
        assert SIDES[0] <= spans[0] == spans[1] <= SIDES[1]
        assert sample.target.text not in sample.rationale
        assert "dot" in sample.question


def test_other_questions_are_of_the_kind_of_a_shape_which_they_do_not_say() -> None:
    for sample in of_kind("plain", 12):
        cut = place_of(sample)
        colour = next(colour for colour in COLOURS if colour in sample.rationale)
        near = np.abs(cut - COLOURS[colour]).max(axis=2) <= 12
        assert near.any(axis=0).sum() >= cut.shape[1] - 8  # the shape spans its place, the dot aside
        assert sample.target.text in sample.rationale
        assert not set(SHAPES) & set(sample.question.rstrip("?").split())
        assert "dot" not in sample.question


def of_kind(kind: str, count: int) -> list[Detail]:
    samples = [Dots("train").get(index) for index in range(4 * count)]
    found = [sample for sample in samples if sample.subject == kind]
    assert len(found) >= count
    return found[:count]


def place_of(sample: Detail) -> np.ndarray:
    """The pixels of what a question is about."""
    assert sample.place is not None
    left, top, right, bottom = map(int, sample.place)
    return sample.images[0][top:bottom, left:right].astype(int)


def test_a_crop_is_that_part_of_the_full_image_enlarged(tmp_path: Path) -> None:
    picture = np.zeros((300, 400, 3), np.uint8)
    picture[100:150, 200:300] = (200, 0, 0)
    Image.fromarray(picture).save(tmp_path / "a.png")
    row = {"image": "a.png", "question": "<image>Which?", "answer": "red"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    bound = ResizeRule(10, 100, 3000)
    places = {"original": (200, 100, 300, 150), "norm1000": (500, 1000 / 3, 750, 500)}
    for coordinates, box in places.items():
        env, observation = begun(dataset=tmp_path / "rows.jsonl", coordinates=coordinates, image_bound=bound)
        assert max(observation["images"][0].shape) < 80  # the model sees little
        later = env.step(crop_of(*box))[0]
        assert later["images"][0].shape == observation["images"][0].shape
        assert max(later["images"][1].shape) == pytest.approx(max(observation["images"][0].shape), abs=10)
        assert (later["images"][1].reshape(-1, 3) == (200, 0, 0)).all()
        assert later["prompt"].startswith("<image>")
        assert [turn["role"] for turn in later["turns"]] == ["user", "assistant"]
        assert later["turns"][0]["text"].startswith("<image>")


@pytest.mark.parametrize(
    ("box", "size", "expected"),
    [
        ((10.4, 20.6, 90.0, 80.0), (100, 100), (10, 21, 90, 80)),
        ((-50.0, -50.0, 50.0, 200.0), (100, 100), (0, 0, 50, 100)),
        ((50.0, 50.0, 51.0, 51.0), (100, 100), (46, 46, 54, 54)),  # widened to 8 pixels
        ((0.0, 99.5, 80.0, 100.0), (100, 100), (0, 80, 80, 100)),  # and to a quarter of the longer side
        ((0.0, 0.0, 3.0, 2.0), (3, 2), (0, 0, 3, 2)),
        ((100.0, 0.0, 120.0, 50.0), (100, 100), None),
    ],
)
def test_boxes_are_confined_and_widened(box: Any, size: Any, expected: Any) -> None:
    assert pixels_of(box, size) == expected


@given(st.tuples(*[st.floats(-6e4, 6e4)] * 4), st.tuples(st.integers(1, 3000), st.integers(1, 3000)))
def test_every_crop_lies_within_its_image(box: Any, size: tuple[int, int]) -> None:
    if (found := pixels_of(box, size)) is not None:
        left, top, right, bottom = found
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]


@pytest.mark.parametrize(
    ("text", "is_crop"),
    [
        (crop_of(1, 2, 30, 40), True),
        ('{"bbox_2d": [1, 2, 30, 40]}', True),
        ('<answer>```json\n[{"bbox_2d": [1, 2, 30, 40]}]\n```</answer>', True),
        (answer("[1, 2, 30, 40]"), False),  # may be an answer
        (answer('{"bbox_2d": [30, 2, 1, 40]}'), False),
        (answer('{"bbox_2d": [1, 2, 1e999, 40]}'), False),
        (answer('{"bbox_2d": [1, 2, 30'), False),
        (answer('{"bbox_2d": ' + "[" * 5000), False),
        ("{" * 100_000, False),
        ("", False),
    ],
)
def test_requests_are_told_from_answers(text: str, is_crop: bool) -> None:
    started = time.process_time()
    assert (read_crop(text) is not None) == is_crop
    assert crops_term(text, None) == is_crop
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    "text",
    [
        crop_of(500, 500, 600, 600),
        crop_of(0, 0, 10, 10, image=2),
        crop_of(0, 0, 10, 10, image=999),
        crop_of(0, 0, 0, 0),
        answer('{"bbox_2d": [NaN, 0, 10, 10]}'),
        "<image><image>",
    ],
)
def test_hostile_answers_end_the_episode(text: str) -> None:
    env, _ = begun()
    assert env.step(text)[2:4] == (True, False)


@pytest.mark.parametrize(
    "box", [(0, 0, 0.001, 192), (0, 0, 192, 0.001), (191.99, 191.99, 192, 192), (-5e4, -5e4, 5e4, 5e4)]
)
def test_strange_boxes_give_images_that_models_take(box: Any) -> None:
    env, _ = begun(image_bound=ResizeRule(32, 1024, 36864))
    height, width, _ = env.step(crop_of(*box))[0]["images"][1].shape
    assert max(height, width) / min(height, width) <= 6
    assert height * width <= 2 * 36864


def test_budgets_truncate() -> None:
    ask = crop_of(0, 0, 50, 50)
    env, _ = begun(max_turns=2)
    assert env.step(ask)[2:4] == (False, False)
    *_, terminated, truncated, info = env.step(ask)
    assert (terminated, truncated) == (False, True)
    assert info["rewards"] == {"accuracy": 0.0, "format": 1.0, "crops": 2.0}
    env, _ = begun(max_images=1)
    assert env.step(ask)[2:4] == (False, True)
    env, observation = begun(max_turns=1)
    assert env.step(ask)[2:4] == (True, False)
    assert "enlarged" not in observation["prompt"]
    with pytest.raises(ConfigError, match="one step: leave max_turns out"):
        gymnasium.make("VLM-REC-v0", max_turns=2)
    with pytest.raises(ConfigError, match="at least 1"):
        gymnasium.make("VLM-Zoom-v0", max_turns=0)


def test_a_vector_steps_those_that_go_on_as_single_environments_do() -> None:
    envs = VisualTaskVectorEnv(Doubting, 4, group_size=2, answers=True)
    _, infos = envs.reset(seed=0)
    assert list(infos["answer"]) == [answer("sure")] * 4
    answers = [["sure"], ["a", "sure"], ["a", "b", "c", "d"], ["x", "y", "sure"]]
    totals, singles = np.zeros(4), [Doubting() for _ in answers]
    for single in singles:
        single.reset(seed=0)
    for turn in range(4):
        texts = [own[turn] if turn < len(own) else "ignored" for own in answers]
        shown, rewards, terminated, truncated, infos = envs.step(texts)
        totals += rewards
        for row, own in enumerate(answers):
            if turn >= len(own):
                assert rewards[row] == 0
                continue
            observation, reward, *ended, info = singles[row].step(own[turn])
            assert rewards[row] == pytest.approx(reward)
            assert [terminated[row], truncated[row]] == ended
            assert {name: shown[name][row] for name in shown} == observation
            assert info["rewards"] == {name: infos["rewards"][name][row] for name in info["rewards"]}
    assert terminated.tolist() == [True, True, False, True]
    assert truncated.tolist() == [False, False, True, False]
    assert totals.tolist() == pytest.approx([0.9, 0.8, -0.4, 0.7])
    assert shown["prompt"][3] == "Sure of 2?"
    assert shown["turns"][3][0]["text"] == "An image?"  # no image stands there
    with pytest.raises(RuntimeError, match="reset"):
        envs.step(["x"] * 4)
