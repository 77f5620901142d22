from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, shared
from PIL import Image

from vlmenv.agents.engines.remote import RetryPolicy
from vlmenv.agents.remainders import exact_weights
from vlmenv.agents.vlm import find_model
from vlmenv.building import check_engine
from vlmenv.cli import main
from vlmenv.core.errors import ConfigError
from vlmenv.options.fields import replaced
from vlmenv.options.train import TrainConfig

pytestmark = pytest.mark.usefixtures("without_pictures")

TINY = ["--prompts-per-step", "2", "--group-size", "4", "--eval-limit", "4", "--device", "cpu"]


def fails(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What a command that fails prints: one message, no traceback."""
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code not in (0, None)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    return captured.err + captured.out


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.pictures
def test_train_leaves_a_whole_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    main(["train", "--steps", "2", "--checkpoint-every", "1", "--output", str(run), *TINY])
    out = capsys.readouterr().out
    assert re.search(r"step    1/2  reward [\d.]+  \(iou [\d.]+  format [\d.]+\)  length", out)
    assert "before" in out
    assert "after" in out
    metrics = rows(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2]
    assert all(isinstance(value, float | int) for row in metrics for value in row.values())
    completions = rows(run / "rollouts.jsonl")
    assert len(completions) == 2 * 8
    told = {"step", "id", "index", "prompt", "completion", "finish_reason", "reward", "rewards", "traits"}
    told |= {"prediction", "target", "advantage", "right"}
    assert completions[0].keys() == told
    assert completions[0]["rewards"].keys() == {"iou", "format"}
    for picture in ("curve.png", "samples.png"):
        with Image.open(run / picture) as image:
            assert min(image.size) > 200
    assert json.loads((run / "evaluation.json").read_text())["after"].keys() >= {"iou/mean", "accuracy@0.5"}
    assert list((run / "tensorboard").rglob("events*"))
    for step in (1, 2):
        assert (run / "checkpoints" / f"step-{step}" / "model.safetensors").is_file()
    assert "already holds a run" in fails(capsys, "train", "--steps", "1", "--output", str(run), *TINY)


def test_the_same_seed_gives_the_same_run_bit_for_bit(tmp_path: Path) -> None:
    """Also through config.yaml, which holds all that is needed to repeat a run."""
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    main(["train", "--steps", "3", "--seed", "4", "--beta", "0.02", "--output", str(first), *TINY])
    main(["train", "--config", str(first / "config.yaml"), "--output", str(again)])
    main(["train", "--config", str(first / "config.yaml"), "--output", str(other), "--seed", "5"])
    for name in ("rollouts.jsonl", "evaluation.json", "checkpoints/step-3/model.safetensors"):
        assert (first / name).read_bytes() == (again / name).read_bytes(), name
    assert timeless(first) == timeless(again) != timeless(other)
    options = yaml.safe_load((first / "config.yaml").read_text())
    assert (options["seed"], options["beta"], options["group_size"]) == (4, 0.02, 4)


def test_bf16_trains(tmp_path: Path) -> None:
    run = tmp_path / "run"
    main(["train", "--steps", "2", "--precision", "bf16", "--beta", "0.1", "--output", str(run), *TINY])
    metrics = rows(run / "metrics.jsonl")[-1]
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["policy/approx_kl"] < 0.01
    weights = exact_weights(run / "checkpoints" / "step-2")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_two_processes_leave_one_run_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vlmenv"]
    command = [*launch, "train", "--steps", "2", "--output", str(run), *TINY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step    1/2") == 1
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == [1, 2]
    assert len(rows(run / "rollouts.jsonl")) == 2 * 8  # of both processes
    assert (run / "checkpoints" / "step-2" / "model.safetensors").is_file()
    assert (run / "samples.png").is_file()


def timeless(run: Path) -> list[dict]:
    kept = rows(run / "metrics.jsonl")
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "memory/", "tokens_per_second"))} for row in kept
    ]


def test_eval_writes_and_shows_the_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["eval", "--eval-limit", "20", "--batch-size", "8", "--output", str(tmp_path), "--device", "cpu"])
    assert "accuracy@0.75" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics.keys() == {"iou/mean", "accuracy@0.5", "accuracy@0.75", "unparsable", "format"}
    answers = rows(tmp_path / "answers.jsonl")
    assert [answer["id"] for answer in answers] == [f"scene-eval-{i}" for i in range(20)]
    mean = sum(answer["measures"]["iou/mean"] for answer in answers) / 20
    assert metrics["iou/mean"]["value"] == pytest.approx(mean)
    assert metrics["iou/mean"]["low"] < mean < metrics["iou/mean"]["high"]


@pytest.mark.parametrize("model", ["builtin", "builtin-tasks"])
@pytest.mark.parametrize(
    "command",
    [
        ["eval", "--eval-limit", "1"],
        ["sample", "--eval-limit", "1", "--n", "2"],
        ["train", "--steps", "1", "--eval-limit", "0", "--prompts-per-step", "1", "--group-size", "2"],
    ],
    ids=lambda command: command[0],
)
def test_a_task_that_the_model_has_not_been_taught_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str], model: str
) -> None:
    options = ["--env", "VLM-Point-v0", "--model", model, "--max-new-tokens", "4", "--output", str(tmp_path / "out")]
    main([*command, *options])
    advice = "the built-in model has not been taught VLM-Point-v0; --model builtin-tasks has"
    assert (advice in " ".join(capsys.readouterr().out.split())) is (model == "builtin")


def test_sampled_evaluation_answers_each_question_several_times(tmp_path: Path) -> None:
    args = ["eval", "--eval-limit", "3", "--samples", "5", "--batch-size", "10", "--device", "cpu", "--output"]
    main([*args, str(tmp_path / "a")])
    main([*args, str(tmp_path / "b"), "--seed", "1"])
    a, b = (rows(tmp_path / name / "answers.jsonl") for name in "ab")
    assert [answer["index"] for answer in a] == [0] * 5 + [1] * 5 + [2] * 5
    assert [x["completion"] for x in a] != [x["completion"] for x in b]


def test_real_photos_can_be_measured_and_trained_on(tmp_path: Path) -> None:
    file = str(shared("data/rec/refcocos/samples.jsonl"))
    main(["eval", "--dataset", file, "--device", "cpu", "--output", str(tmp_path / "eval")])
    assert len(rows(tmp_path / "eval" / "answers.jsonl")) == 19
    main(["train", "--dataset", file, "--steps", "2", "--output", str(tmp_path / "run"), *TINY])
    assert len(rows(tmp_path / "run" / "metrics.jsonl")) == 2


def test_published_processors_train_on_real_photos(published_folder: Path, tmp_path: Path) -> None:
    """A random model learns nothing here, but all that a real checkpoint goes through is gone through."""
    file, run = str(shared("data/rec/refcocos/samples.jsonl")), tmp_path / "run"
    options = ["--model", str(published_folder), "--dataset", file, "--max-new-tokens", "6", "--output", str(run)]
    main(["train", "--steps", "2", *options, *TINY])
    metrics = rows(run / "metrics.jsonl")
    assert len(metrics) == 2
    assert metrics[1]["completion/truncated"] > 0
    words = "0 to 1000" if "qwen3" in str(published_folder) else "in pixels"
    assert all(words in row["prompt"] for row in rows(run / "rollouts.jsonl"))
    main(
        [
            "eval",
            "--model",
            str(run / "checkpoints" / "step-2"),
            "--eval-limit",
            "2",
            "--max-new-tokens",
            "6",
            "--device",
            "cpu",
        ]
    )


def test_envs_lists_the_environments(capsys: pytest.CaptureFixture[str]) -> None:
    main(["envs"])
    out = capsys.readouterr().out
    assert "VLM-REC-v0" in out
    assert "Referring expression comprehension" in out
    assert "VLM-OVD-v0" in out


def test_a_data_set_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every broken row is told, and with --decode every broken image."""
    good = {"image": "a.png", "problem": "Where?", "answer": "[1, 2, 3, 4]"}
    lines = [good, good | {"image": "b.png"}, good | {"answer": "there"}, good | {"image": "c.png"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    (tmp_path / "c.png").write_text("no image")
    for options, broken in (([], [2, 3]), (["--decode"], [2, 3, 4])):
        with pytest.raises(SystemExit):
            main(["data", "check", str(tmp_path / "rows.jsonl"), *options])
        out = capsys.readouterr().out
        places = re.findall(r"rows\.jsonl:(\d)", out)
        assert [int(place) for place in places] == broken
        assert ("64 x 48 (1)" in out) is bool(options)
    (tmp_path / "rows.jsonl").write_text(json.dumps(good))
    main(["data", "check", str(tmp_path / "rows.jsonl"), "--env", "VLM-REC-v0"])


def test_broken_rows_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "problem": "Where?", "answer": answer} for answer in ("[1, 2, 3, 4]", "there")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    main(["eval", "--dataset", str(tmp_path / "rows.json"), "--skip-broken", "--device", "cpu"])
    out = " ".join(capsys.readouterr().out.split())
    assert "1 of 2 rows are broken and left out, the first at" in out
    assert "1 samples" in out


def test_broken_rows_of_the_set_to_measure_on_are_told_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of the training data are told once, also where they are what is measured on."""
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    lines = [{"image": "a.png", "problem": "Where?", "answer": answer} for answer in ("[1, 2, 3, 4]", "there")]
    (tmp_path / "train.json").write_text(json.dumps(lines * 2))
    (tmp_path / "eval.json").write_text(json.dumps(lines))
    small = ["--steps", "1", "--max-new-tokens", "8", "--skip-broken", *TINY]
    for name, other in {"a": [], "b": ["--eval-dataset", str(tmp_path / "eval.json")]}.items():
        main(["train", "--dataset", str(tmp_path / "train.json"), *other, *small, "--output", str(tmp_path / name)])
        out = " ".join(capsys.readouterr().out.split())
        assert out.count("2 of 4 rows are broken and left out") == 1
        assert out.count("1 of 2 rows are broken and left out") == len(other) / 2


@pytest.mark.pictures
@pytest.mark.parametrize("name", ["VLM-Math-v0", "VLM-VQA-v0", "VLM-Caption-v0"])
def test_every_task_is_trained_and_measured(name: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    main(["train", "--env", name, "--steps", "1", "--output", str(run), *TINY])
    assert rows(run / "metrics.jsonl")[0].keys() >= {"reward/format"}
    metrics = json.loads((run / "evaluation.json").read_text())["after"]
    assert metrics.keys() >= {"accuracy", "unparsable", "format"}
    assert any(metric.startswith("accuracy/") for metric in metrics)
    assert (run / "samples.png").is_file()


def test_detection_is_trained_and_measured_by_the_same_commands(tmp_path: Path) -> None:
    file = str(shared("data/ovd/bccd/samples.jsonl"))
    main(
        [
            "eval",
            "--env",
            "VLM-OVD-v0",
            "--dataset",
            file,
            "--eval-limit",
            "2",
            "--device",
            "cpu",
            "--output",
            str(tmp_path),
        ]
    )
    assert json.loads((tmp_path / "metrics.json").read_text()).keys() >= {
        "image_ap/mean",
        "recall@0.5",
        "boxes/answered",
    }
    run = tmp_path / "run"
    main(["train", "--env", "VLM-OVD-v0", "--rewards", "map", "1", "--steps", "1", "--output", str(run), *TINY])
    assert rows(run / "metrics.jsonl")[0].keys() >= {"reward/map"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "--env", "VLM-Pose-v0"], "is named with the module that registers it, as in my_task:VLM-Pose-v0"),
        (["train", "--env", "json:VLM-Pose-v0"], "module 'json' registers no environment 'VLM-Pose-v0'"),
        (["train", "--env", "VLM-RCE-v0"], "unknown environment 'VLM-RCE-v0'. Did you mean 'VLM-REC-v0'?"),
        (["train", "--env", "VLM-REC"], "Did you mean 'VLM-REC-v0'?"),
        (["train", "--env", "VLM-Rec-v0"], "Did you mean 'VLM-REC-v0'?"),
        (["eval", "--env", "CartPole-v1"], "no visual task"),
        (["train", "--dataset", "none.jsonl"], "none.jsonl: no such file"),
        (["eval", "--dataset", str(ROOT / "README.md")], "not '.md'"),
        (["train", "--columns", "qestion", "query", "--dataset", "x.jsonl"], "Did you mean 'question'"),
        (["data", "check", "none.jsonl"], "none.jsonl: no such file"),
        (["data", "check"], "name the data set to check"),
        (["train", "--model", "./none"], "no such model folder"),
        (["train", "--group-size", "1"], "group_size must be at least 2"),
        (["train", "--max-images", "0"], "max_images must be at least 1"),
        (["train", "--max-images", "2"], "episodes of RECEnv are one step: leave max_images out"),
        (["train", "--steps", "0"], "steps must be at least 1"),
        (["train", "--rewards", "iuo", "1"], "Did you mean 'iou'"),
        (["train", "--stepz", "3"], "unknown option 'stepz'. Did you mean 'steps'?"),
        (["train", "--algo", "gropo"], "unknown algorithm 'gropo'. Did you mean 'grpo'?"),
        (["train", "--algo", "ppo", "--scale", "none"], "ppo has no option 'scale', which grpo"),
        (["train", "--algo", "rloo", "--epsilon-high", "1"], "rloo has no option 'epsilon_high'"),
        (["train", "--lora-alpha", "4"], "go with lora_rank"),
        (["train", "--lora-rank", "4", "--freeze-vision"], "leave out the options to freeze"),
        (["train", "--vision-lr", "0"], "vision_lr must be finite and above 0"),
        (["train", "--vision-lr", "1e-4", "--freeze-vision", "--freeze-projector", "--eval-limit", "0"], "is frozen"),
        (["train", "--precision", "fp16", "--device", "cpu"], "needs a CUDA GPU"),
        (["train", "--eval-every", "2", "--eval-limit", "0"], "eval_every needs samples"),
        (["train", "--algo", "sft", "--group-size", "2"], "group_size must be 1"),
        (["train", "--keep", "0"], "keep must be at least 1"),
        (["train", "--tracker", "tensorbord"], "unknown tracker 'tensorbord'. Did you mean 'tensorboard'?"),
        (["train", "--log-samples", "-1"], "log_samples must not be negative"),
        (["train", "--tracker", "none", "--log-samples", "5"], "log_samples is for a tracker"),
        (["trian"], "unknown command 'trian'. Did you mean 'train'?"),
        (["doctor", "--group-size", "0"], "group_size must be at least 1"),
        (["doctor", "--beta", "-1"], "beta must be finite and at least 0"),
        (["doctor", "--temperature", "0"], "training needs varied answers"),
        (["doctor", "--env", "VLM-RCE-v0", "--device", "cpu"], "1 of 22 checks failed: samples"),
        (["eval", "--eval-limit", "0"], "eval_limit must be at least 1"),
        (["eval", "--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        (["eval", "--temperature", "0", "--samples", "4"], "temperature must be above 0"),
        (["train", "--temperature", "0"], "temperature must be above 0"),
        (["train", "--seed", "-1"], "seed must be from 0"),
        (["train", "--temperature", "nan"], "temperature must be a number"),
        (["train", "--lr", "nan"], "lr must be finite and above 0"),
        (["train", "--rewards", "iou", "nan"], "weight of reward term 'iou' is nan"),
        (["train", "--model", "runs/first--old"], "no such model folder"),
        (["train", "--env", ".mod:Id"], "cannot be imported"),
        (["train", "--lr", "0"], "lr must be finite and above 0"),
        (["train", "--eval-limit", "-1"], "eval_limit must not be negative"),
        (["train", "--env", "nowhere:VLM-X-v0"], "environment nowhere:VLM-X-v0: there is no module 'nowhere'"),
        (["train", "--eval-dataset", "x"], "go with dataset"),
        (["train", "--config", "none.yaml"], "none.yaml"),
    ],
)
def test_wrong_input_gives_one_clear_message(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in " ".join(fails(capsys, *args).split())
    assert not list(tmp_path.iterdir())


def test_an_unknown_option_in_a_file_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("group_sise: 4\n")
    message = fails(capsys, "train", "--config", str(file))
    assert "unknown option 'group_sise'. Did you mean 'group_size'?" in " ".join(message.split())


def test_a_model_folder_without_processor(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(find_model("builtin") / name, tmp_path / name)
    assert "has no processor" in fails(capsys, "eval", "--model", str(tmp_path), "--eval-limit", "1")


def test_a_line_that_is_not_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("{oops\n")
    assert "rows.jsonl:1: the line is not JSON" in fails(capsys, "eval", "--dataset", str(file))


def test_an_engine_that_is_not_installed_is_told_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    for name in ("vlmenv.commands.train", "vlmenv.commands.suite"):
        monkeypatch.setattr(f"{name}.make_envs", lambda *_, **__: pytest.fail("data were read"))
    run = tmp_path / "run"
    for args in (["train", "--output", str(run)], ["eval"]):
        with pytest.raises(SystemExit):
            main([*args, "--engine", "vllm", "--device", "cpu"])
        assert 'pip install "vlmenv[vllm]"' in capsys.readouterr().err
    assert not run.exists()


def test_an_engine_that_cannot_be_had_like_this_is_refused_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmenv.building.require_vllm", lambda: None)
    with pytest.raises(ConfigError, match="there is one: launch a multiple"):
        check_engine(replaced(TrainConfig(), {"engine": "vllm", "tensor_parallel": 2}), torch.device("cpu"))
    with pytest.raises(ConfigError, match="there are 3: launch a multiple"):
        check_engine(replaced(TrainConfig(), {"engine": "vllm", "tensor_parallel": 2}), torch.device("cpu"), 3)
    with pytest.raises(ConfigError, match="share of a GPU's memory"):
        check_engine(replaced(TrainConfig(), {"engine": "vllm", "engine_memory": 0.5}), torch.device("cpu"))
    check_engine(replaced(TrainConfig(), {"engine": "vllm", "tensor_parallel": 2}), torch.device("cpu"), 4)
    check_engine(replaced(TrainConfig(), {"engine": "vllm"}), torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine-length", "512"], "go with engine vllm"),
        (["--engine-memory", "0.5"], "go with engine vllm"),
        (["--tensor-parallel", "2"], "tensor_parallel go with engine vllm"),
        (["--engine", "vllm", "--engine-memory", "1.5"], "share between 0 and 1"),
        (["--engine", "vllm", "--engine-length", "160"], "more than 160 tokens"),
        (["--engine", "vllm", "--temperature", "2.5"], "temperatures up to 2"),
        (["--engine", "vllm-server"], "needs servers"),
        (
            ["--algo", "sft", "--engine", "vllm", "--correction", "sequence"],
            "true answers: leave out correction",
        ),
        (["--server", "http://a:1"], "go with engine vllm-server"),
        (["--engine", "vllm", "--server-timeout", "3"], "go with engine vllm-server"),
        (["--engine", "vllm", "--weights-folder", "a"], "go with engine vllm-server"),
        (["--engine", "vllm", "--weight-transfer", "direct"], "go with engine vllm-server"),
        (
            [
                "--engine",
                "vllm-server",
                "--server",
                "http://a:1",
                "--weight-transfer",
                "direct",
                "--weights-folder",
                "a",
            ],
            "weights_folder goes with weight_transfer file",
        ),
        (["--engine", "vllm-server", "--server", "http://a:1", "--engine-length", "512"], "servers have their own"),
        (["--engine", "vllm-server", "--server", "http://a:1", "--engine-memory", "0.5"], "servers have their own"),
        (["--engine", "vllm-server", "--server", "http://a:1", "--temperature", "2.5"], "temperatures up to 2"),
        (["--engine", "vllm-server", "--server", "http://a:1", "--server-timeout", "0"], "above 0 seconds"),
        (["--engine", "vllm-server", "--server", "http://a:1", "http://a:1"], "named twice"),
        (["--engine", "vllm-server", "--server", "http://a:1/v1"], "give http://HOST:PORT"),
    ],
)
def test_options_of_engines_are_checked(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", *options])
    assert message in capsys.readouterr().err


def test_servers_are_named_in_either_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each by a `--server` of its own, several behind one, or in a file, which the command line overrides."""
    monkeypatch.setattr("vlmenv.building.RetryPolicy", lambda **_: RetryPolicy(attempts=1))
    urls = [f"http://127.0.0.1:{port}" for port in (1, 2, 3)]
    file = tmp_path / "options.yaml"
    file.write_text(yaml.safe_dump({"engine": "vllm-server", "server": urls[:2], "device": "cpu"}))
    named = ["eval", "--engine", "vllm-server", "--device", "cpu"]
    for args in (
        [*named, "--server", *urls[:2]],
        [*named, "--server", urls[0], f"--server={urls[1]}"],
        ["eval", "--config", str(file)],
    ):
        told = fails(capsys, *args)
        assert all((url in told) == (url in urls[:2]) for url in urls)
    told = fails(capsys, "eval", "--config", str(file), "--server", urls[2])
    assert urls[2] in told
    assert urls[0] not in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")
def test_cuda_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no CUDA GPU here" in fails(capsys, "train", "--device", "cuda")


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(Exception, match="no such file"):
        main(["eval", "--dataset", "none.jsonl", "--debug"])


def test_a_run_that_breaks_off_keeps_what_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last of eight images is cut off: the steps before it is met are on disk, and the message names it."""
    file, lines = tmp_path / "rows.jsonl", []
    turns = [{"from": "human", "value": "Where is it?"}, {"from": "gpt", "value": "[1, 2, 30, 40]"}]
    for i in range(8):
        Image.new("RGB", (64, 64), (i, i, i)).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"id": i, "image": f"{i}.png", "conversations": turns}))
    file.write_text("\n".join(lines))
    (tmp_path / "7.png").write_bytes((tmp_path / "7.png").read_bytes()[:-60])
    run = tmp_path / "run"
    options = ["--dataset", str(file), "--steps", "4", "--seed", "1", "--output", str(run), *TINY, "--eval-limit", "0"]
    message = fails(capsys, "train", *options)
    assert "rows.jsonl:8 (id 7): " in message
    assert "cannot be read as an image" in message
    done = rows(run / "metrics.jsonl")
    assert 0 < len(done) < 4
    assert len(rows(run / "rollouts.jsonl")) == 8 * len(done)
    assert (run / "checkpoints" / f"step-{len(done)}" / "model.safetensors").is_file()
