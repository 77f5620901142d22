"""`vlmenv eval`, its suites and `vlmenv sample` with the model in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import shared
from safetensors.torch import load_file

import vlmenv.commands.evaluate
import vlmenv.commands.sample
import vlmenv.commands.suite
from vlmenv.agents.vlm import VLMAgent
from vlmenv.building import load_agent
from vlmenv.cli import main
from vlmenv.commands.evaluate import run_evaluation
from vlmenv.options.evaluate import EvalConfig


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[VLMAgent]:
    """The agents that commands load, as they load them."""
    agents: list[VLMAgent] = []

    def load(*args: Any, **options: Any) -> VLMAgent:
        agents.append(load_agent(*args, **options))
        return agents[-1]

    for module in (vlmenv.commands.evaluate, vlmenv.commands.suite, vlmenv.commands.sample):
        monkeypatch.setattr(module, "load_agent", load)
    return agents


def dtypes(agent: VLMAgent) -> set[torch.dtype]:
    return {weight.dtype for weight in agent.policy.parameters()}


@pytest.mark.slow
def test_bfloat16_measures_nearly_the_same(loaded: list[VLMAgent]) -> None:
    found = [run_evaluation(EvalConfig(device="cpu", eval_limit=64, weights=one)) for one in ("fp32", "bf16")]
    assert [dtypes(agent) for agent in loaded] == [{torch.float32}, {torch.bfloat16}]
    full, half = (one.metrics["iou/mean"].value for one in found)
    assert full > 0.3
    assert half == pytest.approx(full, abs=0.05)
    same = [a["completion"] == b["completion"] for a, b in zip(found[0].answers, found[1].answers, strict=True)]
    assert 0.5 < sum(same) / len(same) < 1  # not the same arithmetic, nor another model


def suite(folder: Path) -> list[str]:
    (folder / "data").mkdir()
    for name in ("images", "samples.jsonl"):
        (folder / "data" / name.replace("samples", "refcoco_val")).symlink_to(shared("data/rec/refcocos") / name)
    return ["eval", "--suite", "vlm_r1", "--suite-data", str(folder / "data")]


@pytest.mark.parametrize("command", [suite, lambda _: ["sample", "--n", "2"]], ids=["suite", "sample"])
def test_suites_and_sampling_work_in_bfloat16_too(
    command: Callable[[Path], list[str]], loaded: list[VLMAgent], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Answers of another precision do not go with those that are there."""
    args = [*command(tmp_path), "--eval-limit", "2", "--max-new-tokens", "24", "--device", "cpu"]
    args += ["--output", str(tmp_path / "out")]
    main([*args, "--weights", "bf16"])
    assert [dtypes(agent) for agent in loaded] == [{torch.bfloat16}]
    with pytest.raises(SystemExit):
        main(args)
    assert "holds results with another weights" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--weights", "bf16"], "weights bf16 goes with precision bf16, not with fp32"),
        (["--quantize", "int8"], "quantize is for the base of adapters: give lora_rank"),
        (["--quantize", "int8", "--freeze-vision"], "quantize is for the base of adapters"),
        (["--optimizer", "adamw_offload"], "moves state to the CPU, where this model is already"),
        (["--checkpointed-blocks", "2"], "checkpointed_blocks goes with gradient_checkpointing"),
    ],
)
def test_what_cannot_be_held_so_is_refused(
    args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--device", "cpu", "--eval-limit", "0", "--output", str(tmp_path / "run"), *args])
    assert message in " ".join(capsys.readouterr().err.split())


TINY = ("--device", "cpu", "--prompts-per-step", "2", "--group-size", "4", "--eval-limit", "0", "--tracker", "none")


@pytest.mark.slow
@pytest.mark.parametrize(
    "ways",
    [
        ["--weights", "bf16", "--beta", "0.1"],
        ["--weights", "bf16", "--optimizer", "adamw_8bit"],
        ["--lora-rank", "2", "--quantize", "nf4", "--optimizer", "adamw_8bit"],
    ],
)
def test_a_run_with_fewer_bits_goes_on_bit_for_bit(ways: list[str], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    args = ["train", *TINY, "--precision", "bf16", *ways, "--checkpoint-every", "1"]
    for name, steps in (("whole", "2"), ("parts", "1")):
        main([*args, "--steps", steps, "--lr-schedule", "constant", "--output", str(tmp_path / name)])
    main(["train", "--resume", str(tmp_path / "parts"), "--steps", "2", "--device", "cpu"])
    file = "adapter_model.safetensors" if "--lora-rank" in ways else "model.safetensors"
    names = ("whole", "step-2"), ("parts", "step-2"), ("whole", "step-1")
    whole, parts, before = (load_file(tmp_path / run / "checkpoints" / step / file) for run, step in names)
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    assert any(not torch.equal(before[name], tensor) for name, tensor in whole.items())


@pytest.mark.slow
def test_frozen_weights_that_stay_float32_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", *TINY, "--precision", "bf16", "--lora-rank", "2", "--steps", "1", "--output", str(tmp_path / "run")])
    assert "frozen weights stay fp32, because bf16 would round them" in " ".join(capsys.readouterr().out.split())
