"""What holds for every task: Gymnasium's rules, agreement of its vectors, and that no answer pays but the right one."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from conftest import shared
from growth import growth
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmenv.core.answers import Caption
from vlmenv.core.errors import ConfigError, DataError
from vlmenv.core.formats import AnswerFormat
from vlmenv.envs.base import VisualTaskEnv
from vlmenv.envs.geometry import DETECTIONS
from vlmenv.envs.making import visual_tasks
from vlmenv.envs.pointing import REGIONS
from vlmenv.envs.rewards.answers import accuracy_reward, read_answer
from vlmenv.envs.rewards.text import keywords_reward
from vlmenv.envs.segmentation import SEGMENTS

TASKS = [
    *("VLM-Caption-v0", "VLM-Count-v0", "VLM-GUI-v0", "VLM-Math-v0"),
    *("VLM-OCR-v0", "VLM-OVD-v0", "VLM-Point-v0", "VLM-REC-v0", "VLM-Seg-v0", "VLM-VQA-v0", "VLM-Zoom-v0"),
    *("VLM-Chart-v0", "VLM-Search-v0", "VLM-Temporal-v0", "VLM-VideoQA-v0"),
]
VIDEO_TASKS = ("VLM-Temporal-v0", "VLM-VideoQA-v0")
ROWS: dict[str, list[tuple[str, Any]]] = {
    "VLM-REC-v0": [("Find it.", "[1, 2, 30, 40]"), ("Find the other.", "None")],
    "VLM-OVD-v0": [
        ("Detect cats.", '```json\n[{"bbox_2d": [1, 2, 30, 40], "label": "cat"}]\n```'),
        ("Detect dogs.", "None"),
    ],
    "VLM-Math-v0": [("How long is x?", "\\frac{7}{3}"), ("(A) 1 (B) 2", "B")],
    "VLM-VQA-v0": [("Is it red?", "yes"), ("How many?", "3"), ("(A) 1 (B) 2", "(A)"), ("Which?", "a red cat")],
    "VLM-Point-v0": [("Point at cats.", "[[1, 2, 30, 40], [35, 5, 60, 40]]"), ("Point at dogs.", "None")],
    "VLM-GUI-v0": [("Click on Save.", "[1, 2, 30, 40]"), ("Enter tea.", '{"action": "type", "text": "tea"}')],
    "VLM-OCR-v0": [("Read it.", "a red cat"), ("Read the sign.", "STOP 12")],
    "VLM-Seg-v0": [("Outline cats.", "[[5, 5, 30, 5, 30, 40], [35, 5, 60, 40]]"), ("Outline dogs.", "None")],
    "VLM-Count-v0": [("How many cats?", "3"), ("How many dogs?", "0")],
    "VLM-Chart-v0": [("Which is highest?", "Tea"), ("How much is Tea?", "40")],
    "VLM-VideoQA-v0": [("Does it move?", "yes"), ("Which?", "a red cat")],
    "VLM-Temporal-v0": [("When is it red?", "[0.5, 2.5]"), ("When is it blue?", "0:03 to 0:04")],
    "VLM-Zoom-v0": [("Is it red?", "yes"), ("Which?", "a red cat")],
    "VLM-Search-v0": [("Is it red?", "yes"), ("Which?", "a red cat")],
    "VLM-Caption-v0": [("Describe it. How many?", "2"), ("Describe it.", "red")],
}


def task_of(name: str, **arguments: Any) -> VisualTaskEnv:
    env = gymnasium.make(name, **arguments).unwrapped
    assert isinstance(env, VisualTaskEnv)
    return env


def rows_file(folder: Path, name: str, count: int | None = None) -> Path:
    Image.new("RGB", (64, 48), "red").save(folder / "a.png")
    frames = [Image.new("RGB", (64, 48), colour) for colour in ("red", "blue", "green", "red")]
    frames[0].save(folder / "a.gif", save_all=True, append_images=frames[1:], duration=1000)
    kind, file = ("video", "a.gif") if name in VIDEO_TASKS else ("image", "a.png")
    lines = []
    for number, (question, answer) in enumerate(ROWS[name][:count]):
        turns = [{"from": "human", "value": f"<{kind}>{question}"}, {"from": "gpt", "value": answer}]
        row = {"id": number, kind: file, "conversations": turns, "key_word": ["red", "wide"], "subject": "s"}
        lines.append(json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"


def right_answers(env: VisualTaskEnv, count: int) -> list[str]:
    return [env.write_answer(env.source.get(index)) for index in range(count)]


def test_these_are_the_tasks() -> None:
    assert set(TASKS) <= set(visual_tasks())


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("source", ["built-in", "file"])
def test_gymnasiums_checker_is_content(
    name: str, source: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    data = {} if source == "built-in" else {"dataset": rows_file(tmp_path, name)}
    check_env(gymnasium.make(name, render_mode="rgb_array", **data).unwrapped)
    ours = [one for one in recwarn if "vlmenv" in str(one.filename) or "gymnasium" in str(one.filename)]
    assert all("shows nothing here" in str(one.message) for one in ours)  # there may be no display


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_all_vectors_agree(name: str, tmp_path: Path) -> None:
    """Our vector environment, Gymnasium's two, and one environment after the other give the same rewards."""
    file = rows_file(tmp_path, name, count=1)
    task = task_of(name, dataset=file)
    answers = [right_answers(task, 1)[0], "", "<think>x</think><answer>None</answer>", "[1, 2, 3, 4]"]
    expected = []
    for answer in answers:
        task.reset(seed=1)
        expected.append(task.step(answer)[1])
    assert expected[0] > max(expected[1:])
    ours = gymnasium.make_vec(name, num_envs=4, dataset=file)
    ours.reset(seed=1)
    _, rewards, _, _, infos = ours.step(answers)
    assert rewards.tolist() == pytest.approx(expected, abs=1e-6)
    for mode, extra in (("sync", {}), ("async", {"shared_memory": False})):
        theirs = gymnasium.make_vec(name, num_envs=4, vectorization_mode=mode, vector_kwargs=extra, dataset=file)
        theirs.reset(seed=1)
        step = theirs.step(answers)
        np.testing.assert_allclose(step[1], rewards, atol=1e-6)
        assert step[4]["rewards"].keys() == infos["rewards"].keys()
        assert list(step[4]["target"]) == list(infos["target"]) or mode == "sync" or name == "VLM-REC-v0"
        theirs.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("answer_format", [None, "tags", "sections"])
def test_the_truth_scores_the_maximum(name: str, answer_format: str | None) -> None:
    env = task_of(name, answer_format=answer_format)
    most = sum(weight for weight in env.default_rewards.values() if weight > 0)
    for index in range(12):
        observation, _ = env.reset(options={"index": index})
        sample = env.source.get(index)
        assert sample.question in observation["prompt"]
        assert ("### The final answer is:" in observation["prompt"]) is (env.answer_format is AnswerFormat.SECTIONS)
        answer = env.write_answer(sample)
        _, reward, _, _, info = env.step(answer)
        least = most - 0.4 * (1 - info["rewards"].get("clip", 1.0)) - 1e-9
        assert reward == pytest.approx(least)
        assert env.measure(answer, info["target"], info["rewards"])["unparsable"] == 0
        assert env.answer_format.is_followed(answer)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "path", "count"),
    [
        ("VLM-REC-v0", "rec/refcocos", 19),
        ("VLM-OVD-v0", "ovd/tinycoco", 27),
        ("VLM-OVD-v0", "ovd/bccd", 8),
        ("VLM-Math-v0", "visual_math/mathvision", 32),
        ("VLM-VQA-v0", "visual_math/mathvision", 32),
        ("VLM-Math-v0", "visual_math/geometry3k_examples", 10),
        ("VLM-VQA-v0", "visual_math/geometry3k_examples", 10),
    ],
)
def test_every_row_of_the_sample_data_scores_the_maximum_with_its_truth(name: str, path: str, count: int) -> None:
    env = task_of(name, dataset=shared(f"data/{path}/samples.jsonl"), rewards={next(iter(VisualTerms(name))): 1.0})
    assert env.source.size == count
    for index in range(count):
        observation, _ = env.reset(options={"index": index})
        assert len(observation["prompt"]) > 60
        assert "<image>" not in observation["prompt"]
        assert env.step(env.write_answer(env.source.get(index)))[1] == pytest.approx(1)


def VisualTerms(name: str) -> dict[str, float]:
    return dict(task_of(name).default_rewards)


@pytest.mark.parametrize("path", ["ovd/tinycoco", "ovd/bccd"])
def test_coco_instances_of_the_sample_data_score_the_maximum_with_their_truth(path: str) -> None:
    folder = shared(f"data/{path}")
    env = task_of("VLM-OVD-v0", dataset=folder / "instances.json", image_root=folder / "images")
    assert env.source.size
    crowds = 0
    for index in range(env.source.size):
        env.reset(options={"index": index})
        _, _, _, _, info = env.step(env.write_answer(env.source.get(index)))
        crowds += any(one.crowd for one in info["target"])
        assert info["rewards"]["od_length"] == pytest.approx(1)
    assert (crowds > 0) is (path == "ovd/tinycoco")


@pytest.mark.parametrize("name", TASKS)
def test_an_answer_in_the_other_format_is_none(name: str) -> None:
    for own, other in (("tags", AnswerFormat.SECTIONS), ("sections", AnswerFormat.TAGS)):
        env = task_of(name, answer_format=own)
        sample = env.source.get(0)
        right = env.answer_format.extract(env.write_answer(sample)) or ""
        score = env.score(other.write(right, sample.rationale), sample)
        assert score.terms["format"] == 0
        main = next(iter(env.default_rewards)) if name != "VLM-Caption-v0" else "clip"
        assert score.terms[main] == 0


def ceilings(env: VisualTaskEnv, index: int) -> dict[str, tuple[str, float]]:
    """Answers that try to win without knowing, each with the share of the reward that it may reach.

    The format's own tenth, and the caption's two for length and format, may be had by anyone who keeps to the format.
    """
    sample = env.source.get(index)
    right = env.write_answer(sample)
    others = map(env.source.get, range(index + 1, index + 20))
    other = next(one for one in others if env.target(one) != env.target(sample))
    answer = env.answer_format.extract(right) or ""
    form = sum(weight for name, weight in env.default_rewards.items() if name in ("format", "length"))
    write = env.answer_format.write
    tags = env.answer_format is AnswerFormat.TAGS
    caption = env.answer_format is AnswerFormat.SECTIONS  # says "reasoning" where the description goes
    lists = env.geometry in (DETECTIONS, REGIONS, SEGMENTS)  # whose objects are whole, though the list is not
    graded = "similarity" in env.default_rewards  # any text is a little like any other
    low = form + (0.35 if graded else 0.25 if caption else 0)
    return {
        "empty": ("", 0),
        "white space": (" \n", 0),
        "empty answer": (write(""), form),
        "the prompt echoed": (env.prompt(sample.question), low),
        "the answer block twice": (right + right, 0.9 if caption else 0),
        "nested tags": (f"<think><think></think><answer><answer>{answer}</answer></answer>", low if caption else 0),
        "answer only inside think": (f"<think><answer>{answer}</answer></think>" if tags else answer, low),
        "answer cut off": (right.removesuffix("</answer>")[:-1], 1.0 if caption or lists or graded else 0),
        "surrogates": (write("\ud800\udfff" * 50), low),
        "null bytes": (write("\0" * 50), low),
        "NaN": (write("[NaN, NaN, NaN, NaN]"), low),
        "1e308": (write("[1e308, 1e308, 1e309, 1e309]"), low),
        "a LaTeX bomb": (write("9^{9^{9^{9^9}}}"), low),
        "nested LaTeX": (write("\\frac{" * 500 + "}" * 500), low),
        "many numbers": (write(", ".join(map(str, range(100)))), low),
        "all letters": (write("A B C D E"), low),
        "yes and no": (write("yes no"), low),
        "10 MB of brackets": (write("[" * 10_000_000), low),
        "10 MB of words": (write("cat " * 2_500_000), low),
        "10 MB of tags": ("<think>" * 1_400_000, low),
        "the next row's truth": (
            env.write_answer(other),
            1.0 if caption or answer in other_answer(env, other) else low + 0.35,
        ),
    }


def other_answer(env: VisualTaskEnv, other: Any) -> str:
    return env.answer_format.extract(env.write_answer(other)) or ""


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_no_trick_pays(name: str) -> None:
    env = task_of(name)
    env.score("", env.source.get(0))  # what is loaded once does not count
    most = sum(env.default_rewards.values())
    for index in range(2):
        sample = env.source.get(index)
        for trick, (text, share) in ceilings(env, index).items():
            score = env.score(text, sample)
            assert score.reward <= share + 1e-9, (trick, score)
            assert score.reward < most
            if len(text) > 1_000_000:
                assert growth(lambda size: env.score(text[:size], sample), len(text) // 8, tries=1) < 24, trick  # noqa: B023


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_no_text_raises_or_takes_long(name: str) -> None:
    env = task_of(name, rewards=dict.fromkeys(task_of(name).terms, 1.0))
    sample = env.source.get(0)
    env.score(env.write_answer(sample), sample)

    @settings(max_examples=60, deadline=10_000)  # a second is passed on a busy machine
    @given(st.text(st.characters()) | st.text("\\{}^_$[]()<>/.,:#0123456789eE-+ abfrcsqt\n", max_size=200))
    def check(text: str) -> None:
        for content in (text, env.answer_format.write(text, text)):
            score = env.score(content, sample)
            assert np.isfinite(score.reward)
            env.measure(content, env.target(sample), score.terms)

    check()


@pytest.mark.parametrize("name", TASKS)
def test_one_seed_gives_one_order_for_any_number_of_environments(name: str) -> None:
    def shown(num_envs: int, resets: int) -> list[int]:
        envs = gymnasium.make_vec(name, num_envs=num_envs)
        indices = list(envs.reset(seed=9)[1]["index"])
        for _ in range(resets - 1):
            indices += list(envs.reset()[1]["index"])
        return indices

    assert shown(6, 1) == shown(2, 3) == shown(1, 6)


@pytest.mark.parametrize("name", TASKS)
def test_the_time_of_each_term_is_told_on_request(name: str) -> None:
    envs = gymnasium.make_vec(name, num_envs=2, timing=True)
    envs.reset(seed=0)
    infos = envs.step(["", "a"])[4]
    assert infos["seconds"].keys() == infos["rewards"].keys()
    assert all((infos["seconds"][term] >= 0).all() for term in task_of(name).default_rewards)
    single = task_of(name)
    single.reset(seed=0)
    assert "seconds" not in single.step("")[4]


@pytest.mark.parametrize("name", TASKS)
def test_it_is_drawn_before_and_after_an_answer(name: str) -> None:
    env = task_of(name, render_mode="rgb_array")
    env.reset(options={"index": 3})
    before = env.render()
    env.step(env.write_answer(env.source.get(3)))
    after = env.render()
    for picture in (before, after):
        assert picture is not None
        assert picture.dtype == np.uint8
        assert min(picture.shape[:2]) >= 320


def test_rows_choose_their_reward(tmp_path: Path) -> None:
    """`accu_reward_method` puts another term in the place of the one in use."""
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    box = '[{"bbox_2d": [1, 2, 30, 40], "label": "cat"}]'
    rows = [
        {"image": "a.png", "problem": "?", "answer": box} | method
        for method in ({}, {"accu_reward_method": "map"}, {"accu_reward_method": "odLength"})
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    envs = gymnasium.make_vec("VLM-OVD-v0", num_envs=3, dataset=tmp_path / "rows.json")
    envs.reset(options={"index": [0, 1, 2]})
    spam = AnswerFormat.TAGS.write(box[:-1] + ", " + box[1:])
    _, rewards, _, _, infos = envs.step([spam] * 3)
    assert rewards.tolist() == pytest.approx([0.6, 1.1, 0.6])
    assert infos["rewards"]["map"][1] == pytest.approx(1)
    assert infos["rewards"]["_map"].tolist() == [False, True, False]
    assert infos["rewards"]["_od_length"].tolist() == [True, False, True]
    (tmp_path / "rows.json").write_text(json.dumps([rows[0] | {"accu_reward_method": "llm"}]))
    with pytest.raises(DataError, match=r"rows\.json:1: accu_reward_method: unknown reward 'llm'"):
        task_of("VLM-OVD-v0", dataset=tmp_path / "rows.json")
    with pytest.raises(DataError, match=r"rows\.json:1: "):
        task_of("VLM-VQA-v0", dataset=tmp_path / "rows.json")


def test_questions_choose_how_they_are_answered(tmp_path: Path) -> None:
    rows = [
        {"problem": "?", "answer": "12 cm", "accu_reward_method": "numeric", "tolerance": 1},
        {"problem": "?", "answer": "colour", "accu_reward_method": "edit"},
        {"problem": "?", "answer": "0.5", "accu_reward_method": "math"},
        {"problem": "?", "answer": "B", "accu_reward_method": "mcq"},
        {"problem": "?", "answer": "Yes.", "accu_reward_method": "yes_no"},
        {"problem": "?", "answer": "B", "accu_reward_method": "exact"},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    envs = gymnasium.make_vec("VLM-VQA-v0", num_envs=6, dataset=tmp_path / "rows.json", rewards={"accuracy": 1})
    envs.reset(options={"index": range(6)})
    answers = ["12.9", "color", "\\frac{1}{2}", "(B) cat", "yes, it is", "b"]
    rewards = envs.step([AnswerFormat.TAGS.write(answer) for answer in answers])[1]
    assert rewards.tolist() == pytest.approx([1, 5 / 6, 1, 1, 1, 1])


def test_an_answer_is_wanted_but_for_captions(tmp_path: Path) -> None:
    row: dict[str, Any] = {"problem": "Describe it.", "key_word": ["red"], "images": [Image.new("RGB", (8, 8))]}
    for name in set(TASKS) - {"VLM-Caption-v0"}:
        with pytest.raises(DataError, match="row 0: the row has no answer"):
            task_of(name, dataset=[row | ({"video": "a.gif"} if name in VIDEO_TASKS else {})])
    env = task_of("VLM-Caption-v0", dataset=[row], rewards={"keywords": 1.0, "accuracy": 1.0})
    score = env.score(env.write_answer(env.source.get(0)), env.source.get(0))
    assert score.terms == {"keywords": 1, "accuracy": 0}


def test_a_tolerance_makes_of_mathematics_a_number() -> None:
    env = task_of("VLM-Math-v0", dataset=[{"problem": "pi?", "answer": "3.14", "tolerance": 0.01}])
    assert env.score(AnswerFormat.TAGS.write("3.141"), env.source.get(0)).terms["accuracy"] == 1


def test_broken_rows_are_left_out_on_request(tmp_path: Path) -> None:
    file = rows_file(tmp_path, "VLM-REC-v0")
    file.write_text("{\n" + file.read_text())
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the line is not JSON"):
        task_of("VLM-REC-v0", dataset=file)
    env = task_of("VLM-REC-v0", dataset=file, skip_broken=True)
    assert (env.source.size, len(env.source.faults)) == (2, 1)
    file.write_text("{\n{\n")
    with pytest.raises(DataError, match=r"every one of 2 rows is broken; the first: .*rows\.jsonl:1"):
        task_of("VLM-REC-v0", dataset=file, skip_broken=True)
    with pytest.raises(ConfigError, match="are for a data set"):
        task_of("VLM-REC-v0", skip_broken=True)


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("3!", "3", 0),
        ("3!", "6", 1),
        ("-(-1)", "1", 1),
        ("-(-1)", "-1", 0),
        ("1 1", "1", 0),
        ("log 100", "100", 0),
        ("cos 0", "0", 0),
        ("12 or more", "12", 0),
        ("12 dogs", "12", 1),
    ],
)
def test_no_mathematical_answer_is_two_numbers(answer: str, truth: str, expected: float) -> None:
    assert accuracy_reward(AnswerFormat.TAGS.write(answer), read_answer(truth, "math")) == expected


@pytest.mark.slow
def test_combining_marks_do_not_hold_up_a_step() -> None:
    def score(marks: int) -> float:
        return keywords_reward("a" + "\u0315\u0300" * marks + " red", Caption(("red",)))

    assert (score(5_000_000), score(50_000)) == (0, 1)
    assert growth(score, 10_000) < 24


def test_a_caption_without_a_description_earns_nothing_for_its_words() -> None:
    env = task_of("VLM-Caption-v0")
    sample = env.source.get(0)
    words = "red orange yellow green blue purple circle square triangle star"
    assert env.score(words, sample).reward == 0
    assert env.score("", sample).reward == 0
    stuffed = env.score(AnswerFormat.SECTIONS.write("1", words), sample)
    assert stuffed.terms["keywords"] == 1  # as the published reward has it; the image is what tells
    assert stuffed.terms["clip"] < 0.2
    assert stuffed.reward < env.score(env.write_answer(sample), sample).reward - 0.2


@pytest.mark.parametrize(
    "text",
    [
        "### Image Description: ### The final answer is: B\n### Rationales:\n### Let's think step by step.",
        "### The final answer is: B\n### Image Description:\n### Rationales:\n### Let's think step by step.",
    ],
)
def test_an_answer_hidden_before_another_section_is_none(text: str) -> None:
    assert AnswerFormat.SECTIONS.extract(text) is None


def test_pictures_that_rows_share_are_read_once_at_a_time(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (400, 400, 3), dtype=np.uint8)).save(tmp_path / "a.jpg")
    for _ in range(5):
        with Image.open(tmp_path / "a.jpg") as picture:
            rows = [{"problem": "Find it.", "answer": "[1, 2, 3, 4]", "images": [picture], "id": i} for i in range(8)]
            shown, _ = gymnasium.make_vec("VLM-REC-v0", num_envs=8, dataset=rows).reset(seed=0)
            assert {images[0].shape for images in shown["images"]} == {(400, 400, 3)}


def test_environments_can_be_pickled() -> None:
    for name in TASKS:
        env = task_of(name)
        again = pickle.loads(pickle.dumps(env))
        sample = env.source.get(0)
        answer = env.write_answer(sample)
        assert again.score(answer, sample).reward == pytest.approx(env.score(answer, sample).reward)
