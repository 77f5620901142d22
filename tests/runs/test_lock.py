"""Locks on output folders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vlmenv.core.errors import ConfigError
from vlmenv.runs.lock import LOCK, locked
from vlmenv.runs.run_folder import RunFolder

HOLD = """
import sys, time
from pathlib import Path
from vlmenv.runs.lock import locked
with locked(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(600)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_another_process_is_named_until_it_is_killed(tmp_path: Path) -> None:
    folder, told = tmp_path / "run", list[str]()
    with holder(folder) as process:
        with (
            pytest.raises(ConfigError, match=rf"written by process {process.pid} on .*, since "),
            locked(folder, print),
        ):
            pass
        process.kill()
    with locked(folder, told.append):
        assert json.loads((folder / LOCK).read_text())["pid"] != process.pid
    (line,) = told
    assert f"process {process.pid} on" in line
    assert "If it still runs" not in line


def test_a_second_run_in_one_process_is_refused(tmp_path: Path) -> None:
    with (
        locked(tmp_path, print),
        pytest.raises(ConfigError, match="another run in this process"),
        locked(tmp_path / ".." / tmp_path.name, print),
    ):
        pass
    with locked(tmp_path, pytest.fail):  # the refused one has not taken it over
        pass


def test_a_folder_is_left_only_if_something_was_written(tmp_path: Path) -> None:
    with locked(tmp_path / "new" / "run", print):
        pass
    assert not (tmp_path / "new").exists()
    with locked(tmp_path / "run", print):
        (tmp_path / "run" / "file").touch()
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["file"]
    with locked(tmp_path / "run", pytest.fail):
        pass


def test_an_owner_elsewhere_is_named(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(json.dumps({"pid": 7, "host": "elsewhere", "since": "then"}) + "\n")
    told: list[str] = []
    with locked(tmp_path, told.append):
        pass
    assert "process 7 on elsewhere, since then" in told[0]
    assert "If it still runs on elsewhere" in told[0]


def test_a_lock_file_of_garbage_is_taken(tmp_path: Path) -> None:
    for content in (b"\0" * 100, b"[1]", b"\xff{"):
        (tmp_path / LOCK).write_bytes(content)
        with locked(tmp_path, pytest.fail):
            pass


def test_runs_of_one_second_get_names_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(RunFolder, "default_path", lambda env, algo: Path("runs/now-REC-grpo"))
    made = [RunFolder.make_default("VLM-REC-v0", "grpo").name for _ in range(3)]
    assert made == ["now-REC-grpo", "now-REC-grpo-2", "now-REC-grpo-3"]
