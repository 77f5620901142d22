"""The rows that `docs/data_rows.md` shows are read, and their truth scores fully."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import gymnasium
import pytest
from conftest import ROOT
from PIL import Image

import vlmenv  # noqa: F401 (registers the environments)
from vlmenv.envs.data.convert import convert

PAGE = (ROOT / "docs" / "data_rows.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## `(VLM-\w+-v0)`\n(.*?)(?=^## )", PAGE, flags=re.MULTILINE | re.DOTALL))
FILE = re.compile(r"`([\w/]+\.\w+)`:\n\n```\w+\n(.*?)```", re.DOTALL)
CONVERSIONS = [shlex.split(line)[3:] for line in PAGE.splitlines() if line.startswith("vlmenv data convert")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for path in ("images", "yolo/images"):
        (tmp_path / path).mkdir(parents=True)
        for name, colour in (("1", "red"), ("2", "blue")):
            Image.new("RGB", (64, 48), colour).save(tmp_path / path / f"{name}.jpg")
    (tmp_path / "yolo/images/2.jpg").unlink()
    first, second = (Image.new("RGB", (64, 48), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "images" / "1.gif", save_all=True, append_images=[second], duration=2000)
    for name, content in FILE.findall(PAGE):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(task: str, file: Path, images: Path) -> None:
    env = gymnasium.make(task, dataset=str(file), image_root=str(images)).unwrapped
    main = next(name for name in env.default_rewards if name != "clip")
    assert env.source.size
    assert not env.source.usage.unused
    for index in range(env.source.size):
        env.reset(options={"index": index})
        info = env.step(env.write_answer(env.source.get(index)))[4]
        assert info["rewards"][main] == pytest.approx(1), (file, index, info)


@pytest.mark.parametrize("task", SECTIONS)
def test_rows_of_each_task_are_read(task: str, folder: Path) -> None:
    files = FILE.findall(SECTIONS[task])
    assert files
    for name, _ in files:
        check(task, folder / name, folder / "images")


@pytest.mark.parametrize("words", CONVERSIONS, ids=" ".join)
def test_formats_are_converted(words: list[str], folder: Path) -> None:
    source, target, *options = words
    convert(Path(source), Path(target), images=Path(options[1]) if options else None)
    check("VLM-OVD-v0", folder / target, folder)


def test_the_page_has_all_tasks_and_formats() -> None:
    assert len(SECTIONS) == 14
    assert len(CONVERSIONS) == 4
