from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from conftest import shared
from gymnasium.utils.env_checker import check_env
from PIL import Image

from vlmenv.core.answers import NONE
from vlmenv.core.errors import ConfigError, DataError
from vlmenv.core.formats import AnswerFormat
from vlmenv.envs.data.dataset import TableSource, adopt_images, checked_once
from vlmenv.envs.data.images import load_image
from vlmenv.envs.rec import RECEnv
from vlmenv.envs.vector import VisualTaskVectorEnv
from vlmenv.envs.vqa import VQAEnv
from vlmenv.runs.data import fingerprint


def row(**changes: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>Find it."}, {"from": "gpt", "value": "[1, 2, 3, 4]"}]
    return {"id": 5, "image": "a.png", "conversations": turns} | changes


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def write(folder: Path, *rows: dict[str, Any] | str) -> Path:
    Image.new("RGB", (8, 6), "red").save(folder / "a.png")
    file = folder / "rows.jsonl"
    file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return file


def test_a_row_becomes_a_sample(tmp_path: Path) -> None:
    file = write(tmp_path, row(), "", row(id="x", conversations=turns("Find it.", "None")))
    env = RECEnv(dataset=file)
    assert env.source.size == 2
    first, second = env.source.get(0), env.source.get(1)
    assert (first.id, first.question, first.target) == ("5", "Find it.", (1, 2, 3, 4))
    assert first.images[0].shape == (6, 8, 3)
    assert (second.id, second.target) == ("x", NONE)


@pytest.mark.parametrize(
    ("question", "kept"),
    [
        ("<image>\n<image> What differs?", "What differs?"),
        ("In <image> and <image>?", "In <image> and <image>?"),
        ("<image> Compare it with <image>", "<image> Compare it with <image>"),
        ("What do both show? <image><image>", "What do both show? <image><image>"),
    ],
)
def test_marks_keep_their_places_and_leading_ones_say_nothing(tmp_path: Path, question: str, kept: str) -> None:
    file = write(tmp_path, row(image=["a.png", "a.png"], conversations=turns(question, "None")))
    env = RECEnv(dataset=file, prompt_template="Look. {question} Answer.")
    sample = env.source.get(0)
    assert (sample.question, len(sample.images)) == (kept, 2)
    assert env.observe(sample)["prompt"] == f"Look. {kept} Answer."


def test_images_may_lie_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    file = write(tmp_path, row())
    (tmp_path / "a.png").rename(folder / "a.png")
    assert RECEnv(dataset=file, image_root=folder).source.size == 1


@pytest.mark.parametrize("answer", ["<answer>[1, 2, 3, 4]</answer>", [1, 2, 3, 4], '{"bbox_2d": [1, 2, 3, 4]}'])
def test_answers_are_read_as_they_are_found_in_the_wild(tmp_path: Path, answer: Any) -> None:
    file = write(tmp_path, row(conversations=turns("Find it.", answer)))
    assert RECEnv(dataset=file).source.get(0).target == (1, 2, 3, 4)
    file = write(tmp_path, row(conversations=turns("Find it.", "<answer> None </answer>")))
    assert RECEnv(dataset=file).source.get(0).target == NONE


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{oops", "not JSON"),
        ("[" * 100_000, "not JSON"),
        (row(image="x" * 5000), "no image"),
        (row(conversations=turns("Find it.", None)), "no text"),  # type: ignore[arg-type]
        ("[1]", "not a JSON object"),
        (row(image="b.png"), "no image"),
        (row(conversations=turns("Find it.", "[1, 2, 3, 4]")[:1] * 2), "user and assistant must take turns"),
        (row(image=7), "neither a path"),
        (row(image=[]), "1 <image> marks for 0 images"),
        (row(image=None, conversations=turns("Find it.", "[1, 2, 3, 4]")), "needs an image"),
        (row(conversations="hello"), "not a list"),
        (row(conversations=turns("a", "b")[::-1]), "user and assistant must take turns"),
        (row(conversations=[{"from": "human"}, {"from": "gpt", "value": "b"}]), "no text"),
        (row(conversations=turns("<image><image>Find it.", "[1, 2, 3, 4]")), "2 <image> marks for 1 images"),
        (row(conversations=turns("Find it.", "somewhere")), "neither one box"),
        (row(conversations=turns("Find it.", "[4, 2, 3, 4]")), "neither one box"),
    ],
)
def test_a_faulty_row_is_named_with_file_and_line(tmp_path: Path, bad: dict[str, Any] | str, message: str) -> None:
    file = write(tmp_path, row(), bad)
    with pytest.raises(DataError, match=r"rows\.jsonl:2: ") as caught:
        RECEnv(dataset=file)
    assert message in str(caught.value)


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    file = write(tmp_path, row())
    (tmp_path / "a.png").write_text("no image")
    env = RECEnv(dataset=file)
    with pytest.raises(DataError, match=r"rows\.jsonl:1 \(id 5\): .*a\.png cannot be read as an image"):
        env.reset(seed=0)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    with pytest.raises(DataError, match="has no rows"):
        RECEnv(dataset=file)


def test_a_missing_file_and_a_missing_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        RECEnv(dataset=tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="no such folder"):
        RECEnv(dataset=write(tmp_path, row()), image_root=tmp_path / "none")


def test_an_epoch_shows_every_row_once(tmp_path: Path) -> None:
    file = write(tmp_path, *(row(id=i) for i in range(7)))
    env = gymnasium.make("VLM-REC-v0", dataset=file)
    shown = [env.reset(seed=3)[1]["id"]] + [env.reset()[1]["id"] for _ in range(13)]
    everything = [str(i) for i in range(7)]
    assert sorted(shown[:7]) == sorted(shown[7:]) == everything
    assert shown[:7] != shown[7:]
    assert shown[:7] != everything


def test_real_photos_and_expressions_load_and_their_truth_scores_the_maximum() -> None:
    env = RECEnv(dataset=shared("data/rec/refcocos/samples.jsonl"))
    check_env(env)
    assert env.source.size == 19
    without_target = 0
    for index in range(19):
        observation, _ = env.reset(options={"index": index})
        assert "this sentence describes" in observation["prompt"]
        assert "<image>" not in observation["prompt"]
        sample = env.source.get(index)
        _, reward, _, _, info = env.step(env.write_answer(sample))
        assert reward == pytest.approx(1.1)
        without_target += info["target"] == NONE
    assert without_target == 2


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (0, 0, 0, 0), (255, 255, 255)),
        ("LA", (0, 128), (127, 127, 127)),
        ("P", 0, (0, 0, 0)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 0x8001, (0x80, 0x80, 0x80)),
        ("CMYK", (0, 0, 0, 0), (255, 255, 255)),
    ],
)
def test_every_kind_of_image_becomes_rgb(tmp_path: Path, mode: str, colour: Any, expected: tuple[int, ...]) -> None:
    name = "b.tiff" if mode == "CMYK" else "b.png"
    Image.new(mode, (3, 2), colour).save(tmp_path / name)
    file = write(tmp_path, row(image=name, conversations=turns("Find it.", "None")))
    image = RECEnv(dataset=file).source.get(0).images[0]
    assert image.shape == (2, 3, 3)
    np.testing.assert_array_equal(image, np.broadcast_to(np.array(expected, dtype=np.uint8), (2, 3, 3)))


def test_the_cameras_orientation_is_honoured(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 2), "red")
    exif = picture.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture.save(tmp_path / "b.png", exif=exif)
    file = write(tmp_path, row(image="b.png", conversations=turns("Find it.", "None")))
    assert RECEnv(dataset=file).source.get(0).images[0].shape == (4, 2, 3)


def test_rows_are_left_out_by_what_they_say_and_show(tmp_path: Path) -> None:
    """Also what a row's reasoning says, whatever its letters; a side of 28 pixels is enough."""
    for name, size in {"good": (28, 90), "narrow": (27, 90), "low": (90, 27)}.items():
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    said = {"think": "<think>Let Me Rethink it.</think><answer>[1, 2, 3, 4]</answer>", "plain": "[1, 2, 3, 4]"}
    kinds = [("good", "plain"), ("low", "plain"), ("good", "think"), ("narrow", "plain"), ("good", "plain")]
    rows = [row(id=i, image=f"{k}.png", conversations=turns("Find it.", said[s])) for i, (k, s) in enumerate(kinds)]
    file = write(tmp_path, *rows)
    assert RECEnv(dataset=file).source.size == 5
    env = RECEnv(dataset=file, min_image_side=28, without_text=["let me rethink it"])
    assert [env.source.get(i).id for i in range(env.source.size or 0)] == ["0", "4"]
    assert env.source.unwanted == {
        "the answer says 'let me rethink it'": 1,
        "an image is under 28 pixels wide or high": 2,
    }
    with pytest.raises(DataError, match="no row is left: 0 are broken; in 5 an image is under 91"):
        RECEnv(dataset=file, min_image_side=91)
    with pytest.raises(ConfigError, match="are for a data set"):
        RECEnv(without_text=["x"])
    with pytest.raises(ConfigError, match="a list of texts"):
        RECEnv(dataset=file, without_text="x")


def test_images_are_of_usual_formats_regular_files_and_of_bounded_size(tmp_path: Path) -> None:
    """EPS would call an external program, a pipe would be waited for, a small file may unpack to gigabytes."""
    Image.new("RGB", (8, 6)).save(tmp_path / "a.eps")
    Image.new("1", (9500, 9500)).save(tmp_path / "large.png")
    os.mkfifo(tmp_path / "pipe.png")
    for name, message in (
        ("a.eps", r"a\.eps cannot be read as an image: it is none of PNG, JPEG"),
        ("large.png", r"large\.png cannot be read as an image: it has 9500 x 9500 pixels, more than 89,478,485"),
    ):
        env = RECEnv(dataset=write(tmp_path, row(image=name)))
        with pytest.raises(DataError, match=rf"rows\.jsonl:1.*{message}"):
            env.source.get(0)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: there is no image .*pipe\.png"):
        RECEnv(dataset=write(tmp_path, row(image="pipe.png")))
    with pytest.raises(DataError, match="it is no regular file"):
        load_image(str(tmp_path / "pipe.png"), "here")
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "ICO"):
        Image.new("RGB", (8, 6), "red").save(tmp_path / f"a.{kind}", kind)
        assert load_image(str(tmp_path / f"a.{kind}"), "here")[0].shape == (6, 8, 3)
    env = VQAEnv(dataset=[{"image": Image.open(tmp_path / "a.eps"), "question": "?", "answer": "a"}])
    with pytest.raises(DataError, match="it is EPS, and none of"):
        env.source.get(0)


def test_an_image_that_is_no_image_is_a_fault_where_its_size_matters(tmp_path: Path) -> None:
    file = write(tmp_path, row())
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: an image cannot be read"):
        RECEnv(dataset=file, min_image_side=2)


def test_a_written_out_answer_is_divided(tmp_path: Path) -> None:
    """Into what is compared and what may be imitated; also in the layout of `messages`, and in sections."""
    sections = AnswerFormat.SECTIONS.write("[5, 6, 7, 8]", "A red square.")
    tags = "<think>It is here.</think>\n<answer>[1, 2, 3, 4]</answer>"
    messages = [{"role": "user", "content": "<image>Find it."}, {"role": "assistant", "content": sections}]
    rows = [row(conversations=turns("Find it.", tags)), {"images": ["a.png"], "messages": messages}, row()]
    envs = VisualTaskVectorEnv(RECEnv, 3, answers=True, dataset=write(tmp_path, *rows))
    _, infos = envs.reset(options={"index": [0, 1, 2]})
    assert list(infos["answer"]) == [tags, sections, "<think></think><answer>[1,2,3,4]</answer>"]
    _, _, _, _, infos = envs.step(["<think>x</think><answer>[5,6,7,8]</answer>"] * 3)
    assert infos["target"][1] == (5, 6, 7, 8)
    assert infos["rewards"]["iou"].tolist() == [0, 1, 0]
    wrong = [{"role": "user", "content": "Find it."}, {"role": "system", "content": "None"}]
    with pytest.raises(DataError, match="'messages' has turns of user, system"):
        RECEnv(dataset=write(tmp_path, {"images": ["a.png"], "messages": wrong}))


def test_images_are_looked_for_once_and_by_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one process finds missing or too small, another that does not look leaves out alike."""
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    Image.new("RGB", (64, 8)).save(tmp_path / "b.png")
    rows = [{"image": f"{name}.png", "problem": "Where?", "answer": [1, 2, 3, 4]} for name in ("a", "none", "b", "a")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files, asked, real = [str(tmp_path / "rows.jsonl")] * 2, list[str](), TableSource._stamp
    monkeypatch.setattr(TableSource, "_stamp", lambda self, path: asked.append(path) or real(self, path))
    options: dict[str, Any] = {"skip_broken": True, "min_image_side": 20}
    with checked_once() as checks:
        looking = RECEnv(dataset=files, **options).source
    assert len(asked) == 4
    with checked_once(look=False):
        other = RECEnv(dataset=files, **options).source
    assert (other.size, len(asked)) == (8, 4)
    adopt_images(other, pickle.loads(pickle.dumps(checks)))
    assert other.size == looking.size == 4
    assert other.faults == looking.faults
    assert other.unwanted == looking.unwanted
    assert [other.place(i, "") for i in range(4)] == [looking.place(i, "") for i in range(4)]
    assert fingerprint(other) == fingerprint(looking)
    (tmp_path / "a.png").unlink()
    assert len(RECEnv(dataset=files[0], skip_broken=True).source.faults) == 3  # outside of the block nothing is kept
