"""What a run records, and that its record repeats it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import yaml
from PIL import Image

from vlmenv.agents.checkpoints import find_model
from vlmenv.algos import ALGORITHMS, GRPO, GRPOConfig, Registered, TrainerConfig
from vlmenv.cli import main
from vlmenv.core.sampling import Sampling
from vlmenv.envs.rec import RECEnv

pytestmark = pytest.mark.usefixtures("without_pictures")

SMALL = ["--steps", "2", "--prompts-per-step", "2", "--group-size", "2", "--eval-limit", "2", "--device", "cpu"]


def rollouts(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]


def test_resolved_options_repeat_a_run_after_defaults_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defaults of the task, the trainer, the sampling and the algorithm; config.yaml says what was asked alone."""
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    main(["train", *SMALL, "--output", str(first)])
    monkeypatch.setattr(RECEnv, "default_rewards", {"iou": 0.5, "format": 2.0})
    monkeypatch.setattr(RECEnv, "prompt_template", "{question} {answer} in {coordinates}, or {none}")
    monkeypatch.setitem(ALGORITHMS, "grpo", Registered(GRPO, GRPOConfig(epsilon=0.4, scale="none")))
    monkeypatch.setattr(TrainerConfig, "lr", 1e-2)
    monkeypatch.setattr(TrainerConfig, "__init__", _init_with(TrainerConfig, lr=1e-2))
    monkeypatch.setattr(Sampling, "__init__", _init_with(Sampling, temperature=0.5))
    main(["train", "--config", str(first / "resolved.yaml"), "--output", str(again)])
    main(["train", "--config", str(first / "config.yaml"), "--output", str(other)])
    for name in ("rollouts.jsonl", "evaluation.json", "checkpoints/step-2/model.safetensors"):
        assert (first / name).read_bytes() == (again / name).read_bytes(), name
    assert rollouts(first)[0]["prompt"] != rollouts(other)[0]["prompt"]
    assert rollouts(first)[0]["reward"] != rollouts(other)[0]["reward"]


def _init_with(kind: type, **defaults: float):
    """An `__init__` with other defaults, as a later version may have."""
    init = kind.__init__

    def changed(self, **given):  # noqa: ANN001
        init(self, **(defaults | given))

    return changed


def test_the_record_tells_of_files_versions_and_the_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "rows.jsonl"
    row = {"id": 1, "image": "a.png", "problem": "the red circle", "solution": "[1, 2, 30, 40]"}
    data.write_text("".join(json.dumps(row | {"id": i}) + "\n" for i in range(2)))
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    main(["train", "--dataset", str(data), *SMALL, "--rewards", "iou", "1", "--output", str(tmp_path / "run")])
    resolved = yaml.safe_load((tmp_path / "run" / "resolved.yaml").read_text())
    record = resolved["record"]
    expected = {"bytes": data.stat().st_size, "sha256": hashlib.sha256(data.read_bytes()).hexdigest()}
    assert record["data"] == {str(data): expected}
    assert record["versions"].keys() >= {"vlmenv", "python", "torch", "transformers", "gymnasium", "peft"}
    assert record["ranks"] == 1
    on, _, of = record["fast_paths"]["lean layers"].partition(" of ")
    assert on == of
    assert record["fast_paths"]["shared prompts"] == "yes"
    assert "fast paths: shared prompts yes, lean layers" in capsys.readouterr().out
    assert record["device"].startswith("cpu")
    assert (resolved["rewards"], resolved["answer_format"], resolved["coordinates"]) == (
        {"iou": 1.0},
        "tags",
        "original",
    )
    assert "{question}" in resolved["prompt_template"]
    asked = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    names = {"env", "model", "algo", "dataset", "steps", "prompts_per_step", "group_size", "eval_limit", "device"}
    assert asked.keys() == names | {"rewards", "record"}
    assert asked["record"] == {"run": record["run"]}


def test_the_record_tells_the_commits_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the hub's cache on disk, with a branch that is not the main one."""
    commit, repository = "0123456789" * 4, tmp_path / "hub" / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "tuned").write_text(commit)
    shutil.copytree(find_model("builtin"), repository / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    rows = datasets.Dataset.from_list([{"image": "a.png", "problem": "the disc", "solution": [1, 2, 30, 40]}] * 2)
    rows.info.download_checksums = {f"hf://datasets/some/rows@{commit[::-1]}/data/{i}.parquet": None for i in range(2)}
    known = {("some/rows", "old"): rows, ("some/rows", commit[::-1]): rows}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: known[name, options["revision"]])
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    run = tmp_path / "run"
    where = ["--dataset", "some/rows@old", "--image-root", str(tmp_path), "--output", str(run)]
    main(["train", *SMALL, "--eval-limit", "0", "--model", "some/model@tuned", *where])
    resolved = yaml.safe_load((run / "resolved.yaml").read_text())
    assert resolved["model"] == f"some/model@{commit}"
    assert resolved["dataset"] == [f"some/rows@{commit[::-1]}"]
    assert resolved["record"]["model"]["commit"] == commit
    assert resolved["record"]["data"] == {"some/rows@old": {"commit": commit[::-1]}}
    (repository / "refs" / "tuned").write_text("f" * 40)  # the branch moves on
    del known["some/rows", "old"]
    main(["train", "--config", str(run / "resolved.yaml"), "--output", str(tmp_path / "again")])
    assert rollouts(run) == rollouts(tmp_path / "again")


def test_a_dry_run_prints_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["train", "--algo", "gspo", "--dry-run", "--output", "run", *SMALL])
    out = capsys.readouterr().out
    for told in ("epsilon: 0.0003", "prompt_template:", "trains on built-in samples, 2 steps of 2 prompts", "run"):
        assert told in out
    assert not list(tmp_path.iterdir())


def test_a_runs_folder_is_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", *SMALL, "--checkpoint-every", "1", "--output", str(tmp_path / "run")])
    capsys.readouterr()
    options = ["--eval-limit", "2", "--device", "cpu", "--output", str(tmp_path / "eval")]
    main(["eval", "--model", str(tmp_path / "run"), *options])
    out = " ".join(capsys.readouterr().out.split())
    assert "checkpoints/step-2, the newest checkpoint (step 2) of" in out


def test_a_run_is_prolonged(tmp_path: Path) -> None:
    main(["train", *SMALL, "--eval-limit", "0", "--output", str(tmp_path / "run")])
    main(["train", "--resume", str(tmp_path / "run"), "--steps", "3"])
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
