"""Logs and checkpoints of a run's folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from test_cli import fails

from vlmenv.core.errors import ConfigError
from vlmenv.options.files import read_options
from vlmenv.runs import run_folder
from vlmenv.runs.run_folder import RunFolder


def line(step: int, text: str = "x") -> bytes:
    return json.dumps({"step": step, "text": text}).encode() + b"\n"


def steps(file: Path) -> list[int]:
    return [json.loads(one)["step"] for one in file.read_bytes().splitlines()]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(map(line, (1, 2, 3))))
    (tmp_path / "rollouts.jsonl").write_bytes(b"".join(line(step, "é" * 100_000) for step in (1, 1, 2, 2, 3)))
    return RunFolder(tmp_path)


@pytest.mark.parametrize("end", [b"", b'{"step": 4, "te', b"\0" * 5000, b"\xff\xfe"])
def test_logs_are_cut_back_to_a_step(run: RunFolder, end: bytes) -> None:
    """With the lengths of a checkpoint, and without them as in checkpoints of earlier versions."""
    lengths = {"metrics.jsonl": len(line(1)) * 2, "rollouts.jsonl": 4 * len(line(1, "é" * 100_000))}
    for known in (lengths, None):
        for name in lengths:
            with (run.path / name).open("ab") as stream:
                stream.write(end)
        assert run.cut(2, known) == []
        assert steps(run.path / "metrics.jsonl") == [1, 2]
        assert steps(run.path / "rollouts.jsonl") == [1, 1, 2, 2]
        assert run.flush_logs() == lengths
    assert run.cut(0, {}) == []
    assert run.flush_logs() == {"metrics.jsonl": 0, "rollouts.jsonl": 0}


@pytest.mark.parametrize(
    "broken",
    [b"\0" * 30 + b"\n", b"garbage\n", b'{"step": "2"}\n', b'{"step": 2, \n', b"\xff\n", b"[" * 100_000 + b"\n"],
)
def test_a_broken_line_in_the_middle_is_told_and_kept(run: RunFolder, broken: bytes) -> None:
    (run.path / "metrics.jsonl").write_bytes(line(1) + broken + line(3) + line(4))
    told = run.cut(3)
    assert told == [f"{run.path / 'metrics.jsonl'}:2: the line cannot be read and is passed over"]
    assert [set(metrics) for metrics in run.history(3)] == [{"text"}, set(), {"text"}]
    assert (run.path / "metrics.jsonl").read_bytes() == line(1) + broken + line(3)


def test_broken_completions_are_told(run: RunFolder) -> None:
    (run.path / "rollouts.jsonl").write_bytes(line(1) + b"\0\0\0\n" + line(1)[:-9] + b"\n" + line(2))
    assert [one.partition(" the")[0] for one in run.cut(2)] == [
        f"{run.path / 'rollouts.jsonl'}:2:",
        f"{run.path / 'rollouts.jsonl'}:3:",
    ]


def test_lost_lines_are_told(run: RunFolder) -> None:
    size = len(line(1))
    (run.path / "metrics.jsonl").write_bytes(line(1) + line(2)[:5])
    (run.path / "rollouts.jsonl").unlink()
    told = run.cut(2, {"metrics.jsonl": 2 * size, "rollouts.jsonl": 10})
    assert told == [
        f"{run.path / 'metrics.jsonl'} has lost lines: {size + 5} bytes are left of {2 * size}",
        f"{run.path / 'rollouts.jsonl'} is gone",
    ]
    assert steps(run.path / "metrics.jsonl") == [1]


def test_long_lines_are_found_across_chunks(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "_CHUNK", 7)
    with (run.path / "metrics.jsonl").open("ab") as stream:
        stream.write(b"y" * 50)
    run.cut(3, {"metrics.jsonl": 10**6, "rollouts.jsonl": 10**9})
    assert steps(run.path / "metrics.jsonl") == [1, 2, 3]


def test_only_exact_names_are_checkpoints(tmp_path: Path) -> None:
    names = [
        "step-10",
        "step-9",
        "step-5-good",
        "step-4 (copy)",
        "step-04",
        "step-٣",
        ".step-11",
        "step--1",
        "step-",
        "step-7.unused",
    ]
    for name in names:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "trainer.pt").touch()
    (tmp_path / "checkpoints" / "step-12").touch()
    run = RunFolder(tmp_path)
    assert [folder.name for folder in run.checkpoints()] == ["step-9", "step-10"]
    assert [folder.name for folder in run.rests()] == [".step-11"]
    assert [folder.name for folder in run.rests(before=10)] == ["step-9"]
    with pytest.raises(ConfigError, match="already holds a run"):
        run.check_new()  # though there is no metrics.jsonl


def test_a_run_in_a_folder_with_a_line_break_is_read_again(tmp_path: Path) -> None:
    """The name stands in the heads of its YAML files."""
    folder = tmp_path / "a b\nc: [d]"
    RunFolder(folder).create("lr: 1.0\n", "lr: 2.0\nrecord: {run: abc}\n")
    assert RunFolder(folder).identity() == "abc"
    assert read_options(folder / "config.yaml")["lr"] == 1.0


def test_a_folder_whose_name_is_no_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = fails(capsys, "train", "--device", "cpu", "--output", f"{tmp_path}/x\udcff")
    assert "the name is not UTF-8: give another --output" in told
    assert not list(tmp_path.iterdir())


def test_options_that_changed_on_the_way_are_known_up_to_a_step(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.changed_options() == {}
    run.write_change(2, {"options": {"steps": [4, 6], "lr": [0.1, 0.2]}})
    run.write_change(4, {"ranks": [2, 1]})
    run.write_change(6, {"options": {"steps": [6, 8]}})
    assert run.changed_options(2) == {}
    assert run.changed_options(3) == run.changed_options(6) == {"steps": 6, "lr": 0.2}
    assert run.changed_options() == {"steps": 8, "lr": 0.2}


@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts.jsonl", "warnings.jsonl", "changes.jsonl"])
def test_a_pipe_in_place_of_a_log_is_refused_and_not_opened(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    run = RunFolder(tmp_path)
    with pytest.raises(ConfigError, match=name):
        run.cut(0)
    with pytest.raises(ConfigError):
        run.check_new()


def test_evaluations_after_the_step_to_go_on_from_are_removed(run: RunFolder) -> None:
    for name in ("step-1", "step-2", "step-3", "step-3-good", "notes"):
        (run.path / "evaluations" / name).mkdir(parents=True)
    run.cut(2)
    assert sorted(one.name for one in (run.path / "evaluations").iterdir()) == [
        "notes",
        "step-1",
        "step-2",
        "step-3-good",
    ]


@pytest.mark.parametrize(("step", "kept"), [(3, ["step-3"]), (2, [])])
def test_what_an_earlier_end_measured_is_no_end_any_more(step: int, kept: list[str], run: RunFolder) -> None:
    """Of the step to go on from it is an evaluation on the way; of a later one it is gone."""
    (run.path / "after").mkdir()
    (run.path / "after" / "metrics.json").write_text("{}")
    (run.path / "evaluation.json").write_text("{}")
    run.cut(step)
    found = sorted((run.path / "evaluations").glob("*/metrics.json"))
    assert [one.parent.name for one in found] == kept
    assert not (run.path / "after").exists()
    assert not (run.path / "evaluation.json").exists()
