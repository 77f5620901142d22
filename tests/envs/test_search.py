"""Search in albums: the sheet, what is opened, rows with pages, and training on it."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import vlmenv
from vlmenv.core.coordinates import ResizeRule
from vlmenv.core.errors import ConfigError, DataError
from vlmenv.core.spaces import blank_image, is_blank
from vlmenv.envs.data.albums import SIDES, SIZES
from vlmenv.envs.data.scenes import COLOURS
from vlmenv.envs.making import make_envs
from vlmenv.envs.search import SearchEnv, contact_sheet, found_term, opened_term, read_page
from vlmenv.evaluation import summarise
from vlmenv.options.task import DataOptions, PromptOptions, given_arguments


def answer(content: str) -> str:
    return f"<think></think><answer>{content}</answer>"


def opening(page: Any) -> str:
    return answer(json.dumps({"open": page}))


def begun(index: int = 0, **arguments: Any) -> tuple[SearchEnv, Any]:
    env = gymnasium.make("VLM-Search-v0", **arguments).unwrapped
    assert isinstance(env, SearchEnv)
    return env, env.reset(options={"index": index})[0]


COLOURED = ("red", "lime", "blue", "yellow", "white")


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """A row with five pictures of one colour each, 400 x 300; the answer is in the third."""
    for colour in COLOURED:
        Image.new("RGB", (400, 300), colour).save(tmp_path / f"{colour}.png")
    row = {"images": [f"{one}.png" for one in COLOURED], "question": "Which is dark?", "answer": "blue"}
    return write(tmp_path / "rows.jsonl", row | {"evidence_pages": [3]})


def write(file: Path, *rows: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_the_truth_is_found_in_the_image_that_shows_it() -> None:
    for index in range(6):
        env, observation = begun(index)
        sample = env.source.get(index)
        assert [max(image.shape) for image in observation["images"]] == [192]
        asked = env.write_turn(sample, ())
        assert read_page(asked) == sample.target.pages[0]
        observation, reward, *ended, info = env.step(asked)
        assert (reward, ended, info["rewards"]) == (-0.05, [False, False], {"opened": 1.0})
        np.testing.assert_array_equal(observation["images"][1], sample.images[sample.target.pages[0] - 1])
        assert observation["prompt"] == f"<image>Image {sample.target.pages[0]}. Answer, or open another."
        _, reward, *ended, info = env.step(env.write_turn(sample, (asked,)))
        assert (reward, ended) == (1.1, [True, False])
        assert info["rewards"] == {"opened": 1.0, "accuracy": 1.0, "format": 1.0, "found": 1.0}
        assert info["weights"] == {"opened": -0.05, "accuracy": 1.0, "format": 0.1, "found": 0.0}


def test_albums_ask_about_the_dot_in_a_shape_that_only_one_image_has() -> None:
    counts: Counter[int] = Counter()
    for sample in map(SearchEnv().source.get, range(20)):
        (page,), (colour, kind) = sample.target.pages, sample.question.rstrip("?").split()[-2:]
        counts[len(sample.images)] += 1
        assert f"The {colour} {kind} is in image {page}." == sample.rationale
        shown = sample.images[page - 1].astype(int)
        dot = (np.abs(shown - COLOURS[sample.target.text]).max(axis=2) <= 12).nonzero()
        assert len(dot[0]) >= SIDES[0] ** 2
        assert (np.abs(shown - COLOURS[colour]).max(axis=2) <= 12).any()
        assert sample.target.text != colour
    assert min(counts) >= SIZES[0]
    assert max(counts) <= SIZES[1]
    assert len(counts) > 3


def test_the_sheet_shows_each_image_small_below_its_number_and_blanks_without_reading() -> None:
    images = [np.full((300, 400, 3), Image.new("RGB", (1, 1), one).getpixel((0, 0)), np.uint8) for one in COLOURED]
    sheet = contact_sheet(images, 300)
    assert sheet.shape == (200, 300, 3)
    for place, image in enumerate(images):
        left, top = place % 3 * 100, place // 3 * 100
        assert (sheet[top + 50, left + 50] == image[0, 0]).all()
        number = sheet[top : top + 12, left : left + 100]
        assert (number.min(axis=2) < 60).sum() >= 4
    assert (sheet[100:, 200:] == 255).all()  # there is no sixth
    numbers = [sheet[top : top + 12, left : left + 100] for top in (0, 100) for left in (0, 100, 200)][:5]
    assert len({one.tobytes() for one in numbers}) == 5
    blank = contact_sheet([blank_image(400, 300)] * 5, 300)
    assert is_blank(blank)
    assert blank.shape == sheet.shape


def test_images_are_shown_within_the_models_bound(album: Path) -> None:
    bound = ResizeRule(10, 100, 12_000)
    for arguments in ({"image_bound": bound}, {"coordinates": "resized", "resize": bound}):
        env, observation = begun(dataset=album, **arguments)
        opened = env.step(opening(3))[0]["images"]
        for image in (*observation["images"], *opened):
            assert image.shape[0] * image.shape[1] <= 12_000
            assert not any(side % 10 for side in image.shape[:2])
        assert (opened[1].reshape(-1, 3) == (0, 0, 255)).all()
        assert len(observation["images"]) == 1
    outline = env.observe(env.source.outline(0))["images"]
    assert [image.shape for image in outline] == [observation["images"][0].shape]
    assert is_blank(outline[0])


@pytest.mark.parametrize(
    ("columns", "pages"),
    [
        ({"evidence_pages": [3, 5]}, (3, 5)),
        ({"evidence_pages": "[3]"}, (3,)),
        ({"evidence_pages": 3.0}, (3,)),  # as pandas writes a column with gaps
        ({"evidence_pages": [3.0, 5]}, (3, 5)),
        ({"answer_page_idx": 2}, (3,)),
        ({"answer_page_idx": "2"}, (3,)),
        ({"answer_page_idx": 0, "evidence_pages": []}, (1,)),
        ({}, ()),
    ],
)
def test_rows_say_where_the_answer_is(album: Path, columns: dict[str, Any], pages: tuple[int, ...]) -> None:
    row = {name: cell for name, cell in json.loads(album.read_text()).items() if name != "evidence_pages"}
    env, _ = begun(dataset=write(album, row | columns))
    sample = env.source.get(0)
    assert sample.target.pages == pages
    texts: list[str] = []
    while read_page(last := env.write_turn(sample, tuple(texts))) is not None:
        texts.append(last)
    assert tuple(map(read_page, texts)) == pages
    for text in (*texts, last):
        _, _, terminated, _, info = env.step(text)
    assert terminated
    assert info["rewards"] == {"opened": len(pages), "accuracy": 1.0, "format": 1.0, "found": float(bool(pages))}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"evidence_pages": [6]}, "the answer is to be found in image 6, but the row has 5"),
        ({"answer_page_idx": 5}, "the answer is to be found in image 6"),
        ({"evidence_pages": [0]}, r"'evidence_pages' is \[0\], which is no number of an image from 1 on"),
        ({"answer_page_idx": "last"}, "'answer_page_idx' is 'last'"),
        ({"evidence_pages": [True]}, "'evidence_pages' is"),
        ({"evidence_pages": 2.5}, "'evidence_pages' is 2.5"),
        ({"images": []}, "needs an image"),
    ],
)
def test_rows_that_say_it_wrongly_are_refused(album: Path, columns: dict[str, Any], message: str) -> None:
    row = {name: cell for name, cell in json.loads(album.read_text()).items() if name != "evidence_pages"}
    with pytest.raises(DataError, match=message):
        begun(dataset=write(album, row | columns))


def test_marks_within_a_question_become_numbers_and_images_of_other_turns_are_refused(album: Path) -> None:
    row = json.loads(album.read_text())
    marked = "<image><image>Which of <image>, <image> and <image> is dark?"
    _, observation = begun(dataset=write(album, row | {"question": marked}))
    assert observation["prompt"].endswith("\nWhich of image 3, image 4 and image 5 is dark?")
    history = [{"role": "user", "content": "<image>" * 5}, {"role": "assistant", "content": "Well?"}]
    asked = [{"role": "user", "content": "Which is dark?"}, {"role": "assistant", "content": "blue"}]
    with pytest.raises(DataError, match="a turn before the question has images"):
        begun(dataset=write(album, {"images": row["images"], "messages": history + asked}))


def test_other_tasks_say_that_they_do_not_read_pages(album: Path) -> None:
    env: Any = gymnasium.make("VLM-VQA-v0", dataset=album).unwrapped
    assert "evidence_pages" in str(env.source.usage)
    assert env.source.get(0).target.pages == ()
    with pytest.raises(ConfigError, match="does not read pages"):
        gymnasium.make("VLM-VQA-v0", dataset=album, columns={"pages": "evidence_pages"})


@pytest.mark.parametrize(
    ("text", "page"),
    [
        (opening(3), 3),
        ('{"open": 3}', 3),
        ("<answer>```json\n{'open': \"12\"}\n```</answer>", 12),
        (answer("{open: 3}"), 3),
        (answer("{“open”: 3}"), 3),
        (answer("{open: 3} {open: 4}"), None),
        (answer("3"), None),
        (answer('{"open": 3, "open": 4}'), None),
        (answer('{"open": 3.5}'), None),
        (answer('{"open": -3}'), None),
        (answer('{"open": [3]}'), 3),
        (answer('{"Open": "image 3"}'), 3),
        (answer('{"open": [3, 4]}'), None),
        (answer('{"open": 1e9}'), None),
        (answer('{"open": 12345}'), None),
        (answer('{"open": 07}'), None),
        (answer('{"open": ' + "9" * 900), None),
        (answer("It is open: 3 people"), None),
        (answer('{"open": 3}' + "." * 5000), None),
        ("{" * 100_000, None),
        ("", None),
    ],
)
def test_requests_are_told_from_answers(text: str, page: int | None) -> None:
    started = time.process_time()
    assert read_page(text) == page
    assert opened_term(text, None) == (page is not None)
    assert time.process_time() - started < 1


def test_what_is_opened_is_an_image_of_the_album() -> None:
    env = SearchEnv()
    sample = env.source.get(0)
    requests = st.integers(-5, 99_999).map(lambda page: f'{{"open": {page}}}')

    @settings(max_examples=60, deadline=10_000)  # a second is passed on a busy machine
    @given(st.text(max_size=50) | requests)
    def check(content: str) -> None:
        page = read_page(answer(content))
        reply = env.respond(sample, (answer(content),))
        assert (reply is not None) == (page is not None and 1 <= page <= len(sample.images))

    check()


@pytest.mark.parametrize("page", [0, 10, 99, 9999])
def test_what_is_not_there_ends_the_episode(page: int) -> None:
    env, _ = begun()
    _, reward, terminated, truncated, info = env.step(opening(page))
    assert (reward, terminated, truncated) == (-0.05, True, False)
    assert info["rewards"] == {"accuracy": 0.0, "format": 0.0, "found": 0.0, "opened": 1.0}


def test_a_request_is_no_answer_whatever_number_it_has(album: Path) -> None:
    row = json.loads(album.read_text()) | {"answer": "3"}
    terms = {"accuracy": 1.0, "relaxed": 1.0, "list": 1.0, "opened": -0.25}
    env, _ = begun(dataset=write(album, row), rewards=terms, max_turns=2)
    assert env.step(opening(3))[1:4] == (-0.25, False, False)
    _, reward, terminated, truncated, info = env.step(opening(3))
    assert (reward, terminated, truncated) == (-0.25, False, True)
    assert info["rewards"] == {"accuracy": 0.0, "relaxed": 0.0, "list": 0.0, "opened": 2.0}
    measured = env.measure(opening(3), info["target"], info["rewards"])
    assert (measured["accuracy"], measured["unparsable"], measured["opened"]) == (0.0, 1.0, 2.0)
    assert env.score(answer("3"), env.source.get(0)).terms["accuracy"] == 1


def test_budgets_end_episodes() -> None:
    env, _ = begun(max_turns=3)
    assert "Answer, or open another." in env.step(opening(1))[0]["prompt"]
    assert "Answer now." in env.step(opening(2))[0]["prompt"]
    assert env.step(opening(3))[2:4] == (False, True)
    env, _ = begun(max_images=2)
    env.step(opening(1))
    assert env.step(opening(2))[2:4] == (False, True)
    env, observation = begun(max_turns=1)
    assert "open" not in observation["prompt"]
    assert env.step(opening(1))[2:4] == (True, False)
    sample = env.source.get(0)
    assert env.write_turn(sample, ()) == env.write_answer(sample)


def test_metrics_tell_how_many_were_opened_and_whether_the_right_one_was(album: Path) -> None:
    row = json.loads(album.read_text())
    unknown = {name: cell for name, cell in row.items() if name != "evidence_pages"}
    env, _ = begun(dataset=write(album, row, row, unknown))
    played = [[opening(3), answer("blue")], [opening(1), opening(2), answer("red")], [answer("blue")]]
    answers = []
    for index, texts in enumerate(played):
        env.reset(options={"index": index})
        infos = [env.step(text)[4] for text in texts]
        measures = env.measure(texts[-1], infos[-1]["target"], infos[-1]["rewards"])
        answers.append({"index": index, "measures": measures, "prediction": None, "target": infos[-1]["target"]})
    found = summarise(env, answers)
    assert found["accuracy"].value == pytest.approx(2 / 3)
    assert found["opened"].value == pytest.approx(1)
    assert found["found"].value == pytest.approx(1 / 2)  # of the two whose image is known
    assert found_term(answer("blue"), answers[0]["target"], (opening(2), opening(3))) == 1


def test_it_is_drawn_as_its_sheet_and_told(album: Path) -> None:
    env, _ = begun(dataset=album, render_mode="ansi")
    env.step(opening(3))
    env.step(answer("blue"))
    told = env.render()
    assert 'assistant: <think></think><answer>{"open": 3}</answer>' in told
    assert "found 1" in told
    assert env.draw(env.source.get(0), None).shape == (426, 639, 3)


@pytest.mark.slow
def test_the_built_in_model_is_taught_and_trains_on_it(tmp_path: Path) -> None:
    small = {"prompts_per_step": 2, "eval_limit": 2, "max_new_tokens": 24, "device": "cpu", "max_pixels": 9216}
    taught = vlmenv.train(env="VLM-Search-v0", algo="sft", steps=1, output=tmp_path / "taught", **small)
    run = vlmenv.train(
        env="VLM-Search-v0", model=str(taught.path), steps=2, group_size=2, output=tmp_path / "run", **small
    )
    steps = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [one["step"] for one in steps] == [1, 2]
    assert all({"reward/opened", "reward/found", "completion/turns"} <= one.keys() for one in steps)
    after = json.loads((run.path / "evaluation.json").read_text())["after"]
    assert {"accuracy", "opened", "found"} <= after.keys()


def test_budgets_come_from_options() -> None:
    given = given_arguments(DataOptions(), PromptOptions(max_turns=2, max_images=3))
    task = make_envs("VLM-Search-v0", 1, **given).task
    assert (task.max_turns, task.max_images) == (2, 3)
