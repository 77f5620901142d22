"""Runs that something goes wrong with: what is told, what is kept, and how they go on once the cause is gone."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import faulty_task
import gymnasium
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from test_cli import TINY, fails, rows, timeless

from vlmenv.agents.vlm import VLMAgent
from vlmenv.algos import GRPO, GRPOConfig, StepResult, Trainer, TrainerConfig
from vlmenv.algos.batch import Rollouts
from vlmenv.cli import main
from vlmenv.core.errors import CheckpointError
from vlmenv.core.rollout import Rollout
from vlmenv.runs.checkpoints import save_checkpoint
from vlmenv.runs.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("without_pictures")

STEPS, ANSWERS = 5, 8
"""of a run, and in each of its steps"""
TRIED = 8 + 16
"""Answers that are scored before training: the task's own right ones, and the model's first."""


@pytest.fixture(autouse=True)
def untroubled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets each test choose what happens; whatever it did to the size of files is undone."""
    monkeypatch.setattr(faulty_task, "happens", lambda count: 0.0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of twelve rows, each with an image of its own."""
    folder: Path = tmp_path_factory.mktemp("data")
    turns = [{"from": "human", "value": "Where is it?"}, {"from": "gpt", "value": "[1, 2, 30, 40]"}]
    (folder / "images").mkdir()
    for i in range(12):
        Image.new("RGB", (64, 64), (i, i, i)).save(folder / "images" / f"{i}.png")
    lines = [json.dumps({"id": i, "image": f"images/{i}.png", "conversations": turns}) for i in range(12)]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"


def options(data: Path, run: Path) -> list[str]:
    given = ["train", "--env", "faulty_task:VLM-Faulty-v0", "--dataset", str(data), "--steps", str(STEPS)]
    return [*given, "--checkpoint-every", "2", "--output", str(run), *TINY, "--eval-limit", "0"]


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with which nothing went wrong."""
    run: Path = tmp_path_factory.mktemp("whole") / "run"
    main(options(data, run))
    return run


def limit(size: int) -> None:
    """Lets no file grow beyond a size, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def file_sizes(size: int) -> Callable[[Path], float]:
    def happens(data: Path) -> float:
        limit(size)
        return 0.0

    return happens


def missing_images(data: Path) -> float:
    (data.parent / "images").rename(data.parent / "elsewhere")
    return 0.0


def failing_term(data: Path) -> float:
    raise ZeroDivisionError("no such luck")


def term_without_number(data: Path) -> float:
    return None  # type: ignore[return-value]


def infinite_term(data: Path) -> float:
    return float("inf")


def mend(data: Path) -> None:
    limit(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    if (data.parent / "elsewhere").exists():
        (data.parent / "elsewhere").rename(data.parent / "images")


FAULTS = {
    "no room for the weights": (file_sizes(2**20), 2, ["step-4 cannot be written", "File too large"]),
    "no room for the optimiser's state": (file_sizes(8 * 2**20), 2, ["step-4 cannot be written", "File too large"]),
    "no room for anything": (file_sizes(100), 2, ["File too large", "metrics.jsonl", "after step 4 could not be"]),
    "missing images": (missing_images, 4, ["rows.jsonl:", "there is no image"]),
    "failing term": (failing_term, 3, ["'trouble' failed on sample", "ZeroDivisionError: no such luck"]),
    "term without a number": (term_without_number, 3, ["'trouble' failed on sample", "TypeError"]),
    "infinite term": (infinite_term, 3, ["'trouble' gave inf for sample"]),
}
"""What happens while the answers of step 4 are scored, the last step that can be gone on from, and what is told."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_goes_on_once_the_cause_is_gone(
    fault: str,
    data: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    happens, last, told = FAULTS[fault]
    run, due = tmp_path / "run", TRIED + 3 * ANSWERS + 5
    monkeypatch.setattr(faulty_task, "happens", lambda count: happens(data) if count == due else 0.0)
    try:
        printed = fails(capsys, *options(data, run))
    finally:
        mend(data)
    message = " ".join(printed.split())
    assert all(part in message for part in told), message
    assert sum(line.startswith("error:") for line in printed.splitlines()) == 1
    assert f"step-{last} holds the state after step {last}. Go on with: vlmenv train --resume {run}" in message
    kept = {path.name for path in (run / "checkpoints").iterdir()}
    assert kept == {"step-2", f"step-{last}"}
    monkeypatch.setattr(faulty_task, "happens", lambda count: 0.0)
    main(["train", "--resume", str(run)])
    assert timeless(run) == timeless(whole)
    assert rows(run / "rollouts.jsonl") == rows(whole / "rollouts.jsonl")
    weights = "checkpoints/step-5/model.safetensors"
    assert (run / weights).read_bytes() == (whole / weights).read_bytes()


def test_a_first_checkpoint_that_cannot_be_written(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(faulty_task, "happens", lambda count: file_sizes(2**20)(data))
    message = " ".join(fails(capsys, *options(data, tmp_path / "run")).split())
    assert "step-2 cannot be written" in message
    assert "ended early, without a checkpoint. Start over with" in message
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    assert len(rows(tmp_path / "run" / "metrics.jsonl")) == 2


def test_what_cannot_be_measured_loses_no_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The held-out images go while step 2 is on its way, after which they are to be looked at."""
    other, run = tmp_path / "held-out", tmp_path / "run"
    shutil.copytree(data.parent, other)

    def happens(count: int) -> float:
        if count == TRIED + ANSWERS + 1:
            shutil.rmtree(other / "images")
        return 0.0

    monkeypatch.setattr(faulty_task, "happens", happens)
    held_out = ["--eval-dataset", str(other / "rows.jsonl"), "--eval-limit", "2", "--eval-every", "2"]
    message = " ".join(fails(capsys, *options(data, run), *held_out).split())
    assert "there is no image" in message
    assert "step-2 holds the state after step 2" in message
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == [1, 2]


def test_what_cannot_be_learnt_from_is_kept(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rewards from 0 to 3e38, without any scaling, give a gradient that float32 cannot hold."""
    run, due = tmp_path / "run", TRIED + 2 * ANSWERS
    monkeypatch.setattr(faulty_task, "happens", lambda count: 3e38 * (count % 2) * (count > due))
    message = " ".join(fails(capsys, *options(data, run), "--algo", "dr_grpo", "--max-skipped", "1").split())
    folder = run / "nonfinite" / "step-4"
    assert str(folder) in message
    assert f"go on from {run / 'checkpoints' / 'step-3'} with: vlmenv train --resume {run}" in message
    metrics = rows(run / "metrics.jsonl")
    assert [row["policy/skipped"] for row in metrics] == [0, 0, 1]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["step"] == 4
    assert summary["weights"] == []
    assert (
        "model.lm_head.weight" in summary["gradients"]
        or "model.model.language_model.embed_tokens.weight" in (summary["gradients"])
    )
    kept = rows(folder / "completions.jsonl")
    assert len(kept) == ANSWERS
    for row in kept:
        (image,) = row["images"]
        with Image.open(folder / image) as picture:
            assert picture.getpixel((0, 0)) == (row["index"],) * 3
        assert len(row["token_ids"]) == len(row["logprobs"]) == len(row["old_logprobs"]) == len(row["mask"])
        assert np.allclose(row["logprobs"], row["old_logprobs"], atol=1e-5)
    assert {row["rewards"]["trouble"] for row in kept} == {0, 3e38}
    assert min(abs(row["advantages"][0]) for row in kept) > 1e38
    monkeypatch.setattr(faulty_task, "happens", lambda count: 0.0)
    main(["train", "--resume", str(run)])
    metrics = rows(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5]
    assert metrics[-1]["policy/skipped"] == 0


def test_weights_that_have_run_away_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A learning rate at the end of float32 makes them so large in the first step that nothing can be sampled."""
    run, options = tmp_path / "run", ["--lr", "3e37", "--warmup-steps", "0", "--steps", "3", "--eval-limit", "0"]
    message = " ".join(fails(capsys, "train", *TINY, *options, "--output", str(run)).split())
    assert "error: the model's logits are not finite" in message
    assert len(rows(run / "metrics.jsonl")) == 1


def test_weights_that_are_not_finite_are_not_saved(builtin: VLMAgent, tmp_path: Path) -> None:
    envs = gymnasium.make_vec("VLM-REC-v0", num_envs=8, group_size=4)
    trainer = Trainer(builtin, envs, GRPO(GRPOConfig(group_size=4)), TrainerConfig(steps=1), Accelerator(cpu=True))
    list(trainer.train(seed=0))
    weight = builtin.policy.get_parameter("model.model.visual.patch_embed.proj.bias")
    good, weight.data[0] = weight.data[0].item(), torch.nan
    run = RunFolder(tmp_path)
    with pytest.raises(CheckpointError, match=r"step-1 is not written, because .*visual\.patch_embed"):
        save_checkpoint(trainer, run)
    assert not list(tmp_path.iterdir())
    weight.data[0] = good
    save_checkpoint(trainer, run)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-1"]


def test_lines_of_a_step_are_written_together_or_not_at_all(tmp_path: Path) -> None:
    made = Rollouts(Rollout([], np.zeros(0, np.int64), [], 1.0), torch.zeros(1), [{"id": "a"}])
    run = RunFolder(tmp_path)
    run.write_step(StepResult(1, {"loss": 1.0}, made))
    run.write_step(StepResult(1, {"loss": 1.0}, made))
    (tmp_path / "metrics.jsonl").rename(tmp_path / "kept")
    (tmp_path / "metrics.jsonl").mkdir()  # which cannot be written to
    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        run.write_step(StepResult(2, {"loss": 2.0}, made))
    (tmp_path / "metrics.jsonl").rmdir()
    (tmp_path / "kept").rename(tmp_path / "metrics.jsonl")
    run.write_step(StepResult(2, {"loss": 3.0}, made))
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 3.0}]
    assert [row["step"] for row in rows(tmp_path / "rollouts.jsonl")] == [1, 2]


def test_an_error_in_one_process_ends_all(data: Path, tmp_path: Path) -> None:
    """The last image is cut off, and either process may be the one to show it: none waits, and the state is kept."""
    folder, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(data.parent, folder)
    image = folder / "images" / "7.png"
    image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vlmenv"]
    command = [*launch, "train", "--dataset", str(folder / "rows.jsonl"), "--steps", "9", "--output", str(run), *TINY]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--eval-limit", "0"], capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode != 0
    broken = "rows.jsonl:8"
    errors = [line for line in done.stderr.splitlines() if line.startswith("error in process ")]
    assert len(errors) == 2
    assert all(broken in line for line in errors), errors
    assert sum(": rank " in line for line in errors) == 1
    taken = len(rows(run / "metrics.jsonl"))
    assert 0 < taken < 9
    assert {path.name for path in (run / "checkpoints" / f"step-{taken}").glob("*.pt")} == {
        "trainer.pt",
        "process-0.pt",
        "process-1.pt",
    }
