"""Annotations of other formats become rows, whose truth scores in the task that reads them."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmenv.core.errors import ConfigError, DataError
from vlmenv.envs.data.convert import Summary, convert, find_layout
from vlmenv.envs.data.dataset import open_dataset
from vlmenv.envs.ovd import OVDEnv
from vlmenv.envs.rec import RECEnv
from vlmenv.envs.vqa import VQAEnv

Boxes = dict[str, list[tuple[str, tuple[float, ...]]]]


def picture(file: Path, size: tuple[int, int] = (40, 30), orientation: int = 1) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, "red")
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(file, exif=exif)
    return file


def write(file: Path, content: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def check(summary: Summary, expected: Boxes) -> None:
    """The rows hold these boxes by id, their images are there, and their truth scores."""
    env = OVDEnv(dataset=summary.target)
    samples = [env.source.get(i) for i in range(env.source.size or 0)]
    assert {
        one.id: [(box.label, tuple(round(v, 3) for v in box.box)) for box in one.target] for one in samples
    } == expected
    assert (summary.rows, summary.boxes) == (len(samples), sum(map(len, expected.values())))
    assert summary.env == "VLM-OVD-v0"
    for i in range(len(samples)):
        env.reset(options={"index": i})
        assert env.step(env.write_answer(samples[i]))[1] == pytest.approx(1.1)


def rounded(box: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(round(value, 3) for value in box)


def voc(name: str, *objects: tuple[str, tuple[float, ...]], more: str = "") -> str:
    edges = ("xmin", "ymin", "xmax", "ymax")
    written = "".join(
        f"<object><name>{label}</name>{more}<bndbox>"
        + "".join(f"<{edge}>{value}</{edge}>" for edge, value in zip(edges, box, strict=True))
        + "</bndbox></object>"
        for label, box in objects
    )
    return f"<annotation><folder>x</folder><filename>{name}</filename>{written}</annotation>"


def test_voc(tmp_path: Path) -> None:
    source = tmp_path / "VOC"
    picture(source / "JPEGImages" / "a.jpg")
    picture(source / "JPEGImages" / "b.jpg")
    difficult = "<difficult>1</difficult>"
    write(
        source / "Annotations" / "a.xml", voc("a.jpg", ("cat", (1, 2, 11, 22)), ("dog", (0, 0, 5, 5.5)), more=difficult)
    )
    write(source / "Annotations" / "b.xml", voc("b", ("owl", (3, 3, 9, 9))))
    target = tmp_path / "rows" / "voc.jsonl"
    summary = convert(source, target)
    assert summary.layout == "voc"
    check(summary, {"a": [("cat", (1, 2, 11, 22)), ("dog", (0, 0, 5, 5.5))], "b": [("owl", (3, 3, 9, 9))]})
    assert summary.notes == {"boxes that are marked as difficult count like the others": 2}
    first = json.loads(target.read_text().splitlines()[0])
    assert first["image"] == "../VOC/JPEGImages/a.jpg"
    assert set(first["problem"].removeprefix("Detect all of these: ").removesuffix(".").split(", ")) == {
        "cat",
        "dog",
        "owl",
    }
    write(source / "ImageSets" / "Main" / "val.txt", "b\n")
    check(convert(source, target, split="val"), {"b": [("owl", (3, 3, 9, 9))]})
    with pytest.raises(ConfigError, match="no split 'test'"):
        convert(source, target, split="test")


def test_broken_voc_is_named_and_can_be_left_out(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    write(tmp_path / "a.xml", voc("a.jpg", ("cat", (1, 2, 11, 22))))
    for content, message in (
        ("<annotation>", "not XML"),
        ("<svg></svg>", "begins with <svg>"),
        ('<!DOCTYPE x [<!ENTITY a "a">]><annotation>&a;</annotation>', "document type"),
        (voc("b.jpg"), "no image 'b.jpg'"),
        (voc("a.jpg", ("cat", (9, 2, 3, 22))), "covers nothing"),
        (voc("a.jpg", ("cat", (1, 2, "x", 22))), "no numbers"),  # type: ignore[arg-type]
        ("<annotation><filename>a.jpg</filename><object><name>x</name></object></annotation>", "no <bndbox>"),
    ):
        write(tmp_path / "b.xml", content)
        with pytest.raises(DataError, match=rf"b\.xml: .*{message}"):
            convert(tmp_path, tmp_path / "rows.jsonl")
        assert not (tmp_path / "rows.jsonl").exists()
    summary = convert(tmp_path, tmp_path / "rows.jsonl", skip_broken=True)
    assert (summary.rows, len(summary.faults)) == (1, 1)


def test_yolo(tmp_path: Path) -> None:
    """Roboflow's layout; an image that EXIF turns, an outline, and an image without a file of labels."""
    source = tmp_path / "yolo"
    picture(source / "train" / "images" / "a.jpg")
    picture(source / "train" / "images" / "turned.jpg", orientation=6)
    picture(source / "train" / "images" / "empty.jpg")
    picture(source / "valid" / "images" / "v.png")
    write(source / "data.yaml", "train: ../train/images\nval: ../valid/images\nnc: 2\nnames: [cat, dog]\n")
    write(source / "train" / "labels" / "a.txt", "0 0.5 0.5 0.5 0.4\n\n1 0.1 0.1 0.5 0.1 0.5 0.9\n")
    write(source / "train" / "labels" / "turned.txt", "1 0.5 0.5 1 1\n")
    write(source / "valid" / "labels" / "v.txt", "1 0.25 0.25 0.5 0.5\n")
    target = tmp_path / "rows.jsonl"
    with pytest.raises(ConfigError, match="has the splits train, val: name one"):
        convert(source, target)
    summary = convert(source, target, split="train")
    a = [("cat", (10, 9, 30, 21)), ("dog", (4, 3, 20, 27))]
    check(summary, {"a": a, "turned": [("dog", (0, 0, 30, 40))], "empty": []})
    assert summary.notes == {
        "images without a file of labels hold no object": 1,
        "outlines of polygons became the boxes around them": 1,
    }
    check(convert(source, target, split="val"), {"v": [("dog", (0, 0, 20, 15))]})
    for line, message in (
        ("7 0 0 1 1", "class 7 has no name"),
        ("0 1 2 3", "3 numbers"),
        ("cat 0 0 1 1", "is numbers"),
    ):
        write(source / "valid" / "labels" / "v.txt", f"\n{line}")
        with pytest.raises(DataError, match=rf"v\.txt:2: .*{message}"):
            convert(source, target, split="val")


def test_yolo_with_paths_lists_and_classes(tmp_path: Path) -> None:
    """Ultralytics' layout with `path` and names by number, and a flat folder."""
    image = picture(tmp_path / "set" / "images" / "train" / "a.jpg")
    write(tmp_path / "set" / "labels" / "train" / "a.txt", "3 0.5 0.5 0.5 0.5")
    write(tmp_path / "set" / "train.txt", "images/train/a.jpg\n")
    box = ("owl", (10, 7.5, 30, 22.5))
    for place in ("images/train", "train.txt"):
        write(tmp_path / "set" / "set.yaml", f"path: .\ntrain: {place}\nnames:\n  3: owl\n")
        check(convert(tmp_path / "set", tmp_path / "rows.jsonl"), {"a": [box]})
    flat = tmp_path / "flat"
    picture(flat / "a.jpg")
    write(flat / "a.txt", "1 0.5 0.5 0.5 0.5")
    write(flat / "classes.txt", "cat\nowl\n")
    check(convert(flat, tmp_path / "rows.jsonl"), {"a": [box]})
    assert image.is_file()
    (flat / "a.txt").unlink()
    with pytest.raises(DataError, match="none of 1 images has a file of labels"):
        convert(flat, tmp_path / "rows.jsonl")


def test_labelme(tmp_path: Path) -> None:
    source = tmp_path / "labelme"
    picture(source / "images" / "a.png")
    shapes = [
        {"label": "cat", "shape_type": "rectangle", "points": [[20, 25], [5, 6]]},
        {"label": "dog", "shape_type": "polygon", "points": [[1, 2], [9, 2], [9, 12.5]]},
        {"label": "owl", "shape_type": "circle", "points": [[10, 10], [13, 14]]},
        {"label": "nose", "shape_type": "point", "points": [[1, 2]]},
        {"label": "__ignore__", "shape_type": "rectangle", "points": [[1, 2], [3, 4]]},
    ]
    file = write(source / "a.json", {"version": "5", "imageData": None, "shapes": shapes, "imagePath": "images\\a.png"})
    summary = convert(source, tmp_path / "rows.jsonl")
    assert summary.layout == "labelme"
    check(summary, {"a": [("cat", (5, 6, 20, 25)), ("dog", (1, 2, 9, 12.5)), ("owl", (5, 5, 15, 15))]})
    assert summary.notes == {
        "a polygon became the box around it": 1,
        "a circle became the box around it": 1,
        "points have no box, and are left out": 1,
        "shapes of __ignore__ are no objects": 1,
    }
    with pytest.raises(DataError, match="LabelMe's become rows by `vlmenv data convert"):
        OVDEnv(dataset=file)
    write(file, {"shapes": [{"label": "x"}], "imagePath": "a.png"})
    with pytest.raises(DataError, match=r"a\.json: a shape has no 'label' or no 'points'"):
        convert(source, tmp_path / "rows.jsonl")


def test_labels_as_expressions(tmp_path: Path) -> None:
    """A row for each box that its label means alone; what is ambiguous is left out, and counted."""
    picture(tmp_path / "drawn" / "a.png")
    boxes = {"the red mug": [(5, 6, 20, 25)], "a spoon": [(1, 2, 9, 12), (9, 2, 19, 12)], "the plate": [(0, 0, 30, 30)]}
    shapes = [
        {"label": label, "shape_type": "rectangle", "points": [box[:2], box[2:]]}
        for label, drawn in boxes.items()
        for box in drawn
    ]
    write(tmp_path / "drawn" / "a.json", {"shapes": shapes, "imagePath": "a.png"})
    summary = convert(tmp_path / "drawn", tmp_path / "rows.jsonl", expressions=True)
    assert (summary.env, summary.rows, summary.boxes) == ("VLM-REC-v0", 2, 2)
    assert summary.notes == {"boxes were left out whose label another box of the image has too": 2}
    env = RECEnv(dataset=summary.target)
    samples = [env.source.get(index) for index in range(2)]
    assert [(one.id, one.target) for one in samples] == [("a", (5, 6, 20, 25)), ("a-2", (0, 0, 30, 30))]
    assert "the red mug" in env.observe(samples[0])["prompt"]
    assert env.score(env.write_answer(samples[0]), samples[0]).terms["iou"] == 1
    write(tmp_path / "vqa.csv", "image,question,answer\na.png,Which?,red\n")
    with pytest.raises(ConfigError, match="expressions are made of labelled boxes, which layout 'table' has not"):
        convert(tmp_path / "vqa.csv", tmp_path / "rows.jsonl", expressions=True)


REFERENCES: list[dict[str, Any]] = [
    {
        "ref_id": 3,
        "ann_id": 7,
        "image_id": 9,
        "split": split,
        "file_name": "a_7.jpg",
        "sentences": [{"sent_id": 1, "sent": "red square"}, {"sent_id": 2, "sent": "left one"}],
    }
    for split in ("train", "val")
]
INSTANCES = {"images": [{"id": 9, "file_name": "a.jpg"}], "annotations": [{"id": 7, "bbox": [2, 3, 10.5, 20]}]}


@pytest.mark.parametrize("kind", ["p", "json"])
def test_refer_files(tmp_path: Path, kind: str) -> None:
    """RefCOCO's boxes are x, y, width, height; each sentence is a row."""
    source = tmp_path / "refcoco"
    picture(tmp_path / "coco" / "a.jpg")
    write(source / "instances.json", INSTANCES)
    refs = source / f"refs(unc).{kind}"
    refs.write_bytes(pickle.dumps(REFERENCES, protocol=2) if kind == "p" else json.dumps(REFERENCES).encode())
    with pytest.raises(ConfigError, match="has the splits train, val: name one"):
        convert(source, tmp_path / "rows.jsonl", images=tmp_path / "coco")
    with pytest.raises(DataError, match=r"there is no image 'a\.jpg'"):
        convert(source, tmp_path / "rows.jsonl", split="val")
    summary = convert(source, tmp_path / "rows.jsonl", images=tmp_path / "coco", split="val")
    assert (summary.layout, summary.env, summary.rows) == ("refer", "VLM-REC-v0", 2)
    env = RECEnv(dataset=summary.target)
    assert [env.source.get(i).question for i in range(2)] == ["Locate red square.", "Locate left one."]
    assert env.source.get(1).target == (2, 3, 12.5, 23)
    env.reset(options={"index": 0})
    assert env.step(env.write_answer(env.source.get(0)))[1] > 1.05


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("harm",)


def test_a_pickle_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for content in (pickle.dumps([Evil()]), b"no pickle", pickle.dumps({"a": 1})):
        (tmp_path / "refs(x).p").write_bytes(content)
        with pytest.raises(DataError, match=r"not a pickle of plain data|not a list of references"):
            convert(tmp_path / "refs(x).p", tmp_path / "rows.jsonl")
    assert not (tmp_path / "harm").exists()


def test_a_table_with_a_box_a_row(tmp_path: Path) -> None:
    for name in ("a", "b"):
        picture(tmp_path / "set" / f"{name}.jpg")
    lines = ["filename,width,height,class,xmin,ymin,xmax,ymax"]
    lines += ["a.jpg,40,30,cat,1,2,11,22", "b.jpg,40,30,dog,0,0,5,5", "a.jpg,40,30,dog,3,3,9,9"]
    source = write(tmp_path / "set" / "_annotations.csv", "\n".join(lines))
    summary = convert(source, tmp_path / "rows.jsonl")
    assert summary.layout == "boxes"
    check(summary, {"a.jpg": [("cat", (1, 2, 11, 22)), ("dog", (3, 3, 9, 9))], "b.jpg": [("dog", (0, 0, 5, 5))]})
    write(source, "\n".join([lines[0], "a.jpg,40,30,cat,,2,11,22"]))
    with pytest.raises(DataError, match=r"_annotations\.csv:2: the box has no numbers"):
        convert(source, tmp_path / "rows.jsonl")


@pytest.mark.parametrize("name", ["table.csv", "table.tsv", "metadata.csv", "metadata.jsonl"])
def test_tables_and_folders_of_hugging_face(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "set" / "pictures" / "a.png")
    row = {"file_name": "pictures/a.png", "question": "Which colour, now?", "answer": "red"}
    mark = "\t" if name.endswith(".tsv") else ","
    quoted = [f'"{value}"' for value in row.values()]
    content = json.dumps(row) if name.endswith(".jsonl") else "\n".join([mark.join(row), mark.join(quoted)])
    file = write(tmp_path / "set" / name, content)
    source = file.parent if name.startswith("metadata") else file
    summary = convert(source, tmp_path / "elsewhere" / "rows.jsonl")
    assert (summary.layout, summary.rows) == ("folder" if name.startswith("metadata") else "table", 1)
    env = VQAEnv(dataset=summary.target)
    env.reset(options={"index": 0})
    assert env.step(env.write_answer(env.source.get(0)))[1] == pytest.approx(1.1)
    assert env.source.get(0).images[0].shape == (30, 40, 3)


def test_what_cannot_be_converted_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    rows = write(tmp_path / "rows.jsonl", {"question": "Why?", "answer": "so"})
    target = tmp_path / "out.jsonl"
    for source, more, message in (
        (tmp_path / "none", {}, "no such file"),
        (tmp_path / "empty", {}, r"of no layout that is known \(voc, yolo, .*there is nothing"),
        (rows, {}, "read as they are; see `vlmenv data check"),
        (tmp_path / "empty", {"layout": "vok"}, "Did you mean 'voc'"),
        (tmp_path / "empty", {"layout": "voc"}, "no row could be made of it as 'voc'"),
        (tmp_path / "empty", {"images": tmp_path / "none"}, "no such folder of images"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            convert(source, target, **more)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"the target is a \.jsonl file"):
        convert(rows, tmp_path / "out.csv")


def test_a_folder_of_annotations_is_not_opened_but_named(tmp_path: Path) -> None:
    write(tmp_path / "a.xml", voc("a.jpg"))
    assert find_layout(tmp_path) == "voc"
    with pytest.raises(DataError, match=r"a folder of voc: `vlmenv data convert .* TARGET\.jsonl` makes"):
        open_dataset(tmp_path, OVDEnv().reading())
    with pytest.raises(DataError, match=r"not '\.xml'; annotations of VOC, .* `vlmenv data convert"):
        open_dataset(tmp_path / "a.xml", OVDEnv().reading())
