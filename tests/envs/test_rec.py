from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage

from vlmenv.core.answers import NONE
from vlmenv.core.coordinates import ResizeRule
from vlmenv.core.errors import ConfigError, RewardError
from vlmenv.envs.rec import RECEnv
from vlmenv.envs.rewards.boxes import iou50_reward
from vlmenv.envs.rewards.terms import BatchTerm


def test_gymnasiums_checker_is_content(recwarn: pytest.WarningsRecorder) -> None:
    env = gymnasium.make("VLM-REC-v0", render_mode="rgb_array")
    check_env(env.unwrapped)
    assert all("shows nothing here" in str(one.message) for one in recwarn.list)  # there may be no display
    assert gymnasium.make("vlmenv:VLM-REC-v0").spec is not None


def test_an_episode_is_one_step() -> None:
    env = gymnasium.make("VLM-REC-v0")
    observation, info = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    assert set(info) == {"id", "index"}
    terminal, reward, terminated, truncated, info = env.step("hello")
    assert (reward, terminated, truncated) == (0.0, True, False)
    assert env.observation_space.contains(terminal)
    assert set(info) == {"id", "index", "rewards", "weights", "prediction", "target", "traits"}
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.unwrapped.step("again")


def test_a_seed_fixes_samples_and_rewards() -> None:
    def play(seed: int) -> list[Any]:
        env = gymnasium.make("VLM-REC-v0")
        found: list[Any] = [env.reset(seed=seed)]
        for _ in range(4):
            found.append(env.step("<think>t</think><answer>[20,20,60,60]</answer>")[1:])
            found.append(env.reset())
        return found

    np.testing.assert_equal(play(1), play(1))
    assert play(1)[0][1]["id"] != play(2)[0][1]["id"]


def test_the_truth_scores_the_maximum() -> None:
    """To half a unit of the convention: a whole pixel of 84 is not one of 96."""
    cases = (("original", None, 1.0), ("norm1000", None, 0.99), ("resized", ResizeRule(), 0.9))
    for coordinates, resize, least in cases:
        env = RECEnv(coordinates=coordinates, resize=resize)
        for index in range(20):
            env.reset(options={"index": index})
            _, reward, _, _, info = env.step(env.write_answer(env.source.get(index)))
            assert info["rewards"]["iou"] >= least
            assert reward == pytest.approx(info["rewards"]["iou"] + 0.1 * info["rewards"]["format"])


def test_coordinates_reach_prompt_target_and_picture() -> None:
    pixels = RECEnv(render_mode="rgb_array")
    thousandths = RECEnv(coordinates="norm1000", render_mode="rgb_array")
    shrunk = RECEnv(coordinates="resized", resize=ResizeRule(), render_mode="rgb_array")
    pictures = []
    cases = ((pixels, "in pixels", 96), (thousandths, "in coordinates from 0 to 1000", 96), (shrunk, "in pixels", 84))
    for env, words, side in cases:
        observation, _ = env.reset(options={"index": 3})
        assert words in observation["prompt"]
        assert observation["images"][0].shape == (side, side, 3)
        assert observation["images"][0].flags.writeable
        x1, y1, x2, y2 = env.target(env.source.get(3))
        half = f"<answer>[{x1},{y1},{(x1 + x2) / 2},{y2}]</answer>"
        _, _, _, _, info = env.step(half)
        assert info["rewards"]["iou"] == pytest.approx(0.5)
        pictures.append(env.render())
    sample = pixels.source.get(3)
    for env, extent in ((thousandths, 1000), (shrunk, 84)):
        assert env.target(sample) == pytest.approx([v * extent / 96 for v in pixels.target(sample)])
    np.testing.assert_array_equal(pictures[0], pictures[1])
    np.testing.assert_array_equal(pictures[0], pictures[2])


def test_the_picture_shows_true_and_answered_boxes() -> None:
    env = RECEnv(render_mode="rgb_array")
    env.reset(options={"index": 0})
    before = env.render()
    env.step("<answer>[0,0,96,96]</answer>")
    after = env.render()
    assert before is not None
    assert after is not None
    blue, orange = [0, 114, 178], [213, 94, 0]
    x1, y1 = (int(4 * v) for v in env.source.get(0).target[:2])
    assert before[y1, x1 + 8].tolist() == after[y1, x1 + 8].tolist() == blue
    assert before[0, 0].tolist() != orange
    assert after[0, 0].tolist() == after[-1, -1].tolist() == orange


def test_rewards_are_named_and_weighted() -> None:
    def brevity(text: str, target: object) -> float:
        return float(len(text) < 100)

    env = RECEnv(rewards={"iou@0.5": 2.0, brevity: 0.25, "format": 0.5})
    env.reset(seed=0)
    _, reward, _, _, info = env.step("<think>t</think><answer>[0,0,1,1]</answer>")
    assert info["rewards"] == {"iou@0.5": 0.0, "brevity": 1.0, "format": 1.0}
    assert reward == 0.75
    again = RECEnv(rewards={partial(brevity): 1.0})
    assert again.score("", again.source.get(0)).terms.keys() == {"brevity"}


def test_a_prompt_template_is_data() -> None:
    env = RECEnv(prompt_template='{question} Reply {"bbox_2d": [x1, y1, x2, y2]} in {coordinates}.')
    prompt = env.reset(seed=0)[0]["prompt"]
    assert prompt.startswith("Locate the ")
    assert prompt.endswith('. Reply {"bbox_2d": [x1, y1, x2, y2]} in pixels.')


def _hidden(text: str, target: object) -> float:
    return 0.0


def test_a_reward_that_is_not_finite_is_named() -> None:
    def broken(text: str, target: object) -> float:
        return float("nan")

    env = RECEnv(rewards={broken: 1.0})
    env.reset(options={"index": 0})
    with pytest.raises(RewardError, match="'broken' gave nan for sample scene-train-0"):
        env.step("hello")


def test_a_reward_that_fails_is_named() -> None:
    """With the sample, unless the term scores all answers at once."""

    def shy(text: str, target: object) -> Any:
        return {}["nothing"] if text == "b" else None if text == "c" else 1

    class Batch(BatchTerm):
        name = "all"

        def __init__(self, values: Any) -> None:
            self.values = values

        def batch(self, texts: Any, targets: Any, images: Any, answer_format: Any) -> Any:
            return self.values(len(texts))

    cases: list[tuple[Any, list[str], str]] = [
        (shy, ["a", "b"], "'shy' failed on sample scene-train-1: KeyError: 'nothing'"),
        (shy, ["c", "a"], "'shy' failed on sample scene-train-0: TypeError"),
        (Batch(lambda count: 1 / 0), ["a", "a"], "'all' failed on 2 answers at once: ZeroDivisionError"),
        (Batch(lambda count: [1.0, "x"]), ["a", "a"], "'all' failed on sample scene-train-1: ValueError"),
        (Batch(lambda count: [1.0]), ["a", "a"], "'all' gave 1 values for 2 answers"),
        (Batch(lambda count: [1.0] * 3), ["a", "a"], "'all' gave 3 values for 2 answers"),
    ]
    for term, texts, message in cases:
        env = RECEnv(rewards={term: 1.0})
        with pytest.raises(RewardError, match=message):
            env.score_batch(texts, [env.source.get(0), env.source.get(1)])


def test_the_number_of_boxes_is_told() -> None:
    """Per true box; where there is none, there is no such number."""
    env, box = RECEnv(), (10.0, 10.0, 30.0, 30.0)
    told = [env.traits(env.parse(f"<answer>{text}</answer>"), box) for text in ("[1,2,3,4]", "None", "hm", "[1,2]")]
    assert [one["box_ratio"] for one in told] == [1, 0, 0, 0]
    assert env.traits(env.parse("<answer>[1,2,3,4]</answer>"), NONE) == {}
    image = np.zeros((40, 40, 3), np.uint8)
    data = [{"image": PILImage.fromarray(image), "problem": "?", "answer": answer} for answer in ("None", "[1,2,3,4]")]
    envs = gymnasium.make_vec("VLM-REC-v0", num_envs=2, dataset=data)
    envs.reset(options={"index": [0, 1]})
    _, _, _, _, infos = envs.step(["<answer>[1,2,3,4]</answer>"] * 2)
    assert infos["traits"]["_box_ratio"].tolist() == [False, True]
    assert infos["traits"]["box_ratio"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rewards": {"iuo": 1}}, "unknown reward term 'iuo'. Did you mean 'iou'?"),
        ({"rewards": {}}, "rewards is empty"),
        ({"rewards": {"iou": 1, partial(lambda t, g: 0.0): 1, partial(lambda t, g: 0.0): 1}}, "same name"),
        ({"rewards": {_hidden: 1}}, "leading underscore"),
        ({"rewards": {statistics.mean: 1}}, "that of a metric"),
        ({"rewards": {"iou": float("inf")}}, "must be finite"),
        ({"coordinates": "norm100"}, "Did you mean 'norm1000'?"),
        ({"split": "evil"}, "Did you mean 'eval'?"),
        ({"render_mode": "rgb"}, "render_mode"),
        ({"image_root": "x"}, "give dataset too"),
        ({"answer_format": "tag"}, "Did you mean 'tags'?"),
        ({"prompt_template": "hello"}, "{question}"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RECEnv(**arguments)
    assert message in str(caught.value)


def test_measures() -> None:
    env = RECEnv()
    target = (0.0, 0.0, 10.0, 10.0)
    measured = env.measure("<answer>[0,0,10,6]</answer>", target, {})
    assert measured == {"iou/mean": 0.6, "accuracy@0.5": 1, "accuracy@0.75": 0, "unparsable": 0, "format": 0}
    assert env.measure("hm", target, {})["unparsable"] == 1


@given(st.text(st.characters()))
def test_any_text_is_an_action(text: str) -> None:
    env = RECEnv()
    env.reset(options={"index": 0})
    _, reward, terminated, _, info = env.step(f"<think>{text}</think><answer>{text}</answer>")
    assert 0 <= reward <= 1.1
    assert terminated
    assert set(info["rewards"]) == {"iou", "format"}


WIN, LOSE = "[10,10,50,50]", "[60,60,90,90]"


@pytest.mark.parametrize(
    "answer",
    [
        f"{WIN} {LOSE}",
        f"{WIN} or {LOSE}",
        f"[{WIN}, {LOSE}]",
        f'[{{"bbox_2d": {WIN}}}, {{"bbox_2d": {LOSE}}}]',
        f'{{"bbox_2d": {LOSE}, "label": "a"}}\n{{"bbox_2d": {WIN}, "label": "b"}}',
        f'{{"bbox_2d": [{WIN}, {LOSE}]}}',
        f"{WIN}</answer><answer>{LOSE}",
        f"{LOSE}</answer><answer>{WIN}",
        f"{WIN}</answer></think><answer>{LOSE}",
        " ".join(f"[{x},{y},{x + 40},{y + 40}]" for x in range(0, 60, 10) for y in range(0, 60, 10)),
        "(10,10),(50,50),(60,60),(90,90)",
        f"None</answer><answer>{WIN}",
        "{" + ", ".join(f'"bbox{i}": [{i},{i},{i + 40},{i + 40}]' for i in range(40)) + "}",
    ],
)
def test_answers_that_list_several_boxes_are_not_right(answer: str) -> None:
    env = RECEnv(rewards={"iou": 1.0, "iou@0.5": 1.0, "format": 1.0})
    target = (10.0, 10.0, 50.0, 50.0)
    measured = env.measure(f"<think>t</think><answer>{answer}</answer>", target, {})
    assert measured["iou/mean"] == measured["accuracy@0.5"] == measured["format"] == 0


def test_a_box_over_everything_is_worth_its_overlap() -> None:
    assert iou50_reward("<think>t</think><answer>[0,0,96,96]</answer>", (10.0, 10.0, 50.0, 50.0)) == 0


def test_what_is_no_text_is_refused() -> None:
    env = RECEnv()
    env.reset(seed=0)
    with pytest.raises(TypeError, match="string, not bytes"):
        env.step(b"hello")  # type: ignore[arg-type]
