"""Every layout of data sets, read through `open_dataset`."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlmenv.core.answers import Detection
from vlmenv.core.errors import ConfigError, DataError
from vlmenv.envs.data import tables
from vlmenv.envs.data.dataset import Reading, open_dataset
from vlmenv.envs.data.rows import Row
from vlmenv.envs.data.source import Sample
from vlmenv.envs.data.tables import JSONStream


def understand(row: Row) -> Sample:
    if row.answer == "bad":
        raise ValueError("the answer is bad")
    return Sample(row.id, (), row.question, row.answer, rationale=" ".join(row.keywords), subject=row.subject)


READING = Reading(understand)


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), colour).save(buffer, "PNG")
    return buffer.getvalue()


def easy(**changes: Any) -> dict[str, Any]:
    return {"problem": "<image>Why?", "answer": "B", "images": ["a.png"], "qid": "q", "key_word": ["cat"]} | changes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(png())
    return tmp_path


def dump(folder: Path, name: str, content: Any) -> Path:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder / name


def check(sample: Sample, **parts: Any) -> None:
    assert {name: getattr(sample, name) for name in parts} == parts
    assert [image.shape for image in sample.images] == [(3, 4, 3)] * len(sample.images)


def test_rows_with_problem_and_answer_in_a_list_and_in_lines(folder: Path) -> None:
    rows = [easy(), easy(qid=7, answer=3.5, images=["a.png", "a.png"], problem="<image><image>Ä?")]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    for file in (
        dump(folder, "rows.json", json.dumps(rows, indent=1, ensure_ascii=False)),
        dump(folder, "rows.jsonl", lines),
    ):
        source = open_dataset(file, READING)
        assert source.size == 2
        check(source.get(0), id="q", question="Why?", target="B", rationale="cat")
        check(source.get(1), id="7", question="Ä?", target="3.5")
        assert len(source.get(1).images) == 2


def test_parquet_with_images_within(folder: Path) -> None:
    rows = [easy(images=[{"bytes": png(), "path": None}]), easy(images=[{"bytes": png()}] * 2, problem="Which?")]
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(folder / "rows.parquet")
    source = open_dataset(folder / "rows.parquet", READING)
    check(source.get(0), id="q", question="Why?", target="B", rationale="cat")
    assert len(source.get(1).images) == 2
    wrong = datasets.Dataset.from_list([rows[0], easy(images=[{"bytes": png()}] * 2)])
    wrong.to_parquet(folder / "wrong.parquet")
    with pytest.raises(DataError, match=r"wrong\.parquet: row 1: the question has 1 <image> marks for 2 images"):
        open_dataset(folder / "wrong.parquet", READING)


def test_hugging_face_data_sets(folder: Path) -> None:
    """As objects, shuffled, saved, and as a folder in the hub's layout; with decoded images, and a map of columns."""
    pictures = [Image.new("RGB", (4, 3), (10 * i, 0, 0)) for i in range(5)]
    data = datasets.Dataset.from_dict({"picture": pictures, "query": list("vwxyz"), "label": list("abcde")})
    data = data.cast_column("picture", datasets.Image())
    columns = {"images": "picture", "question": "query", "answer": "label"}
    reading = Reading(understand, columns=columns)
    data.save_to_disk(folder / "saved")
    datasets.DatasetDict({"train": data, "val": data.select([4])}).save_to_disk(folder / "splits")
    (folder / "hub" / "data").mkdir(parents=True)
    data.to_parquet(folder / "hub" / "data" / "train-00000-of-00001.parquet")
    for dataset, split, shift in (
        (data, None, 0),
        (folder / "saved", None, 0),
        (folder / "splits", None, 0),
        (folder / "hub", "train", 0),
        (data.select([2, 3]), None, 2),
        (folder / "splits", "val", 4),
        (datasets.DatasetDict({"val": data}), "val", 0),
    ):
        source = open_dataset(dataset, reading, split=split)
        sample = source.get(0)
        check(sample, target="abcde"[shift], question="vwxyz"[shift])
        assert sample.images[0][0, 0].tolist() == [10 * shift, 0, 0]
    with pytest.raises(ConfigError, match="no split 'test', but train, val"):
        open_dataset(datasets.DatasetDict(train=data, val=data), reading, split="test")
    with pytest.raises(ConfigError, match="has no splits"):
        open_dataset(data, reading, split="test")
    with pytest.raises(DataError, match=r"row 0: the row has no column 'text', which .* for 'question'"):
        open_dataset(data, Reading(understand, columns={"question": "text"}))
    with pytest.raises(ConfigError, match=r"unknown part of a row 'qestion'\. Did you mean 'question'"):
        Reading(understand, columns={"qestion": "text"})
    with pytest.raises(ConfigError, match="not streamed"):
        open_dataset(data.to_iterable_dataset(), reading)


def test_paths_in_a_data_set_are_relative_to_the_image_root(folder: Path) -> None:
    data = datasets.Dataset.from_list([easy()])
    assert open_dataset(data, READING, image_root=folder).get(0).images[0].shape == (3, 4, 3)
    with pytest.raises(DataError, match=r"row 0: there is no image .*b\.png"):
        open_dataset(datasets.Dataset.from_list([easy(images=["b.png"])]), READING, image_root=folder)


def test_rows_in_memory_hold_pictures_or_bytes() -> None:
    pictures: Sequence[Any] = (png(), Image.new("RGB", (4, 3)), {"bytes": png(), "path": "x.png"})
    source = open_dataset([easy(images=picture) for picture in pictures], READING)
    for index in range(3):
        check(source.get(index), id="q")
    with pytest.raises(DataError, match="row 0: an image is neither a path"):
        open_dataset([easy(images=5)], READING)
    broken = open_dataset([easy(images=b"no image")], READING)
    with pytest.raises(DataError, match=r"row 0 \(id q\): an image within the row \(bytes\) cannot be read"):
        broken.get(0)


def test_several_files_each_with_its_folder(folder: Path) -> None:
    for name, colour in (("x", "red"), ("y", "blue")):
        (folder / name).mkdir()
        (folder / name / "p.png").write_bytes(png(colour))
    files = [
        dump(folder, "one.jsonl", "\n".join(json.dumps(easy(qid=i, images=["p.png"])) for i in range(2))),
        dump(folder, "two.json", [easy(qid=2, images=["p.png"])]),
    ]
    source = open_dataset(files, READING, image_root=[folder / "x", folder / "y"])
    assert [source.get(i).id for i in range(3)] == ["0", "1", "2"]
    assert [source.get(i).images[0][0, 0].tolist() for i in (1, 2)] == [[255, 0, 0], [0, 0, 255]]
    with pytest.raises(ConfigError, match="3 folders for 2 data sets"):
        open_dataset(files, READING, image_root=[folder] * 3)


def test_broken_rows_can_be_left_out(folder: Path) -> None:
    lines = [json.dumps(easy(qid="0")), "{", json.dumps(easy(qid="2", answer="bad")), json.dumps(easy(qid="3"))]
    file = dump(folder, "rows.jsonl", "\n".join(lines))
    source = open_dataset(file, Reading(understand, skip_broken=True))
    assert [source.get(i).id for i in range(source.size or 0)] == ["0", "3"]
    assert [fault.partition(": ")[0].rpartition("/")[2] for fault in source.faults] == ["rows.jsonl:2", "rows.jsonl:3"]
    assert "bad" in source.faults[1]


def test_columns_may_stand_beside_conversations(folder: Path) -> None:
    turns = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "no"}]
    rows = [{"image": "a.png", "images": [], "conversations": turns, "label": "yes"}]
    file = dump(folder, "rows.json", rows)
    check(open_dataset(file, READING).get(0), question="Why?", target="no")
    check(open_dataset(file, Reading(understand, columns={"answer": "label"})).get(0), question="Why?", target="yes")
    with pytest.raises(ConfigError, match="no columns to map"):
        open_dataset(
            dump(folder, "instances.json", COCO), Reading(detections, takes_coco=True, columns={"answer": "label"})
        )


def test_names_of_classes_and_missing_images_in_a_hugging_face_data_set() -> None:
    rows = [easy(answer=i % 2, images=[{"bytes": png(), "path": None}]) for i in range(2)]
    data = datasets.Dataset.from_list(rows).cast_column("answer", datasets.ClassLabel(names=["cat", "dog"]))
    assert [open_dataset(data, READING).get(i).target for i in range(2)] == ["cat", "dog"]
    features = datasets.Features(
        {name: datasets.Value("string") for name in ("problem", "answer")} | {"images": datasets.List(datasets.Image())}
    )
    rows = [{"problem": "?", "answer": "a", "images": [png(), None]}]
    with pytest.raises(DataError, match="row 0: an image is neither"):
        open_dataset(datasets.Dataset.from_list(rows, features=features), READING)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"problem": None},
            "no question: nothing in 'conversations' or 'messages' or 'problem' or 'question' or 'query'",
        ),
        ({"problem": " "}, "no question"),
        ({"images": [""]}, "no image"),
        ({"images": []}, "1 <image> marks for 0 images"),
        ({"images": ["a.png", 5]}, "neither a path"),
        ({"images": ["none.png"]}, "no image"),
        ({"images": ["a\0.png"]}, "no image"),
        ({"key_word": 5}, "no list of texts"),
        ({"key_word": [5]}, "no list of texts"),
        ({"tolerance": "much"}, "'tolerance' is 'much'"),
        ({"tolerance": -1}, "'tolerance' is -1"),
        ({"subject": [1]}, "'subject' is not a text"),
        ({"answer": float("nan")}, "the answer is nan"),
        ({"problem": "\ud800"}, "half a surrogate pair"),
        ({"images": ["\udfff.png"]}, "half a surrogate pair"),
    ],
)
def test_a_broken_part_is_named(folder: Path, changes: dict[str, Any], message: str) -> None:
    file = dump(folder, "rows.json", "[\n" + ",\n".join(json.dumps(row) for row in (easy(), easy(**changes))) + "]")
    with pytest.raises(DataError, match=r"rows\.json:3: ") as caught:
        open_dataset(file, READING)
    assert message in str(caught.value)


def test_what_cannot_be_opened_is_named(folder: Path) -> None:
    for name, content, message in (
        ("a.txt", "x", r"\.jsonl, \.json, .*\.parquet, .* not '\.txt'; .* `vlmenv data convert SOURCE"),
        ("a.json", "{}", "JSON object with nothing, and no list of rows"),
        ("b.json", "[]", "has no rows"),
        ("c.json", '[{"problem": "?", "answer": 1}, {"b" 2}]', r"c\.json:1: not JSON: Expecting ':'"),
        ("d.json", '[\n{"problem": "?", "answer": 1},\n{"b": "', r"d\.json:3: not JSON: Unterminated"),
        ("e.json", '["\xff\n', r"e\.json:1: not JSON"),
        ("h.json", '[{"problem": "?", "answer": 1}] [{}]', r"h\.json:1: not JSON: something follows"),
        ("i.parquet", "PAR", r"i\.parquet: the parquet file cannot be read"),
    ):
        with pytest.raises(DataError, match=message):
            open_dataset(dump(folder, name, content), Reading(lambda row: understand(row), needs_image=False))
    (folder / "f.json").write_bytes(b'[\n"\xff"]')
    with pytest.raises(DataError, match=r"f\.json: not UTF-8"):
        open_dataset(folder / "f.json", READING)
    with pytest.raises(DataError, match="cannot be loaded"):
        open_dataset("nobody/nothing-of-the-kind", READING)
    for missing in ("none.jsonl", "dir/none.parquet", str(folder / "none")):
        with pytest.raises(DataError, match="no such file"):
            open_dataset(missing, READING)
    with pytest.raises(ConfigError, match="a file has no splits"):
        open_dataset(dump(folder, "g.json", "[]"), READING, split="val")
    with pytest.raises(ConfigError, match="dataset is a int"):
        open_dataset(5, READING)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.slow
@given(st.lists(VALUES, max_size=6), st.sampled_from([None, 1]), st.booleans(), st.integers(1, 40))
def test_a_json_list_is_walked_through_as_the_standard_library_reads_it(
    values: list[Any], indent: int | None, ascii_only: bool, chunk: int
) -> None:
    text = " \n" + json.dumps(values, indent=indent, ensure_ascii=ascii_only) + "\n"
    if not ascii_only:
        text = text.encode("utf-8", "replace").decode()
        values = json.loads(text)
    data = text.encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_CHUNK", chunk)
        found = list(JSONStream(io.BytesIO(data), Path("x.json")).elements())
    assert [value.content for value in found] == values
    assert [json.loads(data[value.offset : value.offset + value.length]) for value in found] == values
    assert [value.line for value in found] == [1 + data[: value.offset].count(b"\n") for value in found]


COCO: dict[str, Any] = {
    "info": {"a": [1]},
    "annotations": [
        {"id": 1, "image_id": 9, "category_id": 3, "bbox": [1, 1, 2, 1], "iscrowd": 0, "area": 1.5},
        {"id": 2, "image_id": 7, "category_id": 1, "bbox": [0, 0, 4, 3], "iscrowd": 1, "area": 12},
        {"id": 3, "image_id": 9, "category_id": 1, "bbox": [0, 0, 1, 1]},
    ],
    "images": [{"id": 9, "file_name": "a.png"}, {"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": "a.png"}],
    "categories": [{"id": 1, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 4, "name": "owl"}],
}


def detections(row: Row) -> Sample:
    return Sample(row.id, (), row.question, row.detections)


def test_coco_instances(folder: Path) -> None:
    source = open_dataset(dump(folder, "instances.json", COCO), Reading(detections, takes_coco=True))
    assert [source.get(i).id for i in range(3)] == ["9", "7", "8"]
    dog, cat = Detection("dog", (1, 1, 3, 2), False, 1.5), Detection("cat", (0, 0, 1, 1), False, 1)
    assert source.get(0).target == (dog, cat)
    assert source.get(1).target == (Detection("cat", (0, 0, 4, 3), True, 12),)
    assert source.get(2).target == ()
    for index in range(3):
        sample = source.get(index)
        asked = sample.question.removeprefix("Detect all of these: ").removesuffix(".").split(", ")
        assert {one.label for one in sample.target} < set(asked) <= {"cat", "dog", "owl"}
        assert len(set(asked)) == len(asked)
        assert sample.question == source.get(index).question
    with pytest.raises(DataError, match="for detection"):
        open_dataset(folder / "instances.json", READING)


@pytest.mark.parametrize(
    ("part", "entry", "message"),
    [
        (
            "annotations",
            {"id": 5, "image_id": 9, "category_id": 1, "bbox": [0, 0, 0, 3]},
            "annotation 5: bbox",
        ),
        ("annotations", {"id": 5, "image_id": 9, "category_id": 1, "bbox": [0, 0, float("nan"), 3]}, "image 9: "),
        (
            "annotations",
            {"id": 5, "image_id": 9, "category_id": 1, "bbox": [0, 0, 3]},
            "an entry of 'annotations'",
        ),
        ("annotations", {"id": 5, "image_id": 9, "category_id": 1}, "an entry of 'annotations': no 'bbox'"),
        ("annotations", {"id": 5, "image_id": 99, "category_id": 1, "bbox": [0, 0, 1, 3]}, "of image 99"),
        ("annotations", {"id": 5, "image_id": 9, "category_id": 99, "bbox": [0, 0, 1, 3]}, "of category 99"),
        ("annotations", 5, "an entry of 'annotations'"),
        ("images", {"id": 9, "file_name": "a.png"}, "two images have the same id"),
        ("images", {"id": 10, "file_name": "b.png"}, "image 10: there is no image"),
        ("images", {"file_name": "b.png"}, "an entry of 'images': no 'id'"),
        ("categories", {"id": 5}, "an entry of 'categories': no 'name'"),
    ],
)
def test_broken_coco_instances_are_named(folder: Path, part: str, entry: Any, message: str) -> None:
    file = dump(folder, "instances.json", COCO | {part: [*COCO[part], entry]})
    with pytest.raises(DataError, match=rf"instances\.json.*{message}"):
        open_dataset(file, Reading(detections, takes_coco=True))


def test_every_fault_of_coco_instances_is_told(folder: Path) -> None:
    """Entries that belong to no image are told too, and what is whole can be used without them."""
    bad = [
        {"id": 5, "image_id": 9, "category_id": 1},
        {"id": 6, "image_id": 99, "category_id": 1, "bbox": [0, 0, 1, 1]},
        {"id": 7, "image_id": 9, "category_id": 99, "bbox": [0, 0, 1, 1]},
        {"id": 8, "image_id": 8, "category_id": 1, "bbox": [0, 0, 0, 0]},
        {"id": 9, "image_id": 8, "category_id": 1, "bbox": [0, 0, 0, 1]},
    ]
    content = COCO | {"annotations": [*bad, *COCO["annotations"]], "images": [*COCO["images"], {"id": 1}]}
    source = open_dataset(dump(folder, "i.json", content), Reading(detections, takes_coco=True, skip_broken=True))
    assert [source.get(i).id for i in range(source.size or 0)] == ["7"]  # the others lack some of their truth
    told = " ".join(source.faults)
    assert len(source.faults) == 4  # two images, and two entries that belong to none
    for words in ("no 'bbox'", "of image 99", "of category 99", "annotation 8", "annotation 9", "no 'file_name'"):
        assert words in told


def test_a_broken_coco_image_can_be_left_out(folder: Path) -> None:
    bad = {"id": 5, "image_id": 9, "category_id": 1, "bbox": [0, 0, 0, 3]}
    file = dump(folder, "instances.json", COCO | {"annotations": [*COCO["annotations"], bad]})
    source = open_dataset(file, Reading(detections, takes_coco=True, skip_broken=True))
    assert [source.get(i).id for i in range(source.size or 0)] == ["7", "8"]
    assert len(source.faults) == 1


def test_coco_of_many_images_agrees_with_a_plain_reading(folder: Path) -> None:
    rng = np.random.default_rng(0)
    ids = [int(i) for i in rng.permutation(1000)[:50]]
    annotations = [
        {"id": i, "image_id": ids[rng.integers(50)], "category_id": int(rng.integers(3)), "bbox": [i, 0, 1, 1]}
        for i in range(300)
    ]
    content = {
        "images": [{"id": i, "file_name": "a.png"} for i in ids],
        "categories": [{"id": i, "name": f"kind {i}"} for i in range(3)],
        "annotations": annotations,
    }
    source = open_dataset(dump(folder, "i.json", content), Reading(detections, takes_coco=True))
    for number, image in enumerate(ids):
        own = [(f"kind {a['category_id']}", a["bbox"][0]) for a in annotations if a["image_id"] == image]
        assert [(one.label, one.box[0]) for one in source.get(number).target] == own
