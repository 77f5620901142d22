"""Folders of runs in a state that nobody planned: what is told, by file, and that no run is harmed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import TINY, fails, rows

from vlmenv.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_pictures")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run: Path = tmp_path_factory.mktemp("strange") / "run"
    main(["train", "--steps", "1", "--output", str(run), *TINY, "--eval-limit", "0", "--max-new-tokens", "4"])
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def folder_instead(name: str) -> Callable[[Path], None]:
    def happens(run: Path) -> None:
        (run / name).unlink(missing_ok=True)
        (run / name).mkdir()

    return happens


def fifo_instead(name: str) -> Callable[[Path], None]:
    def happens(run: Path) -> None:
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)

    return happens


def written(name: str, content: bytes) -> Callable[[Path], None]:
    def happens(run: Path) -> None:
        (run / name).write_bytes(content)

    return happens


def of_the_future(run: Path) -> None:
    """A checkpoint as another version might write it: whole, with a state that lacks what this one looks for."""
    state = torch.load(run / "checkpoints" / "step-1" / "trainer.pt", weights_only=True)
    del state["optimizer"]
    state["something"] = 1
    torch.save(state, run / "checkpoints" / "step-1" / "trainer.pt")
    sealed(run, {})


def sealed(run: Path, facts: dict[str, Any]) -> None:
    """Writes the manifest of the checkpoint anew, as if it had been written so."""
    folder = run / "checkpoints" / "step-1"
    content = json.loads((folder / "manifest.json").read_text())["content"] | facts
    file = (folder / "trainer.pt").read_bytes()
    content["files"]["trainer.pt"] = {"bytes": len(file), "sha256": hashlib.sha256(file).hexdigest()}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"sha256": digest, "content": content}))


def link_to_itself(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "step-1")
    (run / "checkpoints" / "step-1").symlink_to("step-1")


REFUSED: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "config.yaml is a folder": (folder_instead("config.yaml"), ["config.yaml"]),
    "config.yaml is cut in a list": (written("config.yaml", b"steps: [1,\n"), ["config.yaml", "not YAML"]),
    "config.yaml is binary": (written("config.yaml", b"\xff\xfe\x00"), ["config.yaml"]),
    "config.yaml is nested too deeply": (written("config.yaml", b"a: " + b"[" * 20_000), ["config.yaml", "not YAML"]),
    "config.yaml has a date that is none": (written("config.yaml", b"seed: 2020-13-45\n"), ["config.yaml", "not YAML"]),
    "config.yaml has an unknown option": (written("config.yaml", b"future_option: 1\n"), ["future_option"]),
    "rollouts.jsonl is a folder": (folder_instead("rollouts.jsonl"), ["rollouts.jsonl"]),
    "metrics.jsonl is a FIFO": (fifo_instead("metrics.jsonl"), ["metrics.jsonl"]),
    "the lock is a folder": (folder_instead(".lock"), [".lock"]),
    "the checkpoint is of the future": (of_the_future, ["step-1", "lacks 'optimizer'", "another version"]),
    "the manifest is nested too deeply": (
        written("checkpoints/step-1/manifest.json", b"[" * 100_000),
        ["step-1", "manifest.json cannot be read"],
    ),
    "the manifest is a list": (written("checkpoints/step-1/manifest.json", b"[1]"), ["step-1", "manifest.json"]),
    "the manifest's files are none": (lambda run: manifest_without_files(run), ["step-1", "manifest.json"]),
}


def manifest_without_files(run: Path) -> None:
    content = {"step": 1}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    manifest = {"sha256": digest, "content": content}
    (run / "checkpoints" / "step-1" / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_gone_on_from_is_named(fault: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    happens, told = REFUSED[fault]
    happens(run)
    message = " ".join(fails(capsys, "train", "--resume", str(run), "--steps", "2").split())
    assert all(part in message for part in told), message


GONE_ON: dict[str, Callable[[Path], object]] = {
    "facts of the future": lambda run: sealed(run, {"something": {"new": 1}}),
    "resolved.yaml is a folder": folder_instead("resolved.yaml"),
    "files of next century": lambda run: [os.utime(file, (4e9, 4e9)) for file in run.rglob("*")],
    "a broken symbolic link beside the checkpoints": lambda run: (run / "checkpoints" / "step-7").symlink_to("nowhere"),
    "the only checkpoint is a link to itself": link_to_itself,
    "read-only files": lambda run: [file.chmod(0o444) for file in run.rglob("*.jsonl")],
    "a FIFO beside the logs": lambda run: os.mkfifo(run / "pipe"),
    "config.yaml with a byte order mark": lambda run: (run / "config.yaml").write_bytes(
        b"\xef\xbb\xbf" + (run / "config.yaml").read_bytes()
    ),
}


@pytest.mark.parametrize("fault", GONE_ON)
def test_what_does_no_harm_is_gone_on_with(fault: str, run: Path) -> None:
    GONE_ON[fault](run)
    main(["train", "--resume", str(run), "--steps", "2"])
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("name", ["a link to itself", "a file", "a file/below it", "a link to nowhere/below it"])
def test_an_output_that_cannot_be_a_folder(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a link to itself").symlink_to("a link to itself")
    (tmp_path / "a link to nowhere").symlink_to("nowhere/at all")
    (tmp_path / "a file").touch()
    told = fails(capsys, "train", "--steps", "1", "--output", str(tmp_path / name), *TINY)
    assert name.split("/")[0] in " ".join(told.split())


@pytest.mark.parametrize("name", ["nothing", "a file", "a folder"])
def test_what_is_no_run_is_not_resumed(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a file").touch()
    (tmp_path / "a folder").mkdir()
    assert name in " ".join(fails(capsys, "train", "--resume", str(tmp_path / name)).split())
    assert not (tmp_path / "nothing").exists()
