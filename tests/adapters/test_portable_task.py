"""Samples by portable numbers, and observations as messages."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from adapter_rows import write_rows
from PIL import Image

from vlmenv.adapters import task as task_module
from vlmenv.adapters.for_lmms_eval import process_results
from vlmenv.adapters.for_verl import easyr1_scores, verl_score
from vlmenv.adapters.task import (
    PORTABLE,
    PortableTask,
    completion_text,
    flat,
    image_url,
    judged,
    marked_messages,
    messages,
)
from vlmenv.core.coordinates import ResizeRule
from vlmenv.core.errors import ConfigError, DataError, SampleError
from vlmenv.core.rollout import Observation

IMAGES = tuple(np.full((2, 3, 3), value, np.uint8) for value in (10, 20, 30))


def numbered(observation: Observation) -> list[tuple[str, list[Any]]]:
    """Roles, and blocks as texts or as the value of an image's pixels."""
    told = messages(observation, lambda image: {"type": "image", "value": int(image[0, 0, 0])})
    return [(turn["role"], [one.get("text", one.get("value")) for one in turn["content"]]) for turn in told]


def test_images_are_in_their_places() -> None:
    turns = (
        {"role": "system", "text": "See <image>."},
        {"role": "user", "text": "<image>here"},
        {"role": "assistant", "text": "an <image> in words"},
    )
    asked: Any = {"images": IMAGES, "prompt": "and <image>", "turns": turns}
    assert numbered(asked) == [
        ("system", ["See ", 10, "."]),
        ("user", [20, "here"]),
        ("assistant", ["an <image> in words"]),
        ("user", ["and ", 30]),
    ]
    with pytest.raises(ConfigError, match="where no image is"):
        marked_messages(asked)


def test_images_without_places_precede_the_prompt() -> None:
    asked: Any = {"images": IMAGES[:2], "prompt": "Q", "turns": ({"role": "user", "text": "Hi"},)}
    assert numbered(asked) == [("user", ["Hi"]), ("user", [10, 20, "Q"])]
    assert marked_messages(asked)[-1] == {"role": "user", "content": "<image><image>Q"}


def test_a_text_alone_stays_text() -> None:
    asked: Any = {"images": (), "prompt": "What does <image> mean?"}
    assert numbered(asked) == [("user", ["What does <image> mean?"])]
    with pytest.raises(ConfigError, match="where no image is"):
        marked_messages(asked)


def test_an_image_keeps_every_pixel() -> None:
    image = np.random.default_rng(0).integers(256, size=(7, 5, 3), dtype=np.uint8)
    coded = image_url(image)["image_url"]["url"].removeprefix("data:image/png;base64,")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(coded)))), image)


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("a", "a"),
        ([{"role": "assistant", "content": "a"}], "a"),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}], "a"),
        ([{"role": "assistant", "content": None}], ""),
        ([], ""),
        (None, ""),
        ({"role": "assistant", "content": "a"}, "a"),
        (["a"], "a"),
    ],
)
def test_texts_of_completions(completion: Any, text: str) -> None:
    assert completion_text(completion) == text


def test_what_is_no_completion_is_told() -> None:
    with pytest.raises(TypeError, match="a completion is a text or messages, not 4"):
        completion_text(4)


WRITTEN = "<think>2 + 2</think><answer>4</answer>"


@pytest.mark.parametrize("completion", [None, WRITTEN, [{"role": "assistant", "content": WRITTEN}]])
def test_completions_score_alike_in_every_trainer(completion: Any) -> None:
    """Messages are not scored as the text that Python shows of them."""
    task = PortableTask("VLM-Math-v0")
    (index,) = task.indices(1, seed=0)
    expected = task.score([completion_text(completion)], [index])[0].reward
    key = task.key(index)
    assert verl_score("VLM-Math-v0", completion, key)["score"] == expected
    assert easyr1_scores([{"response": completion, "ground_truth": key}])[0]["overall"] == expected
    assert process_results({"key": key}, [completion])["reward"] == expected


def test_completions_without_their_samples_are_told() -> None:
    task = PortableTask("VLM-Math-v0")
    (index,) = task.indices(1, seed=0)
    with pytest.raises(ConfigError, match="2 completions came with 1 samples"):
        task.score(["a", "b"], [index])
    with pytest.raises(ConfigError, match="2 completions came with 1 keys"):
        judged(["a", "b"], [task.key(index)])


def test_arguments_of_groups_are_refused() -> None:
    with pytest.raises(ConfigError, match="answers, revisit: another trainer makes groups"):
        PortableTask("VLM-REC-v0", revisit=1.0, answers=True)


@pytest.mark.parametrize("rows", [4.0, "4"])
def test_rows_are_a_whole_number(rows: Any) -> None:
    with pytest.raises(ConfigError, match="rows is a whole number, not"):
        PortableTask("VLM-REC-v0").indices(rows, seed=0)


def test_numbers_survive_readers_that_use_float64() -> None:
    numbers = PortableTask("VLM-REC-v0").indices(200, seed=0)
    assert all(int(float(number)) == number for number in numbers)
    assert max(numbers) > PORTABLE / 4  # so that few samples come twice
    assert numbers == PortableTask("VLM-REC-v0").indices(200, seed=0)
    assert numbers != PortableTask("VLM-REC-v0").indices(200, seed=1)


def test_a_data_set_is_taken_whole(tmp_path: Path) -> None:
    task = PortableTask("VLM-VQA-v0", dataset=str(write_rows(tmp_path)))
    assert sorted(task.indices(None, seed=0)) == [0, 1]
    with pytest.raises(ConfigError, match="rows is 3, but the data set has 2"):
        task.indices(3, seed=0)
    with pytest.raises(ConfigError, match="say how many rows"):
        PortableTask("VLM-VQA-v0").indices(None, seed=0)


def test_scores_are_those_of_the_environment() -> None:
    env: Any = gymnasium.make("VLM-REC-v0", coordinates="norm1000")
    task = PortableTask("VLM-REC-v0", coordinates="norm1000")
    for index in task.indices(20, seed=3):
        env.reset(options={"index": index})
        right = env.unwrapped.write_answer(env.unwrapped.source.get(index))
        text = right.replace("[", "[1", 1) if index % 2 else right
        _, reward, _, _, info = env.step(text)
        for score in (task.score([text], [index])[0], judged([text], [task.key(index)])[0]):
            assert (score.reward, score.terms) == (reward, info["rewards"])


def test_scores_come_in_the_order_of_the_answers() -> None:
    first, second = PortableTask("VLM-REC-v0"), PortableTask("VLM-REC-v0", rewards={"format": 3.0})
    index = first.indices(1, seed=0)[0]
    right = first.task.write_answer(first.task.source.get(index))
    keys = [first.key(index), second.key(index), first.key(index)]
    assert [score.reward for score in judged(["", right, right], keys)] == [
        0.0,
        3.0,
        pytest.approx(sum(first.task.rewards.values())),
    ]


@pytest.mark.slow
def test_a_sample_is_the_same_in_another_folder_and_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path)
    code = "import sys; from vlmenv.adapters.task import judged; print(judged(sys.argv[1:2], sys.argv[2:])[0].reward)"
    monkeypatch.chdir(tmp_path)
    task = PortableTask("VLM-VQA-v0", dataset="rows.jsonl", image_bound=ResizeRule(max_pixels=28 * 28 * 4))
    monkeypatch.chdir("/")
    key = task.key(1)
    right = task.task.write_answer(task.task.source.get(1))
    ran = subprocess.run([sys.executable, "-c", code, right, key], capture_output=True, text=True, check=True)
    assert float(ran.stdout) == task.score([right], [1])[0].reward > 0


def test_what_no_process_could_make_again_is_refused() -> None:
    with pytest.raises(ConfigError, match="count_tokens is a builtin_function"):
        PortableTask("VLM-REC-v0", count_tokens=len).key(0)


@pytest.mark.parametrize("key", ["", "3", "[]", '{"env": "VLM-REC-v0"}', '{"env": 1, "arguments": {}, "index": "x"}'])
def test_a_truth_of_another_origin_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="names no sample"):
        judged(["a"], [key])


@pytest.mark.parametrize("index", [-1, 2, 1.5, True, "0", None, [0]])
def test_a_number_of_no_sample_is_refused(index: Any, tmp_path: Path) -> None:
    task = PortableTask("VLM-VQA-v0", dataset=str(write_rows(tmp_path)))
    with pytest.raises(ConfigError, match=r"whole number|no sample"):
        task.observation(index)
    with pytest.raises(ConfigError, match=r"whole number|no sample"):
        task.score(["a"], [index])
    with pytest.raises(ConfigError, match=r"whole number|no sample"):
        judged(["a"], [json.dumps({"env": task.env, "arguments": task.arguments, "index": index})])


def test_a_number_may_come_back_as_a_float() -> None:
    task = PortableTask("VLM-REC-v0")
    index = task.indices(1, seed=0)[0]
    assert task.observation(float(index))["prompt"] == task.observation(index)["prompt"]  # type: ignore[arg-type]
    assert task.observation(np.int64(index))["prompt"] == task.observation(index)["prompt"]  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, "x", 1.5])
def test_a_seed_is_a_whole_number(seed: Any) -> None:
    with pytest.raises(ConfigError, match="seed is a whole number of at least 0"):
        PortableTask("VLM-REC-v0").indices(1, seed)


def test_marks_and_images_differ_in_number() -> None:
    asked: Any = {"images": IMAGES[:1], "prompt": "<image> or <image>?"}
    for form in (marked_messages, numbered):
        with pytest.raises(ConfigError, match="2 <image> marks for 1 images"):
            form(asked)


def test_broken_samples_are_left_out_and_told(tmp_path: Path) -> None:
    file = write_rows(tmp_path)
    plain = Path(file).read_text().splitlines()[1].replace("a.png", "b.png")
    file.write_text(file.read_text() + plain + "\n")
    (tmp_path / "a.png").write_bytes(b"no image")
    task = PortableTask("VLM-VQA-v0", dataset=str(file), skip_broken=True)
    with pytest.warns(RuntimeWarning, match=r"2 of 3 samples cannot be read; the first: .*a\.png"):
        assert [index for index, _ in task.readable(task.indices(None, seed=0))] == [2]
    order = task.numbers(0)
    assert [task.next_readable(order)[0] for _ in range(3)] == [2, 2, 2]
    (tmp_path / "b.png").write_bytes(b"no image")
    for take in (lambda: list(task.readable(range(3))), lambda: task.next_readable(order)):
        with pytest.raises(DataError, match="samples cannot be read"):
            take()
    strict = PortableTask("VLM-VQA-v0", dataset=str(file))
    with pytest.raises(SampleError):
        strict.next_readable(strict.numbers(0))


def test_threads_that_score_make_a_task_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    make = task_module.make_envs

    def slow(env: str, *args: Any, **options: Any) -> Any:
        made.append(env)
        time.sleep(0.05)  # long enough for the others to come
        return make(env, *args, **options)

    key = PortableTask("VLM-REC-v0", rewards={"iou": 2.0}).key(3)
    right = PortableTask("VLM-REC-v0").task.write_answer(PortableTask("VLM-REC-v0").task.source.get(3))
    monkeypatch.setattr(task_module, "make_envs", slow)
    with ThreadPoolExecutor(8) as pool:
        scores = list(pool.map(lambda i: judged([right if i % 2 else ""], [key])[0].reward, range(32)))
    assert scores == [0.0, 2.0] * 16
    assert len(made) == 1


def test_a_link_to_a_data_set_keeps_its_own_folder(tmp_path: Path) -> None:
    for name in ("store", "used"):
        (tmp_path / name).mkdir()
    write_rows(tmp_path / "used").rename(tmp_path / "store" / "rows.jsonl")
    (tmp_path / "used" / "rows.jsonl").symlink_to(tmp_path / "store" / "rows.jsonl")
    task = PortableTask("VLM-VQA-v0", dataset=str(tmp_path / "used" / "rows.jsonl"))
    assert len(task.observation(0)["images"]) == 2


def test_the_folder_of_images_does_not_depend_on_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").mkdir()
    write_rows(tmp_path / "images").rename(tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    key = PortableTask("VLM-VQA-v0", dataset="rows.jsonl", image_root=Path("images")).key(0)
    monkeypatch.chdir("/")
    assert json.loads(key)["arguments"]["image_root"] == str(tmp_path / "images")
    judged(["a"], [key])


def test_a_term_does_not_take_the_place_of_the_total() -> None:
    class Scored:
        reward, terms = 2.0, {"score": 0.5, "format": 1.0}

    found: Any = Scored()
    assert flat(found, "score") == {"score": 2.0, "term_score": 0.5, "format": 1.0}


def test_keys_are_json() -> None:
    assert json.loads(PortableTask("VLM-REC-v0").key(5)) == {"env": "VLM-REC-v0", "index": 5, "arguments": {}}
