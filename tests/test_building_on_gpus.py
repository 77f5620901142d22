"""What is advised where training on a GPU leaves out what would make it much faster."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import vlmenv.commands.train
from vlmenv import train
from vlmenv.building import advice_on_cuda
from vlmenv.core.errors import DataError
from vlmenv.options.fields import replaced
from vlmenv.options.train import TrainConfig, default_config

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def config(algo: str = "grpo", **options: Any) -> TrainConfig[Any]:
    return replaced(default_config(algo), options)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that has bfloat16, and no vLLM."""
    find = importlib.util.find_spec
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else find(name))


def test_bfloat16_and_vllm_are_advised_with_their_options() -> None:
    precision, engine = advice_on_cuda(config(precision="fp32"), GPU)
    assert precision.startswith("warning: precision is fp32, and this GPU has bfloat16: --precision bf16 takes half")
    assert engine.endswith('pip install "vlmenv[vllm]", then add --engine vllm (docs/vllm.md)')


def test_what_is_installed_is_not_advised_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "vllm")
    (engine,) = advice_on_cuda(config(precision="bf16"), GPU)
    assert engine == "the model itself generates, several times slower than vLLM: add --engine vllm (docs/vllm.md)"


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16", "engine": "vllm"},
        {"precision": "fp16", "engine": "vllm"},
        {"precision": "bf16", "algo": "sft"},  # which samples nothing
    ],
    ids=str,
)
def test_nothing_is_advised_that_is_asked_for_or_of_no_use(options: dict[str, Any]) -> None:
    assert advice_on_cuda(config(**options), GPU) == []


def test_bfloat16_is_not_advised_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert advice_on_cuda(config(precision="fp32", engine="vllm"), GPU) == []


def test_cpus_get_no_such_advice() -> None:
    assert advice_on_cuda(config(precision="fp32"), CPU) == []


def test_a_run_says_it_at_its_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before it reads its data, of which there is none here."""
    options: dict[str, Any] = {"env": "VLM-VQA-v0", "dataset": [str(tmp_path / "none.jsonl")], "device": "cpu"}
    for device in (CPU, GPU):
        monkeypatch.setattr(
            vlmenv.commands.train, "advice_on_cuda", lambda config, _, at=device: advice_on_cuda(config, at)
        )
        with pytest.raises(DataError, match=r"none\.jsonl"):
            train(output=tmp_path / "run", dry_run=True, **options)
        told = " ".join(capsys.readouterr().out.split())
        assert ("this GPU has bfloat16: --precision bf16" in told) == (device is GPU)
        assert ("then add --engine vllm (docs/vllm.md)" in told) == (device is GPU)
