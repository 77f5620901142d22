"""Rows that can be read but not shown: refused with their place, or left out and counted, by every command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from broken_rows import BROKEN, write_rows

from vlmenv.cli import main

pytestmark = pytest.mark.usefixtures("without_pictures")

TINY = ["--device", "cpu", "--max-new-tokens", "24"]
TRAIN = [*TINY, "--prompts-per-step", "4", "--group-size", "2", "--tracker", "none"]
WHOLE = {str(i) for i in range(12) if i not in BROKEN}


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def told(out: str, total: int = 12) -> None:
    """All rows that were left out are told with their places."""
    out = out.replace("\n", " ")
    assert f"{len(BROKEN)} of {total} samples could not be shown and were left out" in out
    for index, reason in BROKEN.items():
        assert f"rows.jsonl:{index + 2} (id {index}): " in out
        assert reason in out


@pytest.mark.parametrize("algo", ["grpo", "sft"])
def test_training_leaves_them_out(algo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, run = write_rows(tmp_path), tmp_path / "run"
    options = ["--algo", algo, "--steps", "4", "--eval-limit", "0", "--checkpoint-every", "2"]
    options += [*TRAIN, "--dataset", str(file), "--skip-broken", "--output", str(run)]
    if algo == "sft":
        at = options.index("--group-size")
        options[at : at + 2] = []
    main(["train", *options])
    told(capsys.readouterr().out)
    shown = lines(run / "rollouts.jsonl")
    assert {one["id"] for one in shown} == WHOLE
    size = 2 if algo == "grpo" else 1
    assert all(a["id"] == b["id"] for a, b in zip(shown[::size], shown[size - 1 :: size], strict=True))
    skipped = [one["data/skipped"] for one in lines(run / "metrics.jsonl")]
    assert skipped == sorted(skipped)
    assert skipped[-1] == len(BROKEN)


def test_training_goes_on_with_what_it_knows_of_them(tmp_path: Path) -> None:
    file, whole, cut = write_rows(tmp_path), tmp_path / "whole", tmp_path / "cut"
    options = ["--eval-limit", "0", "--checkpoint-every", "1", *TRAIN, "--dataset", str(file), "--skip-broken"]
    main(["train", *options, "--steps", "5", "--output", str(whole), "--lr-schedule", "constant"])
    main(["train", *options, "--steps", "2", "--output", str(cut), "--lr-schedule", "constant"])
    config = yaml.safe_load((cut / "config.yaml").read_text()) | {"steps": 5}
    (cut / "config.yaml").write_text(yaml.safe_dump(config))
    main(["train", "--resume", str(cut)])
    assert (cut / "rollouts.jsonl").read_bytes() == (whole / "rollouts.jsonl").read_bytes()
    assert [one["data/skipped"] for one in lines(cut / "metrics.jsonl")] == [
        one["data/skipped"] for one in lines(whole / "metrics.jsonl")
    ]


def test_processes_leave_out_their_own(tmp_path: Path) -> None:
    file, run = write_rows(tmp_path), tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vlmenv"]
    options = ["--steps", "4", "--eval-limit", "12", *TRAIN, "--dataset", str(file), "--skip-broken"]
    command = [*launch, "train", *options, "--output", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    told(done.stdout)
    assert lines(run / "metrics.jsonl")[-1]["data/skipped"] == len(BROKEN)
    assert {one["id"] for one in lines(run / "rollouts.jsonl")} == WHOLE
    assert {one["id"] for one in lines(run / "before" / "answers.jsonl")} == WHOLE
    assert json.loads((run / "before" / "skipped.json").read_text()).keys() == {str(i) for i in BROKEN}


@pytest.mark.parametrize("command", ["eval", "train"])
def test_the_first_is_refused_with_its_place(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_rows(tmp_path)
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.png").read_bytes())
    options = ["--eval-limit", "0", "--steps", "6", *TRAIN] if command == "train" else [*TINY, "--batch-size", "4"]
    with pytest.raises(SystemExit):
        main([command, "--dataset", str(file), "--output", str(tmp_path / "out"), *options])
    err = capsys.readouterr().err
    found = [index for index in BROKEN if f"rows.jsonl:{index + 2} (id {index}): " in err]
    assert len(found) == 1
    assert BROKEN[found[0]] in err


def test_measuring_leaves_them_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = ["--dataset", str(write_rows(tmp_path)), "--skip-broken", "--output", str(out), *TINY]
    main(["eval", *options, "--batch-size", "3"])
    told(capsys.readouterr().out)
    assert [one["id"] for one in lines(out / "answers.jsonl")] == sorted(WHOLE, key=int)


def test_sampling_leaves_them_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = ["--dataset", str(write_rows(tmp_path)), "--skip-broken", "--output", str(out), *TINY]
    for part in ("0-4", "none"):
        main(["sample", *options, "--n", "2", "--part-size", "4", "--batch-size", "6"])
        told(capsys.readouterr().out)
        rows = [row for level in ("easy", "medium", "hard") for row in lines(out / f"{level}.jsonl")]
        assert {str(row["id"]) for row in rows} == WHOLE
        (out / "parts" / f"{part}.jsonl").unlink(missing_ok=True)  # the second time, one part is made again


def test_no_sample_at_all_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_rows(tmp_path)
    rows = [row for row in lines_of(file) if row["id"] in BROKEN]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for command in (["eval"], ["sample", "--n", "2"]):
        with pytest.raises(SystemExit):
            main([*command, "--dataset", str(file), "--skip-broken", "--output", str(tmp_path / command[0]), *TINY])
        assert "none of the data set's 4 samples can be shown" in capsys.readouterr().err


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines() if line]
