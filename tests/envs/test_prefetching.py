"""Samples that are loaded ahead: which files are opened when, and that nothing else tells of it."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from broken_rows import write_rows
from PIL import Image

from vlmenv.core.errors import SampleError
from vlmenv.envs import prefetching
from vlmenv.envs.data.dataset import TableSource
from vlmenv.envs.data.scenes import ReferringScenes

RIGHT, WRONG = (f"<think>t</think><answer>{box}</answer>" for box in ([1, 2, 30, 40], [50, 1, 60, 9]))


class Disk:
    """Counts the images that are opened, and can make their readers wait."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.opened: list[str] = []
        self.changed, self.free = threading.Condition(), threading.Event()
        self.free.set()
        self._open = os.open
        patch.setattr(os, "open", self.open)

    def open(self, path: Any, *args: Any, **options: Any) -> int:
        if str(path).endswith(".png"):
            with self.changed:
                self.opened.append(Path(path).stem)
                self.changed.notify_all()
            assert self.free.wait(30)
        return self._open(path, *args, **options)

    def await_opened(self, count: int) -> list[str]:
        """The images opened so far, once there are so many."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.opened) >= count, 30)
            return list(self.opened)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def write(folder: Path, count: int = 12) -> Path:
    """Rows with an image each, whose colour is its number."""
    rows = []
    for i in range(count):
        Image.new("RGB", (64, 48), (i, 0, 0)).save(folder / f"{i}.png")
        rows.append({"id": i, "image": f"{i}.png", "problem": f"Find square {i}.", "answer": [1, 2, 30, 40]})
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def make(dataset: Path, prompts: int = 2, group_size: int = 2, **arguments: Any) -> Any:
    return gymnasium.make_vec(
        "VLM-REC-v0", num_envs=prompts * group_size, group_size=group_size, dataset=dataset, **arguments
    )


def shown(envs: Any, **how: Any) -> list[str]:
    return [str(one) for one in envs.reset(**how)[1]["id"]]


def test_the_next_images_are_opened_once_after_a_step(tmp_path: Path, disk: Disk) -> None:
    envs = make(write(tmp_path), prompts=3)
    disk.opened.clear()  # of which opening the data set looks at some
    first = set(shown(envs, seed=0))
    assert set(disk.opened) == first
    assert len(disk.opened) == 3, "a reset opened more than it shows"
    envs.step([RIGHT] * 6)
    ahead = disk.await_opened(6)[3:]
    assert set(shown(envs)) == set(ahead)
    assert len(disk.opened) == 6, "an image was opened twice"
    envs.close()


def test_a_reset_waits_for_images_that_are_being_read(tmp_path: Path, disk: Disk) -> None:
    envs = make(write(tmp_path))
    shown(envs, seed=0)
    disk.opened.clear()
    disk.free.clear()
    envs.step([RIGHT] * 4)
    ahead = disk.await_opened(2)
    threading.Timer(0.2, disk.free.set).start()
    assert set(shown(envs)) == set(ahead)
    assert len(disk.opened) == 2
    envs.close()


def play(envs: Any, seed: int, steps: int = 9) -> list[Any]:
    """All that environments tell over some steps, in which some samples are learned and one is replaced."""
    told: list[Any] = []
    how: dict[str, Any] = {"seed": seed}
    for number in range(steps):
        observations, infos = envs.reset(**how)
        if number == 2 and envs.skips_broken:
            observations, infos = envs.reset(options={"replace": {1: "no prompt"}})
        images = [image for images in observations["images"] for image in images]
        told.append((observations["prompt"], [image.tobytes() for image in images], infos["index"].tolist()))
        answers = [RIGHT if i % 2 or index % 3 else WRONG for i, index in enumerate(infos["index"])]
        told.append(envs.step(answers)[1].tolist())
        told.append(envs.state_dict())
        how = {}
    return told


@pytest.mark.parametrize(
    ("rows", "arguments"),
    [
        (write, {}),
        (write, {"shard": 1, "num_shards": 2}),
        (write, {"revisit": 0.25}),
        (write, {"prompts": 15}),
        (write_rows, {"skip_broken": True, "revisit": 0.5}),
    ],
    ids=["plain", "shard", "revisit", "fewer rows than prompts", "broken rows"],
)
def test_nothing_else_changes(
    rows: Callable[[Path], Path], arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = rows(tmp_path)
    with_ahead = [play(make(file, **arguments), seed) for seed in range(3)]
    monkeypatch.setattr(TableSource, "reads_files", False)
    assert with_ahead == [play(make(file, **arguments), seed) for seed in range(3)]


def test_a_run_is_taken_up_with_other_samples_than_those_ahead(tmp_path: Path) -> None:
    envs, same = make(write(tmp_path)), make(tmp_path / "rows.jsonl")
    shown(envs, seed=0)
    state = envs.state_dict()
    envs.step([RIGHT] * 4)
    assert shown(envs, seed=1) == shown(same, seed=1)
    same.step([RIGHT] * 4)
    expected = shown(same, seed=0, options={"state": state})
    assert shown(envs, seed=0, options={"state": state}) == expected
    envs.step([RIGHT] * 4)
    assert shown(envs, options={"index": [7, 8]}) == ["7", "7", "8", "8"]


def test_an_image_that_breaks_is_told_when_it_is_shown(tmp_path: Path, disk: Disk) -> None:
    """With the message of an image that was not loaded ahead; and one that is mended before is shown."""
    envs = make(write(tmp_path))
    shown(envs, seed=0)
    disk.opened.clear()
    for file in tmp_path.glob("*.png"):
        file.write_bytes(b"no image")
    envs.step([RIGHT] * 4)
    ahead = disk.await_opened(2)
    assert envs.skipped == {}
    with pytest.raises(SampleError) as told:
        envs.reset()
    index = told.value.index
    with pytest.raises(SampleError) as later:
        make(tmp_path / "rows.jsonl").reset(options={"index": [index, index]})
    assert str(told.value) == str(later.value)
    assert f"{index}.png cannot be read" in str(told.value)
    assert str(index) in ahead

    write(tmp_path)
    envs.reset(seed=0)
    (tmp_path / f"{index}.png").write_bytes(b"no image")
    disk.opened.clear()
    envs.step([RIGHT] * 4)
    disk.await_opened(2)
    write(tmp_path)
    assert str(index) in shown(envs)


def test_images_ahead_are_bounded(tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # two threads
    monkeypatch.setattr(prefetching, "_MOST_BYTES", 1)
    envs = make(write(tmp_path), prompts=6, group_size=1)
    before = shown(envs, seed=0)
    disk.opened.clear()
    envs.step([RIGHT] * 6)
    after = shown(envs)
    assert {*before, *after} == {str(i) for i in range(12)}
    assert len(disk.opened) <= 6
    assert set(disk.opened) == set(after)
    loader = envs.unwrapped._loader
    loader.begin(range(6))
    assert 1 <= sum(one.result() is not None for one in loader._ahead.values()) <= 2
    envs.close()


def test_closing_ends_it(tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    before = set(threading.enumerate())
    envs = make(write(tmp_path), prompts=6, group_size=1)
    shown(envs, seed=0)
    disk.opened.clear()
    disk.free.clear()
    envs.step([RIGHT] * 6)
    disk.await_opened(2)
    envs.close()
    disk.free.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(30)
        assert not thread.is_alive()
    assert len(disk.opened) == 2, "images were opened after the end"


def test_samples_that_are_drawn_or_chosen_are_not_loaded_ahead(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    get = ReferringScenes.get
    monkeypatch.setattr(ReferringScenes, "get", lambda self, index: (drawn.append(index), get(self, index))[1])
    envs = gymnasium.make_vec("VLM-REC-v0", num_envs=2)
    envs.reset(seed=0)
    envs.step([RIGHT] * 2)
    envs.close()
    assert len(drawn) == 2
    envs = make(write(tmp_path))
    disk.opened.clear()
    shown(envs, options={"index": [3, 4]})
    envs.step([RIGHT] * 4)
    envs.unwrapped._loader._pool.shutdown(wait=True)
    assert sorted(disk.opened) == ["3", "4"]


def test_colours_are_those_of_the_rows(tmp_path: Path) -> None:
    envs = make(write(tmp_path))
    for _ in range(6):
        observations, infos = envs.reset()
        for images, index in zip(observations["images"], infos["index"], strict=True):
            assert np.all(images[0] == (index, 0, 0))
        envs.step([RIGHT] * 4)
    envs.close()
