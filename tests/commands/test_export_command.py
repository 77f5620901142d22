"""`vlmenv export`: what is uploaded."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from vlmenv.agents.vlm import VLMAgent, find_model
from vlmenv.cli import main

sys.path.append(str(ROOT / "tests" / "agents"))
from small_models import invent

pytestmark = pytest.mark.usefixtures("without_pictures")

TINY = ["--prompts-per-step", "2", "--group-size", "4", "--eval-limit", "4", "--device", "cpu", "--steps", "2"]


def fails(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit):
        main(["export", *args])
    return " ".join(capsys.readouterr().err.split())


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in the hub's cache, with a card and a licence."""
    folder: Path = tmp_path_factory.mktemp("hub") / "models--some--model" / "snapshots" / "abc"
    shutil.copytree(find_model("builtin"), folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Some model\n")
    (folder / "LICENSE").write_text("Apache License")
    return folder


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of all weights that measured on its way, and one of adapters that goes on from its best model."""
    root = tmp_path_factory.mktemp("runs")
    full, lora = root / "full", root / "lora"
    measuring = ["--eval-every", "1", "--checkpoint-every", "1"]
    main(["train", "--model", str(base), "--output", str(full), *TINY, *measuring, "--temperature", "0.7"])
    main(
        [
            "train",
            "--model",
            str(full),
            "--output",
            str(lora),
            *TINY,
            "--lora-rank",
            "2",
            "--system-prompt",
            "Be brief.",
        ]
    )
    return {"full": full, "lora": lora}


@pytest.mark.slow
def test_a_run_of_all_weights(runs: dict[str, Path], base: Path, tmp_path: Path) -> None:
    target, run = tmp_path / "out", runs["full"]
    main(["export", str(run), str(target), "--step", "2", "--dtype", "bfloat16"])
    trained = VLMAgent.from_pretrained(run / "checkpoints" / "step-2")._published_weights()
    stored = load_file(target / "model.safetensors")
    assert stored.keys() == trained.keys()
    for name, tensor in trained.items():
        assert torch.equal(stored[name], tensor.bfloat16()), name
    kept = {"LICENSE", "README.md", "LICENSE_NOTE.md", "generation_config.base.json"}
    assert {file.name for file in target.iterdir()} == {file.name for file in base.iterdir()} | kept
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((target / "generation_config.json").read_text())["temperature"] == 0.7
    AutoModelForImageTextToText.from_pretrained(target)
    assert (target / "LICENSE").read_text() == "Apache License"
    card, text = ModelCard.load(target / "README.md"), words((target / "README.md").read_text())
    data = card.data
    assert (data.base_model, data.license, data.library_name) == ("some/model", "apache-2.0", "transformers")
    assert data.pipeline_tag == "image-text-to-text"
    assert "grpo" in data.tags
    measured = json.loads((run / "evaluation.json").read_text())
    assert {one.metric_type: one.metric_value for one in data.eval_results} == {
        name: one["value"] for name, one in measured["after"].items()
    }
    for name, one in measured["before"].items():
        assert f"| `{name}` | {one['value']:.3f} | {measured['after'][name]['value']:.3f} |" in text
    assert "task: `VLM-REC-v0`" in text
    assert "Answer as {answer} in {coordinates}, or {none}. {question}" in text
    first = json.loads((run / "rollouts.jsonl").read_text().splitlines()[0])["prompt"]
    assert words(first) in text
    assert "temperature 0.7" in text


@pytest.mark.slow
def test_the_best_model_is_the_default_and_has_the_metrics_of_its_step(runs: dict[str, Path], tmp_path: Path) -> None:
    run = runs["full"]
    main(["export", str(run), str(tmp_path / "out")])
    best = json.loads((run / "best.json").read_text())
    card = ModelCard.load(tmp_path / "out" / "README.md")
    found = {one.metric_type: one.metric_value for one in card.data.eval_results}
    assert found[best["metric"]] == best["value"]
    assert f"step: {best['step']}" in card.content
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}  # as the base model's


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--adapter", "--dtype", "bfloat16"]])
def test_adapters_are_written_alone(flags: list[str], runs: dict[str, Path], tmp_path: Path) -> None:
    main(["export", str(runs["lora"]), str(tmp_path / "out"), *flags])
    assert not list((tmp_path / "out").glob("model*"))
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16 if flags else torch.float32}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(runs["full"] / "best")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "peft"
    assert "lora" in card.data.tags
    assert "Be brief." in card.content
    assert "stages before: `full`" in card.content
    assert "PeftModel.from_pretrained" in card.content
    assert "--enable-lora --max-lora-rank 8 --lora-modules trained=FOLDER" in card.content


@pytest.mark.slow
def test_adapters_of_the_vision_tower_are_told_what_vllm_needs(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, vision in (("language", False), ("both", True)):
        agent = VLMAgent.from_pretrained(base)
        agent.add_lora(rank=9, alpha=2, vision=vision)
        agent.save(tmp_path / name)
        for more in ([], ["--merged"]):
            out = tmp_path / f"{name} out {len(more)}"
            main(["export", str(tmp_path / name), str(out), *more])
            needed = vision and not more
            assert ("--enable-tower-connector-lora" in capsys.readouterr().out) == needed
            card = (out / "README.md").read_text()
            assert ("--enable-lora --enable-tower-connector-lora --max-lora-rank 16" in card) == needed
            assert ("--enable-lora --max-lora-rank 16" in card) == (not vision and not more)


@pytest.mark.slow
def test_adapters_that_vllm_refuses_are_told_to_be_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the projector of InternVL, as tests/agents/test_vllm_elsewhere.py sees."""
    (tmp_path / "base").mkdir()
    invent("internvl", tmp_path / "base")
    for vision in (True, False):
        agent = VLMAgent.from_pretrained(tmp_path / "base")
        agent.add_lora(rank=2, alpha=2, vision=vision)
        agent.save(tmp_path / f"adapters {vision}")
        main(["export", str(tmp_path / f"adapters {vision}"), str(tmp_path / f"out {vision}")])
        told = "vLLM takes no adapters of this model's projectors"
        assert (told in capsys.readouterr().out) == vision
        assert (told in (tmp_path / f"out {vision}" / "README.md").read_text()) == vision


@pytest.mark.slow
def test_merged_adapters_are_a_whole_model(runs: dict[str, Path], tmp_path: Path) -> None:
    main(["export", str(runs["lora"]), str(tmp_path / "out"), "--merged", "--dtype", "float32"])
    agent = VLMAgent.from_pretrained(runs["lora"] / "checkpoints" / "step-2")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, agent._published_weights()[name]), name
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert not (tmp_path / "out" / "float32").exists()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.library_name, card.data.base_model) == ("transformers", "some/model")


def test_an_adapter_of_the_hubs_model_names_it(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    agent = VLMAgent.from_pretrained(base)
    agent.add_lora(rank=2, alpha=2)
    agent.publish(tmp_path / "out", merged=False)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/model"


def test_a_model_that_no_run_has_made(tmp_path: Path) -> None:
    main(["export", "builtin", str(tmp_path / "out"), "--dtype", "bfloat16"])
    settings = (find_model("builtin") / "generation_config.json").read_bytes()
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == settings
    assert "reinforcement learning" not in ModelCard.load(tmp_path / "out" / "README.md").content


def test_wrong_requests(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full, out = str(runs["full"]), str(tmp_path / "out")
    assert "has no checkpoint 9: there are 1, 2, and best" in fails(capsys, full, out, "--step", "9")
    assert "step is a number or best, not last" in fails(capsys, full, out, "--step", "last")
    assert "has no adapters to write alone" in fails(capsys, full, out, "--adapter")
    assert "merged and adapter exclude each other" in fails(capsys, full, out, "--adapter", "--merged")
    assert "step goes with a run's folder" in fails(capsys, "builtin", out, "--step", "1")
    for name in ("model", "me/--model", "me/a..b", "me/" + 100 * "x", "me/a b", "me/model.git"):
        assert "hub is a name such as me/my-model" in fails(capsys, full, out, f"--hub={name}")
    assert "name the run or model" in fails(capsys)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    assert "exists already: name a new folder" in fails(capsys, full, out)


def test_an_upload_without_a_connection_keeps_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    out = tmp_path / "out"
    told = fails(capsys, "builtin", str(out), "--hub", "me/model")
    assert f"{out} is written, but the upload to me/model failed" in told
    assert "Unset HF_HUB_OFFLINE" in told
    assert f"hf upload me/model {out}" in told
    assert (out / "model.safetensors").is_file()
