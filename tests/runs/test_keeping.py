"""What is kept for reports while a run goes on."""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_run import make_run
from PIL import Image as PILImage

from vlmenv.core.console import PlainConsole
from vlmenv.core.errors import DataError
from vlmenv.envs.data.source import Sample, Source
from vlmenv.envs.ovd import OVDEnv
from vlmenv.envs.rec import RECEnv
from vlmenv.envs.vector import VisualTaskVectorEnv
from vlmenv.evaluation import Evaluation
from vlmenv.runs.album import LONGEST_SIDE, Album, groups_shown, read_album
from vlmenv.runs.keeping import Keeping
from vlmenv.runs.run_folder import RunFolder


class Photos(Source):
    """Large photos with a box each; the second cannot be read."""

    size = 3

    def get(self, index: int) -> Sample:
        if index == 1:
            raise DataError("photo 1 is broken")
        image = np.full((600, 800, 3), 40 * index, dtype=np.uint8)
        return Sample(f"photo {index}", (image,), "the cup", (100.0, 60.0, 400.0, 300.0), sizes=((1600, 1200),))


def test_samples_are_kept_once_small_and_in_pixels(tmp_path: Path) -> None:
    task = RECEnv(dataset=Photos(), coordinates="norm1000")
    album = Album(tmp_path / "samples", task, "train")
    assert list(album.keep([0, 1, 2, 0])) == [0, 2]
    again = Album(tmp_path / "samples", task, "train")
    assert list(again.keep([2])) == [2]
    assert list(again.keep([1], {1: Photos().get(0)})) == [1]  # its image has gone since it was shown
    lines = (tmp_path / "samples" / "index.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["train/0", "train/2", "train/1"]
    kept = read_album(tmp_path / "samples")["train/2"]
    assert kept["true"] == [["", [100.0, 60.0, 400.0, 300.0]]]
    assert kept["scale"] == [1.6, 1.2]  # thousandths of the full image, which was decoded at half its size
    (image,) = kept["images"]
    assert (image["width"], image["height"]) == (1600, 1200)
    with PILImage.open(tmp_path / "samples" / image["file"]) as picture:
        assert picture.size == (LONGEST_SIDE, LONGEST_SIDE * 3 // 4)
    assert json.loads((tmp_path / "samples" / "task.json").read_text()) == {
        "rewards": {"iou": 1.0, "format": 0.1},
        "right": ["iou/mean", 0.5],
    }


def test_detections_have_their_labels(tmp_path: Path) -> None:
    task = OVDEnv(split="eval")
    Album(tmp_path, task, "eval").keep([0])
    wanted = [[one.label, list(one.box)] for one in task.source.get(0).target]
    assert read_album(tmp_path)["eval/0"]["true"] == wanted
    assert wanted


@pytest.mark.parametrize(("steps", "group_size"), [(1, 1), (300, 8), (5000, 16), (100_000, 64)])
def test_the_number_of_shown_completions_is_bounded(steps: int, group_size: int) -> None:
    shown = [groups_shown(step, steps, group_size) for step in range(1, steps + 1)]
    assert shown[0] >= 1
    assert sum(shown) * group_size <= 8000 + group_size


class Faulty(RECEnv):
    """A task with a fault in what only evaluations use."""

    def measure(self, text: str, target: Any, terms: Mapping[str, float]) -> dict[str, float]:
        raise KeyError("no such thing")


def records(task: RECEnv, indices: list[int]) -> list[dict[str, Any]]:
    made = []
    for index in indices:
        text = task.write_answer(task.source.get(index))
        made.append({"index": index, "completion": text, "rewards": {"iou": 1.0, "format": 1.0}})
    return made


def keeping(task: type[RECEnv], run: Path, said: io.StringIO) -> Keeping:
    envs = VisualTaskVectorEnv(task, 4, group_size=2)
    return Keeping(RunFolder(run), envs, None, 10, PlainConsole(file=said, width=200), active=True)


def test_right_answers_are_marked(tmp_path: Path) -> None:
    rows = records(RECEnv(), [3, 3, 4, 4])
    rows[1]["completion"] = "<answer>[0,0,1,1]</answer>"
    keeping(RECEnv, tmp_path, io.StringIO()).completions(1, rows)
    assert [row["right"] for row in rows] == [True, False, True, True]
    assert set(read_album(tmp_path / "samples")) == {"train/3", "train/4"}


def test_a_fault_is_told_once_and_ends_nothing(tmp_path: Path) -> None:
    said = io.StringIO()
    made = keeping(Faulty, tmp_path, said)
    for step in (1, 2):
        made.completions(step, records(RECEnv(), [3, 3]))
    made.report()
    assert said.getvalue().count("warning: the report is not kept any more, training goes on") == 1
    assert "KeyError: 'no such thing'" in said.getvalue()
    assert not (tmp_path / "report.html").exists()


def test_a_sample_is_read_and_drawn_once_for_all_evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = RECEnv(split="eval")
    held_out = VisualTaskVectorEnv(lambda: task, 4)
    made = Keeping(RunFolder(tmp_path), held_out, held_out, 10, PlainConsole(), active=True)
    answers = [{"index": index, "id": task.source.get(index).id} for index in range(3)]
    made.evaluation(Evaluation({}, answers[:2]))
    read, get = [], task.source.get
    monkeypatch.setattr(task.source, "get", lambda index: read.append(index) or get(index))
    made.evaluation(Evaluation({}, answers))
    assert read == [2]
    assert set(read_album(tmp_path / "samples")) == {"eval/0", "eval/1", "eval/2"}


def test_an_album_goes_on_after_a_line_that_was_cut_off(tmp_path: Path) -> None:
    Album(tmp_path, RECEnv(), "train").keep([1, 2])
    index = tmp_path / "index.jsonl"
    index.write_bytes(index.read_bytes()[:-20])
    Album(tmp_path, RECEnv(), "train").keep([2])
    assert set(read_album(tmp_path)) == {"train/1", "train/2"}


def test_an_album_follows_data_and_rewards_that_change(tmp_path: Path) -> None:
    Album(tmp_path, RECEnv(), "train").keep([0])
    assert read_album(tmp_path)["train/0"]["images"][0]["width"] == 96
    Album(tmp_path, RECEnv(dataset=Photos(), rewards={"iou": 2.0}), "train").keep([0])
    kept = read_album(tmp_path)["train/0"]
    assert (kept["id"], kept["images"][0]["width"]) == ("photo 0", 1600)
    assert json.loads((tmp_path / "task.json").read_text())["rewards"] == {"iou": 2.0}


class FullDisk(io.StringIO):
    """A log on a disk without room."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("said", [io.StringIO(), FullDisk()], ids=["free", "full"])
def test_a_full_disk_ends_reports_alone(said: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path, steps=1, measured=1)
    made = keeping(RECEnv, tmp_path, said)
    assert made.report()
    before = (tmp_path / "report.html").read_text()

    def fill(self: Path, text: str, **options: Any) -> int:
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fill)
    assert not made.report()
    made.completions(2, records(RECEnv(), [3, 3]))
    assert (tmp_path / "report.html").read_text() == before
    assert not (tmp_path / ".report.html").exists()


class Albums(Source):
    """Six photos, of which an album keeps four."""

    size = 1

    def get(self, index: int) -> Sample:
        image = np.zeros((30, 40, 3), dtype=np.uint8)
        return Sample("six", (image,) * 6, "the cup", (1.0, 2.0, 3.0, 4.0), sizes=((40, 30),) * 6)


def test_images_without_end_are_counted(tmp_path: Path) -> None:
    Album(tmp_path, RECEnv(dataset=Albums()), "train").keep([0])
    kept = read_album(tmp_path)["train/0"]
    assert (len(kept["images"]), kept["left_out"]) == (4, 2)
