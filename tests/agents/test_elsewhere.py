"""Agents on a device that is not the CPU do what they do there, and seldom have the CPU wait."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import ragged, rollout_of
from cuda_operators import cuda_operators
from elsewhere import Elsewhere, bring, elsewhere
from small_models import invent
from torch import Tensor

from vlmenv.agents import attention, vision_attention
from vlmenv.agents.kernels import EfficientKernel, FlashKernel
from vlmenv.agents.vlm import VLMAgent
from vlmenv.core.rollout import Rollout

pytestmark = pytest.mark.slow

# Without mixtures of experts: off the CPU, transformers counts their tokens by an operator that CPUs lack.
FAMILIES = [
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3", "smolvlm", "glm4v", "glm46v"),
    *("mistral3", "llava_onevision", "qwen3_5", "gemma3", "gemma4"),
]


def results(agent: VLMAgent, rollout: Rollout) -> dict[str, Tensor]:
    """Log-probabilities, values and gradients."""
    found = agent.logprobs(rollout)
    values = {"logprobs": found.values, "entropy": found.entropy}
    loss = (found.values * torch.linspace(-1, 1, len(rollout)).to(agent.device)[:, None]).sum()
    if found.state_values is not None:
        values["state values"] = found.state_values
        loss = loss + (found.state_values - 1).square().sum()
    loss.backward()
    grads = {name: one.grad for name, one in agent.policy.named_parameters() if one.grad is not None}
    return {name: one.here if isinstance(one, Elsewhere) else one for name, one in (values | grads).items()}


def assert_same(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert found.keys() == right.keys()
    largest = max(float(one.abs().max()) for name, one in right.items() if name.startswith("model."))
    for name, one in right.items():
        within = 1e-5 * (largest if name.startswith("model.") else 1 + float(one.detach().abs().max()))
        torch.testing.assert_close(found[name], one, atol=within, rtol=0, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    invent(family, tmp_path)
    agent, other = VLMAgent.from_pretrained(tmp_path), VLMAgent.from_pretrained(tmp_path)
    rollout = rollout_of(agent)
    right = results(agent, rollout)
    with elsewhere():
        other = bring(other)
        assert rollout_of(other).texts == rollout.texts
        found = results(other, rollout)
    assert_same(found, right)


def repeat(agent: VLMAgent) -> None:
    agent.family_policy.share_prefixes = False


def add_lora(agent: VLMAgent) -> None:
    torch.manual_seed(0)
    agent.add_lora(rank=2, alpha=4)
    for name, weight in agent.policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(weight, 0.01)


SETUPS: dict[str, Callable[[VLMAgent], Any]] = {
    "plain": repeat,
    "lora": add_lora,
    "value head": VLMAgent.add_value_head,
    "gradient checkpointing": VLMAgent.enable_gradient_checkpointing,
    "frozen vision tower": lambda agent: agent.freeze(vision=True, projector=False),
}


@pytest.mark.parametrize("setup", SETUPS)
def test_every_set_up(setup: str) -> None:
    agent, other = VLMAgent.from_pretrained("builtin"), VLMAgent.from_pretrained("builtin")
    rollout = rollout_of(agent)
    SETUPS[setup](agent)
    right = results(agent, rollout)
    with elsewhere():
        other = bring(other)
        SETUPS[setup](other)
        found = results(other, rollout)
    assert_same(found, right)


@pytest.mark.parametrize("kernel", [FlashKernel(), EfficientKernel()], ids=["flash", "efficient"])
def test_with_the_kernels_for_gpus(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on one, but for what PyTorch's operators there compute themselves."""
    agent, other = VLMAgent.from_pretrained("builtin"), VLMAgent.from_pretrained("builtin")
    rollout = rollout_of(agent)
    right = results(agent, rollout)
    for module in (attention, vision_attention):
        monkeypatch.setattr(module, "kernel_for", lambda query, masked=False: kernel)
    with elsewhere() as waits, cuda_operators():
        other = bring(other)
        assert rollout_of(other).texts == rollout.texts
        waits.clear()
        found = results(other, rollout)
    assert_same(found, right)
    assert isinstance(kernel, EfficientKernel) or not any("vision_attention.py" in wait for wait in waits)


def test_what_waits_for_the_device() -> None:
    """Learning from texts nothing does; sampling, each eighth token to see what has ended, and what comes back."""
    with elsewhere() as waits:
        agent = bring(VLMAgent.from_pretrained("builtin"))
        texts = [observation for observation in ragged() if not observation["images"]]
        waits.clear()
        agent.sampling = type(agent.sampling)(max_new_tokens=20)
        rollout = agent.rollout(texts)
        assert sum("nonzero" in wait for wait in waits) <= 20 // 8
        assert len(waits) <= 2 * (20 // 8) + 3
        waits.clear()
        loss = agent.logprobs(rollout).values.sum()
        loss.backward()
        assert not waits


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_attention_of_the_vision_tower_waits_once_for_each_kind_of_segments(family: str, tmp_path: Path) -> None:
    """Of the images, and of the windows in them; not in each block, nor in the backward pass."""
    invent(family, tmp_path)
    with elsewhere() as waits:
        agent = bring(VLMAgent.from_pretrained(tmp_path))
        agent.enable_gradient_checkpointing()
        rollout = rollout_of(agent)
        waits.clear()
        agent.logprobs(rollout).values.sum().backward()
    asked = [wait for wait in waits if "vision_attention.py" in wait]
    assert len(asked) == (2 if family == "qwen2_5_vl" else 1)


class TestTheDevice:
    def test_mixing_is_found(self) -> None:
        with pytest.raises(RuntimeError, match=r"aten::add: \[\(2,\)\] are on the CPU"), elsewhere():
            torch.ones(2, device="elsewhere") + torch.ones(2)

    def test_waiting_is_found(self) -> None:
        with elsewhere() as waits:
            there = torch.ones(2).to("elsewhere")
            assert not waits
            assert float(there.sum()) == 2
            assert there.tolist() == [1, 1]
            torch.nonzero(there)
            there.cpu()
        assert [wait.split(",")[0].removeprefix("aten::") for wait in waits] == [
            "_local_scalar_dense",
            "tolist",
            "nonzero",
            "_to_copy",
        ]

    def test_other_devices_stay_what_they_are(self) -> None:
        """Within and after: models are made on the device meta, which has no numbers, before they are loaded."""
        for context in (elsewhere(), nullcontext()):
            with context, torch.device("meta"):
                assert torch.tensor([1.0]).device.type == torch.empty(1).device.type == "meta"
