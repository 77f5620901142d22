"""`vlmenv train` and `vlmenv eval` with the real vLLM."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from servers import Served, free_port, serve

from vlmenv.agents.vlm import VLMAgent
from vlmenv.cli import main

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("without_pictures")]
VLLM = ["--engine", "vllm", "--engine-length", "512"]
LENGTH = ["--engine-length", "512"]
TINY = ["--prompts-per-step", "2", "--group-size", "4", "--eval-limit", "4", "--device", "cpu"]


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def timeless(run: Path) -> list[dict[str, Any]]:
    kept = rows(run / "metrics.jsonl")
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "memory/", "tokens_per_second"))} for row in kept
    ]


def command(*args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "vlmenv", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def until_there(path: Path, process: subprocess.Popen[str]) -> None:
    """Waits for what a process is to write."""
    deadline = time.monotonic() + 240
    while not path.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


@pytest.mark.parametrize("how", ["all weights", "adapters"])
def test_a_resumed_run_goes_on_as_if_it_had_not_been_cut_off(how: str, tmp_path: Path) -> None:
    """Adapters are trained in bfloat16, with an engine of that precision."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = ["--steps", "3", "--checkpoint-every", "2", *VLLM, *TINY]
    if how == "adapters":
        pytest.importorskip("peft")
        options += ["--lora-rank", "4", "--precision", "bf16", "--eval-every", "2"]
    main(["train", *options, "--output", str(whole)])
    lines = rows(whole / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["time/sync"] > 0 for line in lines)
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "step-3")
    (cut / "evaluation.json").unlink()
    main(["train", "--resume", str(cut)])
    assert timeless(cut) == timeless(whole)
    assert json.loads((cut / "evaluation.json").read_text()) == json.loads((whole / "evaluation.json").read_text())


def test_the_engine_sees_images_within_the_same_limits(tmp_path: Path) -> None:
    """With a limit prompts are shorter, and the engine's log-probabilities are still those of the trainer."""
    observations, _ = gymnasium.make_vec("VLM-REC-v0", num_envs=1).reset(seed=0)
    run = tmp_path / "run"
    main(["train", "--steps", "1", *VLLM, *TINY, "--eval-limit", "0", "--max-pixels", "3136", "--output", str(run)])
    (line,) = rows(run / "metrics.jsonl")
    assert abs(line["policy/sampler_kl"]) < 1e-6
    models = ("builtin", run / "checkpoints" / "step-1")
    (whole,), (limited,) = (VLMAgent.from_pretrained(one, device="cpu").encode(observations)[0] for one in models)
    assert len(limited.input_ids) < len(whole.input_ids)


def test_vllm_measures_in_the_precision_that_is_asked_for(tmp_path: Path) -> None:
    """Greedily, in float32 the same answers as without it; in bfloat16 nearly the same figures, and other answers."""
    found = {}
    for precision in ("fp32", "bf16"):
        for engine in ([], VLLM):
            folder = tmp_path / f"{precision} {len(engine)}"
            options = ["--eval-limit", "64", "--precision", precision, "--device", "cpu", "--output", str(folder)]
            main(["eval", *options, *engine])
            figure = json.loads((folder / "metrics.json").read_text())["iou/mean"]["value"]
            found[precision, bool(engine)] = figure, rows(folder / "answers.jsonl")
    full, figures = found["fp32", True], [figure for figure, _ in found.values()]
    assert full == found["fp32", False]
    answers = [[one["completion"] for one in answered] for _, answered in (full, found["bf16", True])]
    assert answers[0] != answers[1]
    assert max(figures) - min(figures) < 0.05


def test_what_was_learnt_is_what_is_measured_and_saved(tmp_path: Path) -> None:
    """After training the engine answers as the saved model does."""
    run = tmp_path / "run"
    main(["train", "--steps", "2", "--lr", "3e-3", "--warmup-steps", "0", "--output", str(run), *VLLM, *TINY])
    after = json.loads((run / "evaluation.json").read_text())["after"]
    model = str(run / "checkpoints" / "step-2")
    main(["eval", "--model", model, "--eval-limit", "4", "--device", "cpu", "--output", str(tmp_path / "eval")])
    assert json.loads((tmp_path / "eval" / "metrics.json").read_text()) == after


ZOOM = ["--env", "VLM-Zoom-v0", "--max-new-tokens", "60", "--device", "cpu"]


@pytest.fixture(scope="module")
def asking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that asks for crops, as the built-in one does not."""
    run: Path = tmp_path_factory.mktemp("asking") / "run"
    how = ["--algo", "sft", "--steps", "60", "--lr", "3e-3", "--warmup-steps", "0", "--prompts-per-step", "8"]
    main(["train", *ZOOM, *how, "--eval-limit", "0", "--output", str(run)])
    return run


def assert_episodes_are_learnt_from(asking: Path, folder: Path, *engine: str) -> None:
    """What is sampled has the log-probabilities of the trainer's model and of the saved one."""
    run, how = folder / "run", ["--steps", "2", "--lr", "3e-3", "--warmup-steps", "0", *engine, *TINY]
    main(["train", "--model", str(asking), *ZOOM, *how, "--output", str(run)])
    lines = rows(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["policy/sampler_kl"] < 1e-6 for line in lines)
    assert any(line["reward/crops"] > 0 for line in lines)
    after = json.loads((run / "evaluation.json").read_text())["after"]
    model = str(run / "checkpoints" / "step-2")
    main(["eval", "--model", model, *ZOOM, "--eval-limit", "4", "--output", str(folder / "eval")])
    assert json.loads((folder / "eval" / "metrics.json").read_text()) == after


def test_episodes_of_several_turns_are_learnt_from(asking: Path, tmp_path: Path) -> None:
    assert_episodes_are_learnt_from(asking, tmp_path, "--engine", "vllm", "--engine-length", "1024")


def assert_videos_are_learnt_from(folder: Path, *engine: str) -> None:
    """What is sampled has the log-probabilities of the trainer's model, and the saved one answers alike."""
    run, videos = folder / "run", ["--env", "VLM-VideoQA-v0", "--video-frames", "5"]
    main(
        ["train", *videos, "--steps", "2", "--lr", "3e-3", "--warmup-steps", "0", *engine, *TINY, "--output", str(run)]
    )
    lines = rows(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["policy/sampler_kl"] < 1e-6 for line in lines)
    after = json.loads((run / "evaluation.json").read_text())["after"]
    how = ["--model", str(run / "checkpoints" / "step-2"), *videos, "--eval-limit", "4", "--device", "cpu"]
    for name, asked in (("model", ()), ("engine", engine)):
        main(["eval", *how, *asked, "--output", str(folder / name)])
        assert json.loads((folder / name / "metrics.json").read_text()) == after


def test_videos_are_learnt_from(tmp_path: Path) -> None:
    assert_videos_are_learnt_from(tmp_path, *VLLM)


def test_a_run_ends_cleanly(tmp_path: Path) -> None:
    process = command("train", "--steps", 1, "--output", tmp_path / "run", *VLLM, *TINY)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "model, metrics and pictures are in" in out
    assert not [line for line in err.splitlines() if "Error" in line or "Traceback" in line or "destroy" in line]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_after_its_step(number: signal.Signals, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = command("train", "--steps", 400, "--output", run, *VLLM, *TINY)
    until_there(run / "metrics.jsonl", process)
    process.send_signal(number)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 128 + number, err
    assert f"vlmenv train --resume {run}" in out
    assert "Traceback" not in err
    assert (run / "checkpoints" / f"step-{rows(run / 'metrics.jsonl')[-1]['step']}" / "model.safetensors").is_file()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serve("builtin", *LENGTH) as served:
        yield served


def on(*servers: Served) -> list[str]:
    return ["--engine", "vllm-server", "--server", *[server.url for server in servers]]


def test_a_server_measures_and_samples_as_vllm_in_process_does(served: Served, tmp_path: Path) -> None:
    """The weights are its folder's, whatever it has been given before."""
    with_weights = ["--steps", "1", "--lr", "3e-3", "--warmup-steps", "0", "--output", str(tmp_path / "train")]
    main(["train", *with_weights, *on(served), *TINY])
    for name, engine in (("vllm", VLLM), ("server", on(served))):
        folder = str(tmp_path / name)
        main(["eval", "--eval-limit", "8", "--samples", "4", "--device", "cpu", "--output", folder, *engine])
    assert rows(tmp_path / "vllm" / "answers.jsonl") == rows(tmp_path / "server" / "answers.jsonl")


def test_what_was_learnt_by_a_server_is_what_is_measured_and_saved(served: Served, tmp_path: Path) -> None:
    run = tmp_path / "run"
    main(["train", "--steps", "2", "--lr", "3e-3", "--warmup-steps", "0", "--output", str(run), *on(served), *TINY])
    assert all(line["time/sync"] > 0 for line in rows(run / "metrics.jsonl"))
    after = json.loads((run / "evaluation.json").read_text())["after"]
    model = str(run / "checkpoints" / "step-2")
    main(["eval", "--model", model, "--eval-limit", "4", "--device", "cpu", "--output", str(tmp_path / "eval")])
    assert json.loads((tmp_path / "eval" / "metrics.json").read_text()) == after


def test_episodes_of_several_turns_are_learnt_from_by_a_server(asking: Path, tmp_path: Path) -> None:
    with serve("builtin", "--engine-length", "1024") as served:
        assert_episodes_are_learnt_from(asking, tmp_path, *on(served))


def test_videos_are_learnt_from_by_a_server(served: Served, tmp_path: Path) -> None:
    assert_videos_are_learnt_from(tmp_path, *on(served))


def test_a_server_that_takes_fewer_images_than_episodes_have_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve("builtin", *LENGTH, "--engine-images", "2") as served, pytest.raises(SystemExit):
        main(["train", *ZOOM, *on(served), *TINY, "--output", str(tmp_path / "run")])
    assert "episodes have up to 8 images, and the engine takes 2" in " ".join(capsys.readouterr().err.split())


def test_a_run_without_servers_left_ends_with_a_checkpoint_and_goes_on_with_a_new_one(tmp_path: Path) -> None:
    run, port = tmp_path / "run", free_port()
    options = ["--steps", "100", "--checkpoint-every", "1", "--keep", "2", "--eval-limit", "0", "--output", run]
    with serve("builtin", *LENGTH, port=port) as first:
        process = command("train", *options, *on(first), *TINY[:4], "--device", "cpu")
        until_there(run / "checkpoints" / "step-2", process)
        first.send(signal.SIGKILL)
        out, err = process.communicate(timeout=240)
    assert process.returncode == 1
    assert f"no server is left. {first.url}: " in err
    assert "Traceback" not in err
    assert f"vlmenv train --resume {run}" in out
    done = rows(run / "metrics.jsonl")[-1]["step"]
    with serve("builtin", *LENGTH, port=port):
        main(["train", "--resume", str(run), "--steps", str(done + 2)])
    assert [line["step"] for line in rows(run / "metrics.jsonl")] == [*range(1, done + 3)]
    assert done >= 2
    assert (run / "checkpoints" / f"step-{done + 2}" / "model.safetensors").is_file()
