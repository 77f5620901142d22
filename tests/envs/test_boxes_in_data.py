"""True boxes in every form that data sets store them in, and of images that EXIF turns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from vlmenv.core.answers import Detection
from vlmenv.core.errors import ConfigError, DataError
from vlmenv.envs.data.boxes import change_numbers, corners, numbers_in, turned
from vlmenv.envs.ovd import OVDEnv
from vlmenv.envs.rec import RECEnv
from vlmenv.envs.vqa import VQAEnv

SIZE = (200, 100)
BOX = (50, 20, 90, 70)
FORMS = {
    "xyxy": [50, 20, 90, 70],
    "xywh": [50, 20, 40, 50],
    "fractions": [0.25, 0.2, 0.45, 0.7],
    "norm1000": [250, 200, 450, 700],
}


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    Image.new("RGB", SIZE).save(folder / "a.png")
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"image": "a.png", "problem": "Find it."} | row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("form", FORMS)
def test_boxes_of_every_form_become_pixels(form: str, tmp_path: Path) -> None:
    numbers = FORMS[form]
    turns = [
        {"role": "user", "content": "<image>Find it."},
        {"role": "assistant", "content": f"<think>There.</think><answer>{numbers}</answer>"},
    ]
    file = write(tmp_path, {"answer": numbers}, {"answer": json.dumps(numbers)}, {"problem": None, "messages": turns})
    for coordinates, scale in (("original", (1, 1)), ("norm1000", (5, 10))):
        env = RECEnv(dataset=file, boxes_in=form, coordinates=coordinates)
        for index in range(3):
            assert env.source.get(index).target == pytest.approx(BOX)
            env.reset(options={"index": index})
            answer = [round(value * scale[i % 2]) for i, value in enumerate(BOX)]
            _, _, _, _, info = env.step(f"<answer>{answer}</answer>")
            assert info["rewards"]["iou"] == pytest.approx(1)
    entries = [{"bbox_2d": numbers, "label": "dog"}, {"bbox_2d": numbers, "label": "[4, 4, 4]"}]
    file = write(tmp_path, {"answer": f"```json\n{json.dumps(entries)}\n```"}, {"answer": "None"})
    found = OVDEnv(dataset=file, boxes_in=form).source
    assert [one.label for one in found.get(0).target] == ["dog", "[4, 4, 4]"]
    assert found.get(0).target[0].box == pytest.approx(BOX)
    assert found.get(1).target == ()


def test_none_stays_none(tmp_path: Path) -> None:
    file = write(tmp_path, {"answer": "None"})
    for form in FORMS:
        assert RECEnv(dataset=file, boxes_in=form).source.get(0).target == "None"


def test_a_form_is_for_data_with_boxes(tmp_path: Path) -> None:
    file = write(tmp_path, {"answer": "1"})
    with pytest.raises(ConfigError, match="boxes_in and box_orientation are for tasks whose truths are boxes"):
        VQAEnv(dataset=file, boxes_in="xywh")
    with pytest.raises(ConfigError, match="give dataset too"):
        RECEnv(boxes_in="xywh")
    with pytest.raises(ConfigError, match=r"unknown form of boxes 'xyhw'\. Did you mean 'xywh'"):
        RECEnv(dataset=file, boxes_in="xyhw")
    with pytest.raises(ConfigError, match="COCO's boxes are x, y, width and height by definition"):
        OVDEnv(dataset=write_coco(tmp_path, SIZE, 1), boxes_in="norm1000")
    assert is_on_the_square(OVDEnv(dataset=write_coco(tmp_path, SIZE, 1), boxes_in="xywh"))


@given(st.lists(st.one_of(st.integers(-9, 9999), st.floats(-9, 9999)), min_size=4, max_size=4), st.text())
def test_numbers_are_changed_and_no_text(numbers: list[float], text: str) -> None:
    text = text.replace("[", "").replace("]", "")
    written = f"{text}{numbers}{text}"
    assert numbers_in(written) == [tuple(map(float, numbers))]
    changed = change_numbers(written, corners)
    assert changed.startswith(text)
    assert changed.endswith(text)
    x, y, width, height = numbers
    assert numbers_in(changed) == [pytest.approx((x, y, x + width, y + height), abs=1e-11)]


def test_all_digits_of_a_fraction_are_read(tmp_path: Path) -> None:
    numbers = [0.00020833333333333334, 1e-05, 0.014583333333333334, 0.9999999999999999]
    file = write(tmp_path, {"answer": numbers}, {"answer": json.dumps({"bbox_2d": numbers})})
    for index in range(2):
        target = RECEnv(dataset=file, boxes_in="fractions").source.get(index).target
        assert target == pytest.approx([value * SIZE[i % 2] for i, value in enumerate(numbers)])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_are_turned_as_pillow_turns_their_image(orientation: int) -> None:
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[4:9, 6:21] = 255
    picture = Image.fromarray(pixels)
    picture.getexif()[0x0112] = orientation
    shown = np.asarray(ImageOps.exif_transpose(picture))[..., 0]
    x1, y1, x2, y2 = map(int, turned((6, 4, 21, 9), orientation, (30, 20)))
    assert (shown[y1:y2, x1:x2] == 255).all()
    assert shown.astype(bool).sum() == (x2 - x1) * (y2 - y1) == 75


def save_turned(file: Path, orientation: int) -> None:
    """A dark photo of 200 x 100 stored pixels with a white square, its box being BOX."""
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[20:70, 50:90] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(file, exif=exif)


def is_on_the_square(env: Any) -> bool:
    sample = env.source.get(0)
    target = sample.target[0].box if isinstance(sample.target[0], Detection) else sample.target
    x1, y1, x2, y2 = (round(value) for value in target)
    found = sample.images[0][..., 0] > 128
    return bool(found[y1:y2, x1:x2].all() and found.sum() == (x2 - x1) * (y2 - y1))


def write_coco(folder: Path, size: tuple[int, int] | None, orientation: int, bbox: Any = (50, 20, 40, 50)) -> Path:
    save_turned(folder / "turned.png", orientation)
    told = {} if size is None else {"width": size[0], "height": size[1]}
    image = {"id": 1, "file_name": "turned.png"} | told
    boxes = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": list(bbox)}]
    content = {"images": [image], "annotations": boxes, "categories": [{"id": 1, "name": "square"}]}
    file = folder / "instances.json"
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["xyxy", "xywh", "fractions", "norm1000"])
def test_boxes_of_stored_images_are_turned_with_them(form: str, orientation: int, tmp_path: Path) -> None:
    save_turned(tmp_path / "turned.png", orientation)
    file = write(tmp_path, {"image": "turned.png", "answer": FORMS[form]})
    assert is_on_the_square(RECEnv(dataset=file, boxes_in=form, box_orientation="stored"))
    assert is_on_the_square(RECEnv(dataset=file, boxes_in=form)) == (orientation == 1)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_the_size_that_coco_tells_decides(orientation: int, tmp_path: Path) -> None:
    x1, y1, x2, y2 = turned(BOX, orientation, SIZE)
    shown = (x1, y1, x2 - x1, y2 - y1)
    for option in ("shown", "stored"):
        assert is_on_the_square(OVDEnv(dataset=write_coco(tmp_path, SIZE, orientation), box_orientation=option))
        file = write_coco(tmp_path, SIZE[::-1], orientation, shown)
        assert is_on_the_square(OVDEnv(dataset=file, box_orientation=option))
        env = OVDEnv(dataset=write_coco(tmp_path, None, orientation), box_orientation=option)
        assert is_on_the_square(env) == (option == "stored")


@pytest.mark.parametrize("size", [(100, 50), (100, 200)])
def test_a_wrong_size_is_refused(size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first rows when the data set is opened, of the others when their images are read."""
    file = write_coco(tmp_path, size, 1)
    with pytest.raises(DataError, match=rf"image 1: .* the image has {size[0]} x {size[1]} pixels, but it has 200 x 1"):
        OVDEnv(dataset=file)
    monkeypatch.setattr("vlmenv.envs.data.dataset._SIZED", 0)
    source = OVDEnv(dataset=file).source
    with pytest.raises(DataError, match=r"image 1 \(id 1\): the data set says"):
        source.get(0)


def test_what_coco_cannot_tell_is_as_the_option_says(tmp_path: Path) -> None:
    """Upside down, an image has the same size."""
    for option in ("shown", "stored"):
        env = OVDEnv(dataset=write_coco(tmp_path, SIZE, 3), box_orientation=option)
        assert is_on_the_square(env) == (option == "stored")


@pytest.mark.parametrize("form", FORMS)
def test_boxes_of_a_column_with_objects(form: str, tmp_path: Path) -> None:
    """By definition of the layout they are x, y, width and height; an option says otherwise."""
    Image.new("RGB", SIZE).save(tmp_path / "a.png")
    rows = [{"image": str(tmp_path / "a.png"), "objects": {"bbox": [FORMS[form]], "category": ["dog"]}}]
    (found,) = OVDEnv(dataset=rows, boxes_in=form).source.get(0).target
    assert found.box == pytest.approx(BOX)
    (found,) = OVDEnv(dataset=rows).source.get(0).target
    assert (found.box == pytest.approx(BOX)) == (form == "xywh")
    if form == "xywh":
        with pytest.raises(DataError, match="covers nothing, if boxes are in xyxy"):
            OVDEnv(dataset=rows, boxes_in="xyxy")
