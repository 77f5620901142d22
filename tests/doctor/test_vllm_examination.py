"""The doctor on the real vLLM, in health and with planted faults. Each test starts an engine of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from cases import SMALLER, copied, examined, failed, unchecked
from PIL import Image

from vlmenv import building as tasks
from vlmenv.agents import saving
from vlmenv.agents.engines import vllm as engines
from vlmenv.agents.engines.base import Request
from vlmenv.agents.engines.vllm import VLLMEngine
from vlmenv.agents.vlm import VLMAgent
from vlmenv.doctor import Finding

pytestmark = pytest.mark.vllm
NUMBERS = {"log-probs", "greedy answers", "after an update", "weights put back"}
"""checks that compare log-probabilities"""
NEEDS_ENGINE = NUMBERS | {"weight checksums"}


def examined_with_vllm(**options: Any) -> dict[str, Finding]:
    return examined(engine="vllm", engine_length=1024, **options)


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> type:
    """vLLM's own class, once it can be imported."""
    import torch

    cls: type = engines.import_vllm(torch.device("cpu")).LLM
    return cls


@pytest.mark.parametrize(
    "options",
    [{}, {"precision": "bf16", "env": "VLM-OVD-v0"}, {"lora_rank": 4, "lora_vision": True}],
    ids=["defaults", "bf16", "adapters"],
)
def test_the_builtin_model_is_in_health(options: Mapping[str, Any]) -> None:
    if "adaptation" in options:
        pytest.importorskip("peft")
    findings = examined_with_vllm(**options)
    assert {name: one for name, one in findings.items() if not one.passed} == {}
    assert findings["engine"].figure == "vllm, with room for 1024 tokens"
    assert "vllm" in findings["versions"].figure


def test_another_image_processor_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's folder is not the trainer's."""
    other = copied(tmp_path / "other", SMALLER)
    monkeypatch.setattr(tasks, "VLLMEngine", lambda folder, family, **options: VLLMEngine(other, family, **options))
    findings = examined_with_vllm()
    assert failed(findings) == {"prompt images"}
    assert findings["prompt images"].figure == "11 image tokens are the trainer's, 6 the engine's"
    assert unchecked(findings) == NEEDS_ENGINE


def test_other_tokens_of_a_prompt_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    as_input = VLLMEngine._as_input

    def otherwise(engine: VLLMEngine, request: Request) -> dict[str, Any]:
        first, second, *rest = as_input(engine, request)["prompt_token_ids"]
        return as_input(engine, request) | {"prompt_token_ids": [first, second + 1, *rest]}

    monkeypatch.setattr(VLLMEngine, "_as_input", otherwise)
    findings = examined_with_vllm()
    assert failed(findings) == {"prompt text"}
    assert "the engine's" in findings["prompt text"].figure
    assert unchecked(findings) == NEEDS_ENGINE


def test_a_renamed_weight_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    convert = saving.convert_back
    monkeypatch.setattr(
        saving,
        "convert_back",
        lambda *args: {name.replace("blocks.0", "layers.0"): one for name, one in convert(*args).items()},
    )
    findings = examined_with_vllm()
    assert failed(findings) == {"weight names", "after an update"}
    assert "model.visual.layers.0" in findings["weight names"].figure
    assert "are missing ['model.visual.blocks.0" in findings["after an update"].figure


def test_a_weight_that_the_engine_does_not_take_over_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where nothing tells of it."""
    published = VLMAgent._published_weights
    first: dict[str, Any] = {}

    def with_an_old_one(self: VLMAgent) -> dict[str, Any]:
        weights, name = published(self), "model.language_model.layers.1.mlp.up_proj.weight"
        return weights | {
            name: first.setdefault(name, VLMAgent.from_pretrained("builtin").family.model.state_dict()[name])
        }

    monkeypatch.setattr(VLMAgent, "_published_weights", with_an_old_one)
    findings = examined_with_vllm()
    assert failed(findings) == {"after an update", "weight checksums"}
    assert "generates with old weights" in findings["after an update"].remedy


def test_a_weight_that_stays_old_and_that_bfloat16_hides_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of what vLLM has joined of three."""
    import torch

    engines.import_vllm(torch.device("cpu"))
    from vlmenv.agents.engines.transfer import InProcessTransfer

    load, name = InProcessTransfer.load, "visual.blocks.1.attn.qkv.bias"

    def forgetful(self: InProcessTransfer, weights: Any) -> None:
        old = self.model.get_parameter(name)[:8].clone()
        load(self, weights)
        with torch.no_grad():
            self.model.get_parameter(name)[:8] = old

    monkeypatch.setattr(InProcessTransfer, "load", forgetful)
    findings = examined_with_vllm(precision="bf16")
    assert failed(findings) == {"weight checksums"}
    assert f"{name} among them" in findings["weight checksums"].figure


@pytest.mark.parametrize(
    ("left_out", "precision"),
    [("reset_prefix_cache", "fp32"), ("reset_prefix_cache", "bf16"), ("reset_encoder_cache", "fp32")],
)
def test_a_stale_cache_is_found(left_out: str, precision: str, llm: type, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.llm_engine import LLMEngine

    monkeypatch.setattr(llm if left_out == "reset_prefix_cache" else LLMEngine, left_out, lambda self: True)
    assert failed(examined_with_vllm(precision=precision)) == {"after an update"}


def test_another_precision_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's weights are in bfloat16 where the trainer computes in float32."""
    import torch

    def start(*args: Any, **options: Any) -> VLLMEngine:
        return VLLMEngine(*args, **(options | {"dtype": torch.bfloat16}))

    monkeypatch.setattr(tasks, "VLLMEngine", start)
    assert failed(examined_with_vllm()) == NUMBERS


def test_photographs_of_several_sizes_fit_too(tmp_path: Path) -> None:
    """Scaled up and down by the image processor, and with a prompt as long as a cache's block by itself."""
    rows = []
    for i, size in enumerate([(640, 480), (40, 50), (300, 100)]):
        Image.effect_noise(size, 80).convert("RGB").save(tmp_path / f"{i}.png")
        rows.append(
            f'{{"image": "{i}.png", "problem": "{"Where is it? " * (1 + 40 * i)}", "answer": "[1, 2, 30, 40]"}}'
        )
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    findings = examined_with_vllm(dataset=(str(tmp_path / "rows.jsonl"),))
    assert failed(findings) <= {"answers read", "answers cut off"}
    assert NEEDS_ENGINE & unchecked(findings) == set()
