"""Every layout of rows: a small file of it is read, and its truth scores through the environment."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import itertools
import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmenv.core.errors import ConfigError, DataError
from vlmenv.envs.base import VisualTaskEnv
from vlmenv.envs.captioning import CaptionEnv
from vlmenv.envs.data.rows import COLUMNS
from vlmenv.envs.math_reasoning import MathEnv
from vlmenv.envs.ovd import OVDEnv
from vlmenv.envs.pointing import PointEnv
from vlmenv.envs.rec import RECEnv
from vlmenv.envs.segmentation import SegmentEnv
from vlmenv.envs.vqa import VQAEnv


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(buffer, "PNG")
    return buffer.getvalue()


BASE64 = base64.b64encode(png()).decode()
URI = f"data:image/png;base64,{BASE64}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, colour in (("a", "red"), ("b", "blue")):
        (tmp_path / f"{name}.png").write_bytes(png(colour))
    return tmp_path


def dump(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    (folder / name).write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return folder / name


def said(role: str, *parts: Any) -> dict[str, Any]:
    return {"role": role, "content": parts[0] if len(parts) == 1 and isinstance(parts[0], str) else list(parts)}


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def score_truth(env: VisualTaskEnv, index: int = 0) -> tuple[Any, dict[str, Any]]:
    """What is shown of a sample, and what its true answer earns."""
    observation, _ = env.reset(options={"index": index})
    _, _, _, _, info = env.step(env.write_answer(env.source.get(index)))
    return observation, info


def check(env: VisualTaskEnv, question: str, images: int = 1, index: int = 0) -> Any:
    """The truth of a sample earns all there is; the observation."""
    observation, info = score_truth(env, index)
    assert next(iter(info["rewards"].values())) == pytest.approx(1), info
    assert question in observation["prompt"]
    assert len(observation["images"]) == images
    return observation


ROWS: dict[str, Any] = {
    "OpenAI": {
        "messages": [
            said("user", {"type": "image_url", "image_url": {"url": URI}}, text("Which colour?")),
            said("assistant", "red"),
        ]
    },
    "OpenAI's responses": {
        "messages": [
            said(
                "user", {"type": "input_image", "image_url": "a.png"}, {"type": "input_text", "text": "Which colour?"}
            ),
            said("assistant", {"type": "output_text", "text": "red"}),
        ]
    },
    "Qwen": {
        "messages": [
            said("user", {"type": "image", "image": "a.png"}, {"type": "text", "text": "Which colour?"}),
            said("assistant", text("red")),
        ]
    },
    "Qwen, file URL": {
        "messages": [
            said("user", {"image": "file://{folder}/a.png"}, {"text": "Which colour?"}),
            said("assistant", "red"),
        ]
    },
    "transformers": {
        "messages": [said("user", {"type": "image", "path": "a.png"}, text("Which colour?")), said("assistant", "red")]
    },
    "TRL, parts": {
        "images": ["a.png"],
        "messages": [said("user", {"type": "image"}, text("Which colour?")), said("assistant", text("red"))],
    },
    "TRL, prompt and completion": {
        "image": "a.png",
        "prompt": [said("user", "Which colour?")],
        "completion": [said("assistant", "red")],
    },
    "TRL, prompt and solution": {"image": "a.png", "prompt": [said("user", "Which colour?")], "solution": "red"},
    "TRL, plain": {"image": "a.png", "prompt": "Which colour?", "solution": "<think>see</think><answer>red</answer>"},
    "ms-swift": {"query": "<image>Which colour?", "response": "red", "images": ["a.png"]},
    "verl": {
        "data_source": "x",
        "prompt": [said("user", "<image>Which colour?")],
        "images": [{"path": "a.png"}],
        "reward_model": {"style": "rule", "ground_truth": "red"},
        "extra_info": {"index": 0},
    },
    "messages as JSON": {
        "images": ["a.png"],
        "messages": json.dumps([said("user", "<image>Which colour?"), said("assistant", "red")]),
    },
    "data URI": {"image": URI, "question": "Which colour?", "answer": "red"},
    "VQAv2": {
        "image": "a.png",
        "question": "Which colour?",
        "answers": [{"answer": "red", "answer_id": 1}, {"answer": "crimson", "answer_id": 2}],
    },
    "choices in columns": {
        "image": "a.png",
        "question": "Which colour?",
        "option_a": "red",
        "option_b": "blue",
        "answer": "red",
    },
    "choices in numbered columns": {
        "image": "a.png",
        "question": "Which colour?",
        "Option 1": "red",
        "Option 2": "blue",
        "answer": "A",
    },
    "NExT-QA": {"image": "a.png", "question": "Which colour?", "a0": "blue", "a1": "red", "a2": "1", "answer": "blue"},
    "base64": {"image": BASE64, "question": "Which colour?", "answer": "red"},
}


@pytest.mark.parametrize("layout", ROWS)
def test_a_row_is_read_and_its_truth_scores(folder: Path, layout: str) -> None:
    row = json.loads(json.dumps(ROWS[layout]).replace("{folder}", str(folder)))
    env = VQAEnv(dataset=dump(folder, row))
    observation = check(env, "Which colour?")
    assert observation["images"][0][0, 0].tolist() == [255, 0, 0]
    assert "<image>" not in observation["prompt"]
    assert env.source.usage is not None
    assert {"question", "answer", "images"} <= env.source.usage.used.keys()
    assert set(env.source.usage.unused) <= {"data_source", "extra_info"}


@pytest.mark.parametrize(
    ("columns", "answer", "letter"),
    [
        ({"a0": "blue", "a1": "red"}, 0, "A"),
        ({"a0": "blue", "a1": "red"}, "1", "B"),
        ({"option_0": "blue", "option_1": "red"}, 1, "B"),
        ({"a0": "0", "a1": "1"}, 1, "B"),
        ({"a0": "1", "a1": "0"}, 1, None),
        ({"a0": "blue", "a1": "red"}, 2, None),
        ({"choice1": "blue", "choice2": "red"}, 1, None),  # from 0 or from 1: the row does not say
    ],
)
def test_the_number_of_a_choice_whose_columns_count_from_zero(
    folder: Path, columns: dict[str, str], answer: Any, letter: str | None
) -> None:
    row = {"image": "a.png", "question": "Which colour?", "answer": answer, **columns}
    if letter is None:
        with pytest.raises(DataError, match=r"give its letter|neither one of the letters A to B"):
            VQAEnv(dataset=dump(folder, row))
        return
    env = VQAEnv(dataset=dump(folder, row))
    observation, _ = env.reset()
    assert env.source.get(0).target.text == letter
    assert all(f"({one}) {text}" in observation["prompt"] for one, text in zip("AB", columns.values(), strict=True))


def test_the_rows_of_the_page_are_read(folder: Path) -> None:
    page = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```json\n(.*?)```", page, flags=re.DOTALL)
    (folder / "a.png").rename(folder / "1.png")
    rows = [json.loads(line) for line in block.splitlines()]
    assert len(rows) >= 12
    for row in rows:
        task = VQAEnv if "objects" not in row else RECEnv if "ref" in row["objects"] else OVDEnv
        check(task(dataset=dump(folder, row)), "Which?" if task is VQAEnv else "")


@pytest.mark.parametrize(
    "column",
    [
        *("images", "image", "image_path", "image_paths", "img", "img_path", "picture", "photo", "decoded_image"),
        *("image_file", "image_url", "file_name", "image_1", "image1", "img_0", "page_1"),
    ],
)
def test_images_are_read_from_columns_of_usual_names(folder: Path, column: str) -> None:
    env = VQAEnv(dataset=dump(folder, {column: "a.png", "question": "Which colour?", "answer": "red"}))
    check(env, "Which colour?")
    assert env.source.usage is not None
    assert env.source.usage.used["images"] == {column: 1}
    assert env.source.usage.images == {1: 1}


def test_numbered_images_and_marks_keep_their_places(folder: Path) -> None:
    """As in MMMU: columns that are filled up with None; a mark that comes again is a reference."""
    row = {"image_1": "a.png", "image_2": {"path": "b.png", "bytes": None}, "image_3": None, "answer": "B"}
    questions = {
        "See <image 2>, then <image 1>.": ("See <image>, then <image>.", "blue"),
        "See <image 1>, then <image 2>, as <image 1>.": ("See <image>, then <image>, as image 1.", "red"),
        "Compare <image 2> only.": ("Compare image 2 only.", "red"),
    }
    rows = [{**row, "question": question, "options": "['cat', 'dog']"} for question in questions]
    env = VQAEnv(dataset=dump(folder, *rows))
    for index, (shown, first) in enumerate(questions.values()):
        observation = check(env, shown, images=2, index=index)
        assert observation["prompt"].endswith("(A) cat\n(B) dog")
        assert observation["images"][0][0, 0].tolist() == ([255, 0, 0] if first == "red" else [0, 0, 255])
    with pytest.raises(DataError, match="a mark of image 3, but the row has 2 images"):
        VQAEnv(dataset=dump(folder, {**row, "question": "<image 3>?"}))


def test_pages_are_images_if_they_are_pictures(folder: Path) -> None:
    """As in SlideVQA, whose columns are filled up with None."""
    asked = {"question": "Which colour?", "answer": "red"}
    slides = {"page_2": "b.png", "page_1": "a.png", "page_3": None}
    observation = check(VQAEnv(dataset=dump(folder, slides | asked)), "Which colour?", images=2)
    assert [image[0, 0].tolist() for image in observation["images"]] == [[255, 0, 0], [0, 0, 255]]
    env = VQAEnv(dataset=dump(folder, {"image": "a.png", "page_1": "Once upon a time"} | asked))
    check(env, "Which colour?")
    assert env.source.usage is not None
    assert env.source.usage.unused == {"page_1": 1}


def test_of_two_columns_with_images_the_one_with_pictures_is_shown_and_told(folder: Path) -> None:
    """As in MathVista's parquet files, whose `image` is a path that leads nowhere."""
    rows = [{"image": "images/1.jpg", "decoded_image": {"bytes": png("blue")}, "question": "Why?", "answer": "yes"}]
    env = VQAEnv(dataset=rows)
    observation = check(env, "Why?")
    assert observation["images"][0][0, 0].tolist() == [0, 0, 255]
    assert env.source.usage is not None
    assert "the images of 'decoded_image' are shown, and not those of 'image'" in str(env.source.usage)
    env = VQAEnv(dataset=dump(folder, {"image": "a.png", "mask": "b.png", "question": "Why?", "answer": "yes"}))
    assert env.source.usage is not None
    assert env.source.usage.warnings() == ["columns that the task does not read: 'mask'"]


def test_turns_before_the_question_are_shown(folder: Path) -> None:
    turns = [
        said("system", "Be brief."),
        said("user", {"type": "image", "image": "b.png"}, text("Which colour?")),
        said("assistant", "blue"),
        said("user", text("And "), {"type": "image", "image": "a.png"}, text("?")),
        said("assistant", "red"),
    ]
    swift = {
        "system": "Be brief.",
        "history": [["<image>Which colour?", "blue"]],
        "query": "And <image>?",
        "response": "red",
        "images": ["b.png", "a.png"],
    }
    unmarked = {
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "What is it?"},
            {"from": "gpt", "value": "a square"},
            {"from": "human", "value": "Which colour?"},
            {"from": "gpt", "value": "red"},
        ],
    }
    env = VQAEnv(dataset=dump(folder, {"messages": turns}, swift, unmarked))
    for index in range(2):
        observation = check(env, "And <image>?", images=2, index=index)
        assert observation["turns"] == (
            {"role": "system", "text": "Be brief."},
            {"role": "user", "text": "<image>Which colour?"},
            {"role": "assistant", "text": "blue"},
        )
    observation = check(env, "Which colour?", index=2)
    assert observation["turns"][0] == {"role": "user", "text": "<image>What is it?"}


def test_boxes_in_the_place_of_marks(folder: Path) -> None:
    """As ms-swift stores them, in its third and its second version."""
    third = {
        "messages": [said("user", "<image>Find <ref-object>."), said("assistant", "<bbox>")],
        "images": ["a.png"],
        "objects": {"ref": ["the square"], "bbox": [[2, 3, 20.5, 25]]},
    }
    second = {
        "query": "Find <ref-object>.",
        "response": "<bbox>",
        "images": ["a.png"],
        "objects": json.dumps([{"caption": "the square", "bbox": [2, 3, 20.5, 25], "bbox_type": "real", "image": 0}]),
    }
    env = RECEnv(dataset=dump(folder, third, second))
    for index in range(2):
        check_box(env, "Find the square.", (2, 3, 20.5, 25), index)
    several = {
        "images": ["a.png"],
        "query": "Detect cats and dogs.",
        "response": '[{"bbox_2d": <bbox>, "label": "<ref-object>"}, {"bbox_2d": <bbox>, "label": "<ref-object>"}]',
        "objects": {"ref": ["cat", "dog"], "bbox": [[0, 0, 9, 9], [10, 10, 30, 30]]},
    }
    check(OVDEnv(dataset=dump(folder, several)), "Detect cats and dogs.")
    for wrong, message in (
        ({"bbox": [[1, 2, 3, 4]] * 2, "ref": ["x"]}, "1 <bbox> marks, but 'objects' has 2"),
        ({"bbox": [[1, 2, 3, 4]], "ref": []}, "1 <ref-object> marks, but 'objects' has 0"),
        ({"bbox": [[0.1, 0.2, 0.3, 0.4]], "ref": ["x"], "bbox_type": "norm1"}, "of type 'norm1'"),
        ({"bbox": ["x"], "ref": ["x"]}, "no list of numbers"),
    ):
        with pytest.raises(DataError, match=message):
            RECEnv(dataset=dump(folder, third | {"objects": wrong}))


def check_box(env: RECEnv, question: str, box: tuple[float, ...], index: int = 0) -> None:
    observation, info = score_truth(env, index)
    assert question in observation["prompt"]
    assert info["target"] == box
    assert info["rewards"]["iou"] > 0.95  # answers are whole numbers


def test_detection_of_hugging_face(folder: Path) -> None:
    """Boxes are x, y, width, height; categories have names in the features, of which absent ones are asked for too."""
    names = ["cat", "dog", "owl"]
    objects = [
        {"bbox": [[1.0, 2.0, 10.0, 20.0], [0.0, 0.0, 5.0, 5.0]], "category": [1, 0]},
        {"bbox": [], "category": []},
    ]
    rows = {"image_id": [7, 8], "image": [{"bytes": png(), "path": None}] * 2, "objects": objects}
    inner = {
        "bbox": datasets.List(datasets.List(datasets.Value("float32"))),
        "category": datasets.List(datasets.ClassLabel(names=names)),
    }
    features = datasets.Features({"image_id": datasets.Value("int64"), "image": datasets.Image(), "objects": inner})
    env = OVDEnv(dataset=datasets.Dataset.from_dict(rows, features=features))
    check(env, "Detect all of these: ")
    assert [one[:2] for one in env.source.get(0).target] == [("dog", (1, 2, 11, 22)), ("cat", (0, 0, 5, 5))]
    asked = env.source.get(0).question.removeprefix("Detect all of these: ").removesuffix(".").split(", ")
    assert sorted(asked) == names
    assert env.source.get(1).target == ()
    lines = {"file_name": "a.png", "objects": {"bbox": [[1, 2, 10, 20]], "categories": ["dog"]}}
    env = OVDEnv(dataset=dump(folder, lines))
    check(env, "Detect all of these: dog.")
    with pytest.raises(DataError, match="have no names in 'category'"):
        OVDEnv(dataset=dump(folder, lines | {"objects": {"bbox": [[1, 2, 10, 20]], "categories": [1]}}))


@pytest.mark.parametrize("task", [RECEnv, OVDEnv, PointEnv, SegmentEnv])
@pytest.mark.parametrize("answer", [[], "[]"])
@pytest.mark.parametrize("column", ["answer", "label"])
def test_an_empty_list_says_that_there_is_nothing(
    folder: Path, task: type[VisualTaskEnv], answer: Any, column: str
) -> None:
    rows = [{"image": "a.png", "question": "Find every cat.", column: one} for one in (answer, "None")]
    env = task(dataset=dump(folder, *rows), columns={"answer": "label"} if column == "label" else {})
    empty, none = map(env.source.get, range(2))
    assert empty.target == none.target
    assert env.score(env.write_answer(empty), empty).reward == pytest.approx(1.1)


def test_an_empty_list_is_no_answer_in_words_and_gives_way_to_boxes(folder: Path) -> None:
    row = {"image": "a.png", "question": "What is it?", "answer": [], "label": []}
    for columns in ({}, {"answer": "label"}):
        with pytest.raises(DataError, match="the row has no answer"):
            VQAEnv(dataset=dump(folder, row), columns=columns)
    objects = {"bbox": [[1, 2, 10, 10]], "category": ["cat"]}
    (found,) = OVDEnv(dataset=dump(folder, row | {"objects": objects})).source.get(0).target
    assert found.box == (1, 2, 11, 12)


def test_verl_and_messages_with_pictures_within_parquet(folder: Path) -> None:
    parts = [said("user", {"type": "image", "image": {"bytes": png()}}, {"type": "text", "text": "Which colour?"})]
    answer = [{"role": "assistant", "content": [{"type": "text", "text": "red", "image": None}]}]
    verl = ROWS["verl"] | {"images": [{"bytes": png(), "path": None}]}
    for rows in ([{"messages": parts + answer}], [verl]):
        datasets.Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
        check(VQAEnv(dataset=folder / "rows.parquet"), "Which colour?")


def as_csv(rows: list[dict[str, Any]], delimiter: str = ",") -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


PLAIN = [
    {"id": "x", "image": "a.png", "question": 'Which\ncolour, "now"?', "answer": "red"},
    {"id": "ü", "image": "b.png", "question": "Which one, ä?", "answer": "blue"},
]
FILES: dict[str, Callable[[], str]] = {
    "rows.csv": lambda: as_csv(PLAIN),
    "semicolons.csv": lambda: "\ufeff" + as_csv(PLAIN, ";"),
    "rows.tsv": lambda: as_csv(PLAIN, "\t"),
    "pandas.csv": lambda: as_csv([{"": i, **row} for i, row in enumerate(PLAIN)]),
    "data.json": lambda: json.dumps({"version": "1", "info": {"a": [1]}, "data": PLAIN, "more": 1}, indent=1),
    "ids.json": lambda: json.dumps(
        {row["id"]: {k: row[k] for k in row if k != "id"} for row in PLAIN}, ensure_ascii=False
    ),
    "lines.json": lambda: "\n".join(map(json.dumps, PLAIN)),
    "list.jsonl": lambda: json.dumps(PLAIN, indent=1),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_files_of_rows(folder: Path, name: str, packed: bool) -> None:
    content = FILES[name]().encode()
    file = folder / (f"{name}.gz" if packed else name)
    file.write_bytes(gzip.compress(content) if packed else content)
    env = VQAEnv(dataset=file)
    assert [env.source.get(i).id for i in range(2)] == ["x", "ü"]
    check(env, 'colour, "now"?')
    check(env, "Which one, ä?", index=1)
    assert env.source.get(1).images[0][0, 0].tolist() == [0, 0, 255]


def test_faults_in_tables_are_named_by_line(folder: Path) -> None:
    for content, message in (
        (
            'id,image,question,answer\n1,a.png,"a\nb",red\n2,a.png,Why?\n',
            r"rows\.csv:4: the row has 3 cells for 4 columns",
        ),
        ("id,id\n1,2\n", r"rows\.csv:1: the first line must name the columns; 'id'"),
        ("question,answer\nWhy?,\n", r"rows\.csv:2: the row has no answer"),
        ("question,answer\n", "has no rows"),
        ("", "has no rows"),
    ):
        (folder / "rows.csv").write_text(content)
        with pytest.raises(DataError, match=message):
            VQAEnv(dataset=folder / "rows.csv")
    (folder / "rows.csv").write_bytes(b"question,answer\nWhy\xff,x\n")
    with pytest.raises(DataError, match=r"rows\.csv:2: not UTF-8"):
        VQAEnv(dataset=folder / "rows.csv")
    (folder / "rows.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="cannot be unpacked"):
        VQAEnv(dataset=folder / "rows.jsonl.gz")


def test_tables_of_vlmevalkit(folder: Path) -> None:
    """Images in base64, one that is the index of another row, several in one cell; options in columns A, B, C, D."""
    row = {"index": 7, "image": BASE64, "question": "Which colour?", "A": "red", "B": "blue", "C": "", "answer": "A"}
    rows = [
        row,
        row | {"index": 8, "image": "7", "answer": "B"},
        row | {"index": 9, "image": f"['{BASE64}', '{BASE64}']"},
    ]
    (folder / "rows.tsv").write_text(as_csv(rows, "\t"))
    env = VQAEnv(dataset=folder / "rows.tsv")
    assert [env.source.get(i).id for i in range(3)] == ["7", "8", "9"]
    for index, images in enumerate((1, 1, 2)):
        observation = check(env, "Which colour?\n(A) red\n(B) blue", images=images, index=index)
        assert observation["images"][0][0, 0].tolist() == [255, 0, 0]
    assert env.source.get(1).target.text == "B"


WORDS = st.sampled_from(["", "a.png", "<image>", "<image 2>", "<bbox>", "[1, 2, 30, 40]", "[{}]", "user", "gpt", "A"])
KEYS = st.sampled_from(
    ["role", "from", "content", "value", "type", "text", "image", "bbox", "category", "ref", "bytes"]
)
CELLS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.slow
@settings(max_examples=300)
@given(
    st.dictionaries(st.sampled_from([*itertools.chain(*COLUMNS.values()), "image_1", "B", "video"]), CELLS, max_size=6)
)
def test_any_row_is_read_or_named_as_broken(row: dict[str, Any]) -> None:
    for task in (VQAEnv, RECEnv, OVDEnv):
        with suppress(ValueError):
            task().reading().sample(row, 0)


REFUSED = {
    "a video": ({"videos": ["a.mp4"]}, "a video in 'videos'.* store frames as 'images'"),
    "a video's path": ({"video_path": "a.mp4"}, "a video in 'video_path'"),
    "a sound": ({"audio": "a.wav"}, "sound in 'audio'"),
    "a video's mark": ({"question": "<video>Why?"}, "1 <video> marks for 0 videos"),
    "an image elsewhere": (
        {"screen": "a.png"},
        "'screen' holds an image.* --columns images screen",
    ),
    "a picture elsewhere": ({"thing": {"bytes": None, "path": "a.png"}}, "'thing' holds an image"),
    "an image on the web": ({"image": "https://x.org/a.png"}, "lies on the web: download it first"),
    "no question": (
        {"question": None, "Q": "Why?"},
        "no question.* its columns are .*'Q'.* --columns question",
    ),
    "no answer": ({"answer": None, "Label": "yes"}, "no answer.* its columns are 'Label'.* --columns answer"),
    "a video's part": (
        {"messages": [said("user", {"type": "video", "video": "a.mp4"}, text("?")), said("assistant", "x")]},
        "a video in 'messages'",
    ),
    "a tool's turn": ({"messages": [said("user", "?"), said("tool", "x")]}, "a turn of 'tool'"),
    "two questions": ({"messages": [said("user", "?"), said("user", "!")]}, "must take turns"),
    "no base64": ({"image": "data:image/png;base64,abc"}, "is not base64"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("task", [VQAEnv, MathEnv])
def test_what_is_not_shown_is_refused(folder: Path, task: type[VQAEnv], case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: .*{message}"):
        task(dataset=dump(folder, {"question": "Why?", "answer": "yes"} | changes))


def test_an_image_can_be_left_out_on_purpose(folder: Path) -> None:
    file = dump(folder, {"question": "Why?", "answer": "yes", "screenshot": "a.png"})
    check(VQAEnv(dataset=file, columns={"images": ""}), "Why?", images=0)
    check(VQAEnv(dataset=file, columns={"images": "screenshot"}), "Why?")


@pytest.mark.parametrize(
    ("task", "columns", "prompt", "unused"),
    [
        (RECEnv, {"answer": "[1, 2, 3, 4]", "choices": ["a", "b"]}, "Where?", {"choices"}),
        (RECEnv, {"answer": "[1, 2, 3, 4]", "A": "a", "B": "b", "solution": "x"}, "Where?", {"A", "B", "solution"}),
        (RECEnv, {"answer": "[1, 2, 3, 4]", "options": 5, "tolerance": "wide"}, "Where?", {"options", "tolerance"}),
        (OVDEnv, {"answer": "None", "choices": ["a"], "keywords": ["b"]}, "Where?", {"choices", "keywords"}),
        (VQAEnv, {"answer": "red", "tolerance": 0.5, "key_word": ["b"]}, "Where?", {"tolerance", "key_word"}),
        (VQAEnv, {"answer": "5", "tolerance": 0.5, "unit": "cm"}, "Where?", {"unit"}),
        (VQAEnv, {"answer": "A", "A": "red", "B": "blue", "hint": "c"}, "Hint: c\nWhere?\n(A) red\n(B) blue", set()),
        (VQAEnv, {"answer": "A", "choices": ["p", "q"], "A": "x", "B": "y"}, "Where?\n(A) p\n(B) q", {"A", "B"}),
        (MathEnv, {"answer": "5", "hint": "Where?", "precision": 1}, "Where?", {"precision"}),
        (MathEnv, {"answer": "x^2", "tolerance": 1, "rationale": "r"}, "Where?", None),
        (CaptionEnv, {"key_word": ["a"], "choices": ["a", "b"], "tolerance": 1}, None, {"choices", "tolerance"}),
        (CaptionEnv, {"key_word": ["a"], "choices": ["a", "b"], "answer": "A", "level": 2}, None, {"level"}),
    ],
)
def test_no_column_is_dropped_in_silence(
    folder: Path, task: Any, columns: dict[str, Any], prompt: str | None, unused: set[str] | None
) -> None:
    """A column is used, or it is told; one that is not used changes neither prompt nor truth."""
    data = dump(folder, {"image": "a.png", "question": "Where?"} | columns)
    options = {"rewards": {"keywords": 1.0}} if task is CaptionEnv else {}
    if unused is None:  # a tolerance asks for a number
        with pytest.raises(DataError, match="no single finite number"):
            task(dataset=data)
        return
    source = task(dataset=data, **options).source
    assert prompt is None or source.get(0).question == prompt
    assert {*source.usage.unused} == unused
    told = " ".join(source.usage.warnings())
    assert all(f"'{column}'" in told for column in unused)
    assert ("the hint is put before" in told) == ("hint" in columns and columns["hint"] != "Where?")


def test_a_column_cannot_be_named_for_what_a_task_does_not_read(folder: Path) -> None:
    with pytest.raises(ConfigError, match="the task does not read choices"):
        RECEnv(dataset=dump(folder, {"image": "a.png"}), columns={"choices": "options"})


def test_columns_that_a_task_does_not_read_are_counted(folder: Path) -> None:
    row = {"image": "a.png", "question": "Where?", "answer": "[1, 2, 3, 4]", "key_word": ["x"]}
    env = RECEnv(dataset=dump(folder, row, row | {"options": ["a", "b"], "level": 3}, row | {"key_word": []}))
    usage = env.source.usage
    assert usage is not None
    assert (usage.rows, usage.images) == (3, {1: 3})
    assert usage.unused == {"key_word": 2, "options": 1, "level": 1}
    assert usage.used == {"question": {"question": 3}, "answer": {"answer": 3}, "images": {"image": 3}}
    assert str(usage).splitlines()[:2] == ["images: 3 rows with 1", "question from 'question'"]
    both = RECEnv(dataset=[dump(folder, row), dump(folder, row, name="more.jsonl")])
    assert both.source.usage is not None
    assert both.source.usage.rows == 2


COCO: dict[str, Any] = {
    "images": [{"id": "x-1", "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
    "annotations": [
        {"id": "u", "image_id": "x-1", "category_id": "c", "bbox": [1, 2, 10, 20]},
        {"id": "v", "image_id": "2", "category_id": "d", "segmentation": [[1, 2, 9, 2, 9, 12]]},
    ],
    "categories": [{"id": "c", "name": "cat"}, {"id": "d", "name": "dog"}],
}


def test_coco_with_ids_of_text_and_outlines(folder: Path) -> None:
    file = dump(folder, COCO, name="i.json")
    env = OVDEnv(dataset=file)
    check(env, "Detect all of these: ")
    check(env, "Detect all of these: ", index=1)
    assert env.source.get(0).id == "x-1"
    assert env.source.get(1).target[0].box == (1, 2, 9, 12)
    assert env.source.usage is not None
    assert "1 annotations have no bbox: the boxes of their outlines are used" in str(env.source.usage)
    runs = {"size": [30, 40], "counts": [30 * 4 + 5, 10, 30 * 39]}  # columns first: x 4, y 5 to 15
    rle = COCO["annotations"][1] | {"segmentation": runs}
    env = OVDEnv(dataset=dump(folder, COCO | {"annotations": [COCO["annotations"][0], rle]}, name="i.json"))
    assert env.source.get(1).target[0].box == (4, 5, 5, 15)


def test_coco_without_names_of_files_says_so(folder: Path) -> None:
    with pytest.raises(DataError, match="no image has a 'file_name'; the first has 'id', 'path'"):
        OVDEnv(dataset=dump(folder, COCO | {"images": [{"id": "x-1", "path": "a.png"}]}, name="i.json"))


def test_placeholder_categories_are_not_asked_for(folder: Path) -> None:
    """Roboflow's first category heads the others, labelme's stand for no object; a used one is a category."""
    more = [
        {"id": 0, "name": "animals", "supercategory": "none"},
        {"id": "c", "name": "cat", "supercategory": "animals"},
        {"id": "d", "name": "dog", "supercategory": "animals"},
        {"id": 5, "name": "_background_", "supercategory": None},
        {"id": 6, "name": "owl", "supercategory": "owl"},
    ]
    env = OVDEnv(dataset=dump(folder, COCO | {"categories": more}, name="i.json"))
    asked = {
        name for i in range(2) for name in env.source.get(i).question.removesuffix(".").partition(": ")[2].split(", ")
    }
    assert asked <= {"cat", "dog", "owl"}
    assert env.source.usage is not None
    assert "nothing is annotated as '_background_', 'animals', a placeholder" in str(env.source.usage)
    used = COCO["annotations"] + [{"id": "w", "image_id": 2, "category_id": 0, "bbox": [0, 0, 5, 5]}]
    env = OVDEnv(dataset=dump(folder, COCO | {"categories": more, "annotations": used}, name="i.json"))
    assert "animals" in env.source.get(1).question
