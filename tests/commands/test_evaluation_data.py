"""The data set that training measures on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmenv.commands.train import _evaluation_envs
from vlmenv.core.errors import ConfigError
from vlmenv.options.task import DataOptions
from vlmenv.options.train import MeasuringOptions, TrainConfig


def write(folder: Path, name: str, box: list[float]) -> str:
    Image.new("RGB", (200, 100)).save(folder / "a.png")
    (folder / name).write_text(json.dumps({"image": "a.png", "question": "Find it.", "answer": box}) + "\n")
    return str(folder / name)


@pytest.mark.parametrize("form", ["norm1000", None])
def test_boxes_have_a_form_of_their_own(form: Any, tmp_path: Path) -> None:
    training = write(tmp_path, "train.jsonl", [50, 20, 40, 50])
    measured = write(tmp_path, "eval.jsonl", [250, 200, 450, 700] if form else [50, 20, 40, 50])
    config = TrainConfig(
        data=DataOptions(dataset=(training,), boxes_in="xywh"),
        measuring=MeasuringOptions(eval_dataset=(measured,), eval_boxes_in=form),
    )
    envs = _evaluation_envs(config)
    assert envs.task.source.get(0).target == pytest.approx((50, 20, 90, 70))
    envs.close()


@pytest.mark.parametrize(("orientation", "box"), [("stored", (100 - 70, 50, 100 - 20, 90)), (None, (50, 20, 90, 70))])
def test_boxes_have_an_orientation_of_their_own(orientation: Any, box: tuple[float, ...], tmp_path: Path) -> None:
    training = write(tmp_path, "train.jsonl", [50, 20, 90, 70])
    exif = Image.Exif()
    exif[0x0112] = 6  # the stored image is shown after a quarter turn clockwise: x' = height - y, y' = x
    Image.new("RGB", (200, 100)).save(tmp_path / "turned.jpg", exif=exif)
    measured = tmp_path / "eval.jsonl"
    measured.write_text(json.dumps({"image": "turned.jpg", "question": "Find it.", "answer": [50, 20, 90, 70]}) + "\n")
    config = TrainConfig(
        data=DataOptions(dataset=(training,)),
        measuring=MeasuringOptions(eval_dataset=(str(measured),), eval_box_orientation=orientation),
    )
    envs = _evaluation_envs(config)
    assert envs.task.source.get(0).target == pytest.approx(box)
    envs.close()


@pytest.mark.parametrize("name", ["eval_boxes_in", "eval_box_orientation"])
def test_their_form_goes_with_the_data_set(name: str) -> None:
    value = {"eval_boxes_in": "xywh", "eval_box_orientation": "stored"}[name]
    with pytest.raises(ConfigError, match=f"{name} goes with eval_dataset"):
        MeasuringOptions(**{name: value})  # type: ignore[arg-type]
