"""Runs that are cut off and go on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlmenv.cli import main
from vlmenv.runs.checkpoints import prune
from vlmenv.runs.run_folder import RunFolder

TINY = ["--prompts-per-step", "2", "--group-size", "4", "--eval-limit", "4", "--device", "cpu"]
OPTIONS = {
    "all weights": ["--algo", "grpo", "--mu", "2", "--minibatches", "2", "--beta", "0.01"],
    "adapters": ["--lora-rank", "4", "--lora-dropout", "0.1", "--lora-vision", "--beta", "0.01"],
    "critic": ["--algo", "ppo", "--freeze-projector", "--vision-lr", "1e-4"],
    "replays": ["--algo", "grpo", "--replay", "6", "--rewards", "iou@0.5", "1", "--beta", "0.01"],
    "curriculum": ["--revisit", "0.2", "--rewards", "iou@0.5", "1"],
    "resampling": ["--algo", "dapo", "--most-rounds", "3", "--gradient-checkpointing"],
    "imitation": ["--algo", "sft", "--group-size", "1"],
}

WRITTEN = {
    "adapters": "model.safetensors adapter/adapter_model.safetensors",
    "critic": "model.safetensors value_head/value_head.safetensors",
}
"""Files that some of these leave in a checkpoint."""


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def timeless(run: Path) -> list[dict]:
    kept = rows(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith("time/") and k != "tokens_per_second"} for row in kept]


def train(run: Path, *options: str) -> None:
    main(["train", "--steps", "5", "--checkpoint-every", "2", "--output", str(run), *TINY, *options])


@pytest.mark.parametrize("sort", OPTIONS)
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
    for name in ("evaluation.json", "curve.png", "samples.png"):
        (cut / name).unlink()
    lines = (cut / "metrics.jsonl").read_text().splitlines()
    (cut / "metrics.jsonl").write_text("\n".join(lines[:3]) + "\n" + lines[3][:40])
    main(["train", "--resume", str(cut)])
    assert timeless(cut) == timeless(whole)
    assert rows(cut / "rollouts.jsonl") == rows(whole / "rollouts.jsonl")
    for name in ("model.safetensors", "value_head/value_head.safetensors", "adapter/adapter_model.safetensors"):
        ours, theirs = (run / "checkpoints" / "step-5" / name for run in (cut, whole))
        assert ours.exists() == theirs.exists() == (name in WRITTEN.get(sort, "model.safetensors"))
        if ours.exists():
            a, b = load_file(ours), load_file(theirs)
            assert all(torch.equal(a[key], b[key]) for key in b)
    assert json.loads((cut / "evaluation.json").read_text()) == json.loads((whole / "evaluation.json").read_text())
    assert (cut / "samples.png").is_file()


@pytest.mark.parametrize("missing", ["nothing", "before/metrics.json", "before", "metrics.jsonl"])
def test_a_run_without_a_checkpoint_starts_over(missing: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Killed while it wrote its first checkpoint, or when it had done even less."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = ["--steps", "2", *TINY, *OPTIONS["adapters"]]
    main(["train", "--output", str(whole), *options])
    shutil.copytree(whole, cut)
    (cut / "checkpoints" / "step-2").rename(cut / "checkpoints" / ".step-2")
    for name in ("evaluation.json", "curve.png", "samples.png"):
        (cut / name).unlink()
    subprocess.run(["rm", "-rf", str(cut / missing)], check=True)
    main(["train", "--resume", str(cut)])
    assert "no checkpoint yet: starting over" in capsys.readouterr().out
    assert timeless(cut) == timeless(whole)
    assert rows(cut / "rollouts.jsonl") == rows(whole / "rollouts.jsonl")
    assert [folder.name for folder in (cut / "checkpoints").iterdir()] == ["step-2"]
    ours, theirs = (load_file(run / "checkpoints/step-2/adapter/adapter_model.safetensors") for run in (cut, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert (cut / "evaluation.json").read_text() == (whole / "evaluation.json").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped_can_go_on(number: signal.Signals, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "vlmenv", "train", "--steps", "400", "--checkpoint-every", "3"]
    command += ["--output", str(run), *TINY]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "step-3" / "trainer.pt").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    saved = max(int(folder.name.removeprefix("step-")) for folder in (run / "checkpoints").glob("step-*"))
    if number != signal.SIGKILL:
        assert f"vlmenv train --resume {run}" in out
        assert saved == rows(run / "metrics.jsonl")[-1]["step"]
    config = (run / "config.yaml").read_text().replace("steps: 400", f"steps: {saved + 1}")
    (run / "config.yaml").write_text(config)
    main(["train", "--resume", str(run)])
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == list(range(1, saved + 2))


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
    assert (run / "best" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--resume", "nowhere"], "nowhere is no folder of a run"),
        (["--resume", "run", "--steps", "9"], "give --resume RUN_FOLDER alone"),
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


def test_a_broken_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    main(["train", "--steps", "1", "--output", str(run), *TINY])
    (run / "checkpoints" / "step-1" / "trainer.pt").write_bytes(b"PK")
    with pytest.raises(SystemExit):
        main(["train", "--resume", str(run)])
    assert "step-1: the checkpoint cannot be read" in " ".join(capsys.readouterr().err.split())


def test_a_run_is_resumed_by_processes_of_its_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    main(["train", "--steps", "1", "--output", str(run), *TINY])
    file = run / "checkpoints" / "step-1" / "trainer.pt"
    torch.save(torch.load(file) | {"processes": "FSDP2"}, file)
    with pytest.raises(SystemExit):
        main(["train", "--resume", str(run)])
    assert "saved with FSDP2, not with whole copies" in " ".join(capsys.readouterr().err.split())


def test_a_rate_that_was_changed_since_holds_from_there_on(tmp_path: Path) -> None:
    """And a decay: next to nothing is learnt any more, where the state of the optimizer has the old ones."""
    run = tmp_path / "run"
    train(run, "--weight-decay", "0.1")
    shutil.rmtree(run / "checkpoints" / "step-5")
    file = run / "config.yaml"
    options = file.read_text().replace("lr: 0.0003\n", "lr: 1.0e-12\n")
    assert "lr: 1.0e-12" in options
    file.write_text(options.replace("weight_decay: 0.1", "weight_decay: 0.0"))
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
    assert "replay: 0" in file.read_text()
    file.write_text(file.read_text().replace("replay: 0", "replay: 6"))
    main(["train", "--resume", str(run)])
    assert "replayed" in rows(run / "metrics.jsonl")[-1]
