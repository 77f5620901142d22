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


def test_their_form_goes_with_the_data_set() -> None:
    with pytest.raises(ConfigError, match="eval_boxes_in goes with eval_dataset"):
        MeasuringOptions(eval_boxes_in="xywh")
