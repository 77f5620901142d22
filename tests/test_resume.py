"""Runs that are cut off and go on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vlmenv.cli import main
from vlmenv.core.errors import ModelError
from vlmenv.envs.making import visual_tasks
from vlmenv.options.train import LoggingOptions
from vlmenv.runs.checkpoints import prune
from vlmenv.runs.lock import locked
from vlmenv.runs.manifest import damage, read_manifest, write_manifest
from vlmenv.runs.models import checkpoint_of
from vlmenv.runs.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("without_pictures")

TINY = ["--prompts-per-step", "2", "--group-size", "4", "--eval-limit", "4", "--device", "cpu"]
ENTROPY = ["--entropy-bonus", "0.01", "--entropy-control", "clip_cov", "--cov-low", "0.1"]
OPTIONS = {
    "all weights": ["--algo", "grpo", "--mu", "2", "--minibatches", "2", "--beta", "0.01"],
    "adapters": ["--lora-rank", "4", "--lora-dropout", "0.1", "--lora-vision", "--beta", "0.01"],
    "critic": ["--algo", "ppo", "--freeze-projector", "--save-dtype", "bf16", "--vision-lr", "1e-4"],
    "replays": ["--algo", "grpo", "--replay", "6", "--rewards", "iou@0.5", "1", "--beta", "0.01"],
    "curriculum": ["--revisit", "0.2", "--rewards", "iou@0.5", "1"],
    "resampling": ["--algo", "dapo", "--most-rounds", "3", "--gradient-checkpointing"],
    "imitation": ["--algo", "sft", "--group-size", "1"],
    "masks": ["--algo", "papo_g", "--masked-entropy-loss", "0.03", *ENTROPY, "--visual-dependence-every", "2"],
    "teacher": ["--algo", "opd", "--teacher", "builtin", "--reward-weight", "0.5", "--per-term"],
}

WHOLE = ("model.safetensors", "float32/model.safetensors")
WRITTEN = {"adapters": ("adapter_model.safetensors",), "critic": (*WHOLE, "value_head/value_head.safetensors")}
"""Files that some of these leave in a checkpoint."""


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def timeless(run: Path) -> list[dict]:
    kept = rows(run / "metrics.jsonl")
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "memory/", "tokens_per_second"))} for row in kept
    ]


def train(run: Path, *options: str) -> None:
    main(["train", "--steps", "5", "--checkpoint-every", "2", "--output", str(run), *TINY, *options])


PICTURED = "all weights"


@pytest.mark.parametrize("sort", [pytest.param(PICTURED, marks=pytest.mark.pictures), *[*OPTIONS][1:]])
def test_a_resumed_run_goes_on_bit_for_bit(sort: str, tmp_path: Path) -> None:
    """The whole run, and one that lost everything after step 2 in the middle of writing step 4."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    if "--revisit" in OPTIONS[sort]:
        main(["sample", "--eval-limit", "4", "--n", "1", "--device", "cpu", "--output", str(tmp_path)])
        files = [str(file) for file in (tmp_path / "easy.jsonl", tmp_path / "hard.jsonl") if file.stat().st_size]
        train(whole, "--dataset", *files, *OPTIONS[sort])
    else:
        train(whole, *OPTIONS[sort])
    shutil.copytree(whole, cut)
    for step in (4, 5):
        shutil.rmtree(cut / "checkpoints" / f"step-{step}")
    (cut / "checkpoints" / ".step-4").mkdir()
    pictures = ("curve.png", "samples.png") if sort == PICTURED else ()
    for name in ("evaluation.json", *pictures):
        (cut / name).unlink()
    lines = (cut / "metrics.jsonl").read_text().splitlines()
    (cut / "metrics.jsonl").write_text("\n".join(lines[:3]) + "\n" + lines[3][:40])
    main(["train", "--resume", str(cut)])
    assert timeless(cut) == timeless(whole)
    assert rows(cut / "rollouts.jsonl") == rows(whole / "rollouts.jsonl")
    ours, theirs = (run / "checkpoints" / "step-5" for run in (cut, whole))
    for folder in (ours, theirs):
        written = {file.relative_to(folder).as_posix() for file in folder.rglob("*.safetensors")}
        assert written == set(WRITTEN.get(sort, WHOLE))
    for name in written:
        a, b = load_file(ours / name), load_file(theirs / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in b)
    assert json.loads((cut / "evaluation.json").read_text()) == json.loads((whole / "evaluation.json").read_text())
    assert all((cut / name).is_file() for name in pictures)


@pytest.mark.parametrize("missing", ["nothing", "before/metrics.json", "before", "metrics.jsonl"])
def test_a_run_without_a_checkpoint_starts_over(missing: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Killed while it wrote its first checkpoint, or when it had done even less."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = ["--steps", "2", *TINY, *OPTIONS["adapters"]]
    main(["train", "--output", str(whole), *options])
    shutil.copytree(whole, cut)
    (cut / "checkpoints" / "step-2").rename(cut / "checkpoints" / ".step-2")
    (cut / "evaluation.json").unlink()
    subprocess.run(["rm", "-rf", str(cut / missing)], check=True)
    main(["train", "--resume", str(cut)])
    assert "no checkpoint yet: starting over" in capsys.readouterr().out
    assert timeless(cut) == timeless(whole)
    assert rows(cut / "rollouts.jsonl") == rows(whole / "rollouts.jsonl")
    assert [folder.name for folder in (cut / "checkpoints").iterdir()] == ["step-2"]
    ours, theirs = (load_file(run / "checkpoints/step-2/adapter_model.safetensors") for run in (cut, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert (cut / "evaluation.json").read_text() == (whole / "evaluation.json").read_text()


def begun(run: Path, *options: str, **streams: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vlmenv", "train", "--output", str(run), *TINY, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, text=True, env=environment, **({"stdout": subprocess.PIPE} | streams))


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 300
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "times"),
    [(signal.SIGINT, 1), (signal.SIGTERM, 2), (signal.SIGHUP, 1), (signal.SIGKILL, 1)],
)
def test_a_run_that_is_stopped_can_go_on(number: signal.Signals, times: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = begun(run, "--steps", "400", "--checkpoint-every", "3")
    wait_for(run / "checkpoints" / "step-3" / "trainer.pt")
    for _ in range(times):
        process.send_signal(number)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    saved = max(int(folder.name.removeprefix("step-")) for folder in (run / "checkpoints").glob("step-*"))
    if number != signal.SIGKILL:
        assert f"vlmenv train --resume {run}" in out
        assert saved == rows(run / "metrics.jsonl")[-1]["step"]
    main(["train", "--resume", str(run), "--steps", str(saved + 1)])
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == list(range(1, saved + 2))


def test_a_signal_is_heard_while_the_model_is_measured(tmp_path: Path) -> None:
    """Before training, where nothing is lost, and in it, where the state is saved first."""
    early, late = tmp_path / "early", tmp_path / "late"
    process = begun(early, "--steps", "2", "--eval-limit", "100000")
    wait_for(early / "tensorboard")
    time.sleep(1)  # which is after this
    process.terminate()
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "stopped while measuring" in out
    assert not (early / "checkpoints").exists()
    process = begun(late, "--steps", "2", "--eval-limit", "0", stdout=subprocess.DEVNULL)
    assert process.wait(timeout=300) == 0
    main(["train", "--resume", str(late), "--steps", "3", "--eval-limit", "2", "--eval-every", "3"])
    assert (late / "checkpoints" / "step-3" / "trainer.pt").is_file()


def test_output_that_goes_away_ends_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    reader, writer = os.pipe()
    process = begun(run, "--steps", "2", stdout=writer, stderr=writer)
    os.close(writer)
    os.close(reader)
    assert process.wait(timeout=300) == 0
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == [1, 2]
    assert (run / "evaluation.json").is_file()


def test_checkpoints_are_written_by_time(tmp_path: Path) -> None:
    """Without checkpoint_every; the two newest stay."""
    run = tmp_path / "run"
    main(["train", "--steps", "4", "--checkpoint-minutes", "1e-9", "--output", str(run), *TINY])
    assert {folder.name for folder in (run / "checkpoints").iterdir()} == {"step-3", "step-4"}
    assert (LoggingOptions().minutes, LoggingOptions().kept) == (30, 2)
    assert (LoggingOptions(checkpoint_every=5).minutes, LoggingOptions(checkpoint_every=5).kept) == (0, None)
    assert LoggingOptions(checkpoint_minutes=0).minutes == 0


def test_old_checkpoints_are_pruned_and_the_best_model_is_kept(tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--steps", "5", "--checkpoint-every", "2", "--keep", "2", "--eval-every", "2", "--output", str(run)]
    main(["train", *options, *TINY])
    assert sorted(folder.name for folder in (run / "checkpoints").iterdir()) == ["step-4", "step-5"]
    (run / "checkpoints" / "step-2").mkdir()  # the rest of one whose removal was cut off
    prune(RunFolder(run), 1)
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step-5"]
    best = json.loads((run / "best.json").read_text())
    measured = {row["step"]: row["eval/iou/mean"] for row in rows(run / "metrics.jsonl") if "eval/iou/mean" in row}
    assert measured.keys() == {2, 4}
    assert best["value"] == max(measured.values()) == measured[best["step"]]
    manifest = read_manifest(run / "best")
    assert manifest is not None
    assert manifest["step"] == best["step"]
    assert damage(run / "best", manifest) is None
    assert not list(run.glob("*partial*"))
    assert checkpoint_of(str(run)) is not None
    with (run / "best" / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"?")
    with pytest.raises(ModelError, match=r"best: model\.safetensors has other bytes than were written\. Remove the"):
        checkpoint_of(str(run))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--resume", "nowhere"], "nowhere is no folder of a run"),
        (["--resume", "run", "--seed", "9"], "a run is resumed with its own options, not with seed"),
        (["--data-changed"], "data_changed goes with resume"),
        (["--resume", "run"], "run is no folder of a run: it holds no config.yaml"),
    ],
)
def test_what_cannot_be_resumed_is_told(
    args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/.config.yaml").write_text("steps: 2\neval_limit: 0\ndevice: cpu\n")
    with pytest.raises(SystemExit):
        main(["train", *args])
    assert message in " ".join(capsys.readouterr().err.split())


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def told(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What is printed, also where the command fails."""
    with suppress(SystemExit):
        main(["train", *args])
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five steps with checkpoints after 2, 4 and 5."""
    run: Path = tmp_path_factory.mktemp("whole") / "run"
    train(run)
    return run


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def same(run: Path, whole: Path) -> bool:
    """True if two runs have the same metrics, completions and weights."""
    ours, theirs = (load_file(one / "checkpoints" / "step-5" / "model.safetensors") for one in (run, whole))
    equal = all(torch.equal(ours[name], theirs[name]) for name in theirs)
    return equal and timeless(run) == timeless(whole) and rows(run / "rollouts.jsonl") == rows(whole / "rollouts.jsonl")


def test_damaged_and_foreign_checkpoints_are_passed_over(
    copied: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The newest is damaged, the one before is of another run; folders of other names are nothing to it."""
    folder = copied / "checkpoints"
    flip(folder / "step-5" / "model.safetensors")
    manifest = read_manifest(folder / "step-4")
    assert manifest is not None
    (folder / "step-4" / "manifest.json").unlink()
    write_manifest(folder / "step-4", manifest | {"run": "0123456789abcdef"})
    for name in ("step-9 (copy)", "step-7-good"):
        shutil.copytree(folder / "step-2", folder / name)
    printed = told(capsys, "--resume", str(copied))
    assert "step-5 is passed over: model.safetensors has other bytes than were written" in printed
    assert "step-4 is passed over: it is of another run, 0123456789abcdef" in printed
    assert "going on after step 2" in printed
    assert same(copied, whole)
    names = {"step-2", "step-4", "step-5", "step-4.unused", "step-5.unused", "step-9 (copy)", "step-7-good"}
    assert {one.name for one in folder.iterdir()} == names


def test_without_a_whole_checkpoint_nothing_is_trained(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(copied / "checkpoints" / "step-2")
    (copied / "checkpoints" / "step-4" / "manifest.json").unlink()
    (copied / "checkpoints" / "step-5" / "process-0.pt").unlink()
    before = (copied / "metrics.jsonl").read_bytes()
    printed = told(capsys, "--resume", str(copied))
    assert "error:" in printed
    assert "step-5 is passed over: process-0.pt is missing" in printed
    assert "step-4 is passed over: manifest.json is missing" in printed
    assert (copied / "metrics.jsonl").read_bytes() == before


def test_checkpoints_of_earlier_versions_are_gone_on_from(
    copied: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They have no manifest, and their run has no id."""
    shutil.rmtree(copied / "checkpoints" / "step-5")
    for step in (2, 4):
        (copied / "checkpoints" / f"step-{step}" / "manifest.json").unlink()
    for name in ("config.yaml", "resolved.yaml"):
        file = copied / name
        file.write_text("\n".join(line for line in file.read_text().splitlines() if not line.startswith("  run: ")))
    printed = told(capsys, "--resume", str(copied))
    assert "step-4 has no manifest, as earlier versions wrote none" in printed
    assert "going on after step 4" in printed
    assert same(copied, whole)


def test_a_run_is_resumed_by_processes_of_its_kind(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied / "checkpoints" / "step-5"
    manifest = read_manifest(folder)
    assert manifest is not None
    torch.save(torch.load(folder / "trainer.pt") | {"processes": "ZeRO"}, folder / "trainer.pt")
    (folder / "manifest.json").unlink()
    write_manifest(folder, manifest)
    assert "saved with ZeRO, not with whole copies" in told(capsys, "--resume", str(copied))


def test_another_number_of_ranks_goes_on_with_a_warning(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One rank goes on from two, whose second had a state of its own; the other way round see test_launch."""
    shutil.rmtree(copied / "checkpoints" / "step-5")
    folder = copied / "checkpoints" / "step-4"
    manifest = read_manifest(folder)
    assert manifest is not None
    shutil.copy(folder / "process-0.pt", folder / "process-1.pt")
    (folder / "manifest.json").unlink()
    write_manifest(folder, manifest | {"ranks": 2})
    printed = told(capsys, "--resume", str(copied))
    assert "was saved by 2 ranks, and 1 go on: the run is not the same bit for bit" in printed
    assert [row["step"] for row in rows(copied / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert rows(copied / "changes.jsonl")[0]["ranks"] == [2, 1]


def test_a_cut_record_is_refused(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It would resume with defaults in place of what was lost."""
    lines = (copied / "resolved.yaml").read_text().splitlines()
    (copied / "resolved.yaml").write_text("\n".join(lines[: len(lines) // 2]))
    (copied / "config.yaml").write_text("")
    assert "resolved.yaml is cut off" in told(capsys, "--resume", str(copied))


def test_an_emptied_config_leaves_the_options_of_the_record(copied: Path, whole: Path) -> None:
    shutil.rmtree(copied / "checkpoints" / "step-5")
    (copied / "config.yaml").write_text("")
    main(["train", "--resume", str(copied)])
    assert same(copied, whole)
    assert not (copied / "changes.jsonl").exists()


def test_options_that_differ_are_told_and_recorded(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(copied / "checkpoints" / "step-5")
    file = copied / "config.yaml"
    file.write_text(file.read_text() + "lr: 1.0e-5\n")
    printed = told(capsys, "--resume", str(copied), "--steps", "6")
    assert "changed since step 4: option lr: 1e-05, was 0.0003" in printed
    assert "changed since step 4: option steps: 6, was 5" in printed
    (change,) = rows(copied / "changes.jsonl")
    assert change["step"] == 4
    assert change["options"] == {"steps": [5, 6], "lr": [0.0003, 1e-05]}
    assert "changed since" not in told(capsys, "--resume", str(copied), "--steps", "6")


CHANGES: dict[str, Callable[[list[str]], list[str]]] = {
    "its rows stand in another order": lambda lines: lines[::-1],
    "it has 8 samples, and had 12 samples; the first 8 rows are the same": lambda lines: lines[:8],
    "it has 24 samples, and had 12 samples; the first 12 rows are the same": lambda lines: lines + lines,
    "rows differ, the first of them:": lambda lines: [
        *lines[:-1],
        lines[-1].replace("[1, 2, 30, 40]", "[1, 2, 9, 40]"),
    ],
}


@pytest.fixture(scope="module")
def on_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set of twelve rows, and a run on it that was cut off after step 2."""
    folder: Path = tmp_path_factory.mktemp("on_rows")
    turns = [{"from": "human", "value": "Where is it?"}, {"from": "gpt", "value": "[1, 2, 30, 40]"}]
    Image.new("RGB", (64, 64)).save(folder / "one.png")
    lines = [json.dumps({"id": i, "image": "one.png", "conversations": turns}) for i in range(12)]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    train(folder / "run", "--dataset", str(folder / "rows.jsonl"), "--revisit", "0.5")
    for step in (4, 5):
        shutil.rmtree(folder / "run" / "checkpoints" / f"step-{step}")
    return folder


@pytest.mark.parametrize("what", CHANGES)
def test_changed_data_are_refused_with_what_changed(
    what: str, on_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, run = on_rows / "rows.jsonl", shutil.copytree(on_rows / "run", tmp_path / "run")
    whole = file.read_text()
    file.write_text("\n".join(CHANGES[what](whole.splitlines())))
    try:
        printed = told(capsys, "--resume", str(run))
        assert f"the data set has changed since. the training data: {what}" in printed
        assert "Put it back, or go on with --data-changed" in printed
        assert "going on" in told(capsys, "--resume", str(run), "--data-changed")
    finally:
        file.write_text(whole)
    (change,) = rows(run / "changes.jsonl")
    assert change["step"] == 2
    assert change["data"]["training"].startswith(what)
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_broken_logs_are_cut_or_told(copied: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(copied / "checkpoints" / "step-5")
    (copied / "warnings.jsonl").write_bytes(b"garbage\n\0\0")
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        content = (copied / name).read_bytes()
        lines = content.split(b"\n")
        lines[1] = b"\0" * len(lines[1])
        (copied / name).write_bytes(b"\n".join(lines)[:-30] + b"\0" * 100)
    printed = told(capsys, "--resume", str(copied))
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert f"{name}:2: the line cannot be read and is passed over" in printed
        lines, others = ((run / name).read_bytes().splitlines() for run in (copied, whole))
        assert len(lines) == len(others)
        kept = [json.loads(line)["step"] for line in lines if b"\0" not in line]
        assert kept == [json.loads(line)["step"] for number, line in enumerate(others) if number != 1]
    assert "error" not in printed


def test_other_damaged_files_of_a_run_are_told(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The measuring before training is made again; the record of the best model is somebody's to decide on."""
    (copied / "best.json").write_bytes(b'{"step": 1, "va\0\0')
    printed = told(capsys, "--resume", str(copied))
    assert f"{copied / 'best.json'} is damaged" in printed
    assert "remove it, and the model that is measured next is the best again" in printed
    (copied / "best.json").unlink()
    before = copied / "before"
    whole = {file.name: file.read_bytes() for file in before.iterdir()}
    for name, content in whole.items():
        if name not in ("answers.jsonl", "metrics.json"):
            continue
        for damaged in (b"\0" * 20 + content[20:], b"[]", b'{"a": 1}\n'):
            (before / name).write_bytes(damaged)
            printed = told(capsys, "--resume", str(copied))
            assert f"{name}" in printed
            assert "is damaged" in printed
            assert "measured again" in printed
            assert "Traceback" not in printed
            assert (before / name).read_bytes() == content


def test_a_run_that_goes_on_is_not_begun_twice(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(copied, print):
        assert "is written by another run" in told(capsys, "--resume", str(copied))
        assert "is written by another run" in told(capsys, "--output", str(copied), *TINY)
    assert "already holds a run" in told(capsys, "--output", str(copied), *TINY)


def test_a_rate_that_was_changed_since_holds_from_there_on(tmp_path: Path) -> None:
    """And a decay: next to nothing is learnt any more, where the state of the optimizer has the old ones."""
    run = tmp_path / "run"
    train(run, "--weight-decay", "0.1")
    shutil.rmtree(run / "checkpoints" / "step-5")
    file = run / "config.yaml"
    options = file.read_text().replace("weight_decay: 0.1", "weight_decay: 0.0")
    assert "weight_decay: 0.0" in options
    file.write_text(options + "lr: 1.0e-12\n")
    main(["train", "--resume", str(run)])
    before, after = (load_file(run / "checkpoints" / f"step-{step}" / "model.safetensors") for step in (4, 5))
    assert max(float((after[name] - before[name]).abs().max()) for name in before) < 1e-9
    state = torch.load(run / "checkpoints" / "step-5" / "trainer.pt", weights_only=True)
    assert {group["weight_decay"] for group in state["optimizer"]["param_groups"]} == {0.0}


def test_replay_that_was_asked_for_since_begins_with_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run)
    shutil.rmtree(run / "checkpoints" / "step-5")
    file = run / "config.yaml"
    file.write_text(file.read_text() + "replay: 6\n")
    main(["train", "--resume", str(run)])
    assert "replayed" in rows(run / "metrics.jsonl")[-1]


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted({*visual_tasks()} - {"VLM-VideoQA-v0"}))  # which has no samples of its own
def test_a_resumed_run_of_each_task_tells_what_changed(task: str, tmp_path: Path) -> None:
    """As a run does that was not cut off; what was measured before training is read from its folder."""
    run = tmp_path / "run"
    options = ["--env", task, *TINY, "--prompts-per-step", "1", "--group-size", "2", "--max-new-tokens", "48"]
    main(["train", "--steps", "1", "--output", str(run), *options])
    whole = json.loads((run / "evaluation.json").read_text())
    main(["train", "--resume", str(run), "--steps", "2"])
    resumed = json.loads((run / "evaluation.json").read_text())
    assert resumed["before"] == whole["before"]
    assert resumed["change"].keys() == whole["change"].keys()
