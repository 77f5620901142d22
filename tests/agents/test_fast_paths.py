"""What is said of faster and leaner ways: what is on, and what has fallen back."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_operators import cuda_operators
from elsewhere import NAME, bring, elsewhere
from small_models import INVENTED, invent
from transformers.models.qwen3_vl import modeling_qwen3_vl
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextAttention, Qwen3VLTextRMSNorm

from vlmenv.agents import fast_paths as reported
from vlmenv.agents import fusing, kernels, lean_layers, rotary, step_graphs, wide_gradients
from vlmenv.agents.fast_paths import fast_paths, written
from vlmenv.agents.kernels import EfficientKernel, ExplicitKernel, FlashKernel
from vlmenv.agents.trials import Trial
from vlmenv.agents.vlm import VLMAgent
from vlmenv.core.errors import ModelError
from vlmenv.core.rollout import Observation

TEXT: Observation = {"images": (), "prompt": "How many?"}


def states(agent: VLMAgent) -> dict[str, str]:
    return {path.name: path.written for path in fast_paths(agent.family_policy, torch.float32)}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["builtin", *INVENTED])
def test_all_are_on_in_every_family(family: str, tmp_path: Path) -> None:
    """With the versions that the tests run with, nothing falls back."""
    if family != "builtin":
        invent(family, tmp_path)
    agent = VLMAgent.from_pretrained("builtin" if family == "builtin" else tmp_path)
    found = states(agent)
    lean = agent.family_policy.lean_layers
    assert lean.on == lean.of > 0
    assert found.pop("lean layers") == f"{lean.on} of {lean.of}"
    assert found.pop("flash attention") == "yes (PyTorch's for CPUs)"
    parts = {name: found.pop(name) for name in list(found) if name.startswith("parts of ")}
    assert {"parts of torch", "parts of transformers", "parts of accelerate"} <= parts.keys()
    assert all(state.split(" of ")[0] == state.split(" of ")[1] for state in parts.values())
    assert set(found.values()) == {"yes"}
    assert ("images in one call" in found) == agent.family.packs_images


def test_a_model_leaves_the_global_generators_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the first of a process: new adapters are drawn next, and a seed fixes them."""
    monkeypatch.setattr(lean_layers, "_tried", {})
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    VLMAgent.from_pretrained("builtin")
    assert lean_layers._tried
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


def test_a_changed_class_of_transformers_is_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once in a warning, and in each report."""
    monkeypatch.setattr(lean_layers, "_told", set())
    monkeypatch.setattr(Qwen3VLTextRMSNorm, "forward", lambda self, hidden_states: hidden_states * self.weight)
    for _ in range(2):
        agent = VLMAgent.from_pretrained("builtin")
    changed = sum(type(module) is Qwen3VLTextRMSNorm for module in agent.family.model.modules())
    whole = agent.family_policy.lean_layers.of
    assert 0 < changed < whole
    line = written(fast_paths(agent.family_policy, torch.float32))
    assert (
        f"lean layers {whole - changed} of {whole} (Qwen3VLTextRMSNorm: it does not compute the same as RMSNorm)"
        in line
    )
    assert caplog.text.count("Qwen3VLTextRMSNorm keeps all its activations") == 1


def test_blocks_that_no_longer_ask_for_the_attention_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else completions would attend to each other's tokens."""

    def own(self: Qwen3VLTextAttention, hidden_states: torch.Tensor, **_: object) -> tuple[torch.Tensor, None]:
        return hidden_states, None

    agent = VLMAgent.from_pretrained("builtin")
    monkeypatch.setattr(Qwen3VLTextAttention, "forward", own)
    with pytest.raises(ModelError, match="have not used the packed tokens' own pass"):
        agent.rollout([TEXT])


def test_what_is_off_says_why(builtin: VLMAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    builtin.family_policy.share_prefixes = False
    builtin.enable_gradient_checkpointing()
    tower = builtin.family.vision_tower()
    for module in tower.modules():
        if hasattr(module, "config"):
            module.config = builtin.family.model.config
    for kernel, told in ((ExplicitKernel(), "matrix products"), (EfficientKernel(), "memory-efficient")):
        monkeypatch.setattr(reported, "kernel_for", lambda query, kernel=kernel: kernel)
        found = states(builtin)
        assert found["flash attention"].startswith("no (")
        assert told in found["flash attention"]
    assert found["shared prompts"].startswith("no (")
    assert "only while a block is recomputed" in found["lean layers"]
    assert found["images in one call"].startswith("no (")


ONLY_ON_GPUS = (
    "flash attention",
    "attention without padding",
    "compiled elementwise functions",
    "float32 gradients at once",
    "rotations at once",
    "steps of sampling as graphs",
)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[VLMAgent]:
    """The built-in model on a pretended device, which is taken for a GPU with all that GPUs have."""
    kinds = kernels._kernel_for, kernels.segments_fault
    monkeypatch.setattr(fusing, "GPUS", NAME)
    monkeypatch.setattr(kernels, "kernels_of", lambda device, masked: [FlashKernel()])
    monkeypatch.setattr(fusing, "fault_of", lambda device: "")
    monkeypatch.setattr(wide_gradients, "fault_of", lambda device, dtype: "")
    monkeypatch.setattr(step_graphs, "_trial", lambda policy: "")
    for one in kinds:
        one.cache_clear()
    with elsewhere():
        yield bring(VLMAgent.from_pretrained("builtin"))
    for one in kinds:
        one.cache_clear()


def on_gpus(agent: VLMAgent) -> list[str]:
    """What is said of the ways that only GPUs have, under bfloat16."""
    found = {path.name: path.written for path in fast_paths(agent.family_policy, torch.bfloat16)}
    return [found.get(name, "") for name in ONLY_ON_GPUS]


def test_ways_of_gpus_are_told(on_a_gpu: VLMAgent) -> None:
    with cuda_operators():
        assert on_gpus(on_a_gpu) == ["yes", "yes", "yes", "yes", "2 of 2", "yes"]


def test_each_way_of_gpus_that_is_off_says_why(on_a_gpu: VLMAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here PyTorch has no such attention, and a model of transformers turns its queries in another way."""
    flash, segments, *_ = on_gpus(on_a_gpu)
    assert re.fullmatch(rf"no \(matrix products instead, for bfloat16 heads of 32 on {NAME}: \w+Error: .+\)", flash)
    assert segments == ""  # there is no flash attention to do it
    monkeypatch.setattr(kernels, "try_kernel", lambda *_: Trial(""))
    kernels._kernel_for.cache_clear()
    monkeypatch.setattr(wide_gradients, "fault_of", lambda device, dtype: f"no sums on {device}")
    monkeypatch.setattr(modeling_qwen3_vl, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q, k))
    on_a_gpu.family_policy.rotations = rotary.rotate_at_once(on_a_gpu.family.model)
    monkeypatch.setattr(step_graphs, "_trial", lambda policy: "no graphs")
    on_a_gpu.family_policy.graph_fault = None
    flash, segments, compiled, gradients, rotations, graphs = on_gpus(on_a_gpu)
    assert graphs == "no (no graphs)"
    assert (flash, compiled, gradients) == ("yes", "yes", f"no (no sums on {NAME})")
    assert re.fullmatch(r"no \(\w+Error: .+\)", segments)
    assert rotations == "1 of 2 (no rotation of halves: modeling_qwen3_vl.apply_rotary_pos_emb)"


def test_without_a_compiler_gpus_have_none_of_its_ways(on_a_gpu: VLMAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusing, "fault_of", lambda device: "ImportError: no triton")
    *_, compiled, gradients, rotations, _ = on_gpus(on_a_gpu)
    assert compiled == "no (ImportError: no triton)"
    assert gradients == rotations == "no (functions are not compiled)"
