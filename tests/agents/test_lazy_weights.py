"""Weights that are made when they are asked for: adapters merged one layer at a time, for engines and files."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import weights_of
from safetensors.torch import load_file
from torch import Tensor

from vlmenv.agents import saving
from vlmenv.agents.engines.channel import buckets
from vlmenv.agents.engines.checks import check_names
from vlmenv.agents.engines.files import write_file
from vlmenv.agents.lazy_weights import LazyWeights, outlines
from vlmenv.agents.lora import LoRA
from vlmenv.agents.vlm import VLMAgent

peft = pytest.importorskip("peft")


def adapted(base: str | Path = "builtin", dtype: torch.dtype = torch.float32, **options: Any) -> VLMAgent:
    agent = VLMAgent.from_pretrained(base, dtype=dtype, **options)
    torch.manual_seed(0)
    agent.add_lora(rank=4, alpha=8, vision=True)
    for parameter in agent.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return agent


@pytest.fixture(params=["builtin", "qwen2_5_vl"])
def base(request: pytest.FixtureRequest, qwen2_5_vl_folder: Path) -> str | Path:
    return qwen2_5_vl_folder if request.param == "qwen2_5_vl" else "builtin"


def by_peft(agent: VLMAgent, base: str | Path, place: Path) -> dict[str, Tensor]:
    """The merged weights that peft itself finds, by the names of a saved model."""
    agent.save(place / "adapter")
    plain = VLMAgent.from_pretrained(base)
    plain.family.model = peft.PeftModel.from_pretrained(plain.family.model, place / "adapter").merge_and_unload()
    plain.family.model.save_pretrained(place / "merged")
    return load_file(place / "merged" / "model.safetensors")


class Watched:
    """Notes which weights are made, and how many of them exist when the next is made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[str] = []
        self.most = 0
        self._alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
        dense = LoRA._dense

        def watched(lora: LoRA, name: str, state: Mapping[str, Tensor]) -> Tensor:
            self.most = max(self.most, len(self._alive))
            tensor = dense(lora, name, state)
            self.made.append(name)
            self._alive.add(tensor)
            return tensor

        monkeypatch.setattr(LoRA, "_dense", watched)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


@pytest.mark.slow
def test_merged_weights_are_those_of_peft(base: str | Path, tmp_path: Path) -> None:
    agent = adapted(base)
    found, right = agent._published_weights(), by_peft(agent, base, tmp_path)
    assert isinstance(found, LazyWeights)
    assert found.keys() == right.keys()
    for name, tensor in right.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-6)
        assert not found[name].requires_grad
    for name, shown in outlines(found).items():
        assert (shown.shape, shown.dtype) == (found[name].shape, found[name].dtype), name


@pytest.mark.slow
def test_one_merged_weight_exists_at_a_time(base: str | Path, watched: Watched, tmp_path: Path) -> None:
    """Neither names nor shapes are reason to make one; and each is made once for a file."""
    agent = adapted(base)
    layers = [name for name in weights_of(agent) if name.endswith(".base_layer.weight")]
    weights = agent._published_weights()
    assert set(weights) == set(outlines(weights))
    assert buckets(weights, torch.float32)
    check_names(weights, set(weights))
    assert "model.nobody.weight" not in weights
    assert not watched.made
    write_file(tmp_path / "file", weights, torch.bfloat16)
    assert len(watched.made) == len(set(watched.made)) == len(layers) > 20
    assert watched.most <= 1
    watched.made.clear()
    agent.publish(tmp_path / "model")
    assert len(watched.made) == len(layers)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["lora", "int8"])
def test_a_conversion_that_computes_has_the_same_weights(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a family's files hold several weights in one; then they are made before it, on the CPU."""
    agent = adapted(quantization="int8" if way == "int8" else None)
    right = {name: tensor.clone() for name, tensor in agent._published_weights().items()}
    convert = saving.convert_back

    def computing(*args: Any) -> dict[str, Tensor]:
        return {name: 2 * tensor for name, tensor in convert(*args).items()}

    monkeypatch.setattr(saving, "convert_back", computing)
    found = agent._published_weights()
    assert not isinstance(found, LazyWeights)
    for name, tensor in right.items():
        assert torch.equal(found[name], 2 * tensor), name


def test_a_bfloat16_base_is_merged_in_float32_and_rounded_once() -> None:
    agent = adapted(dtype=torch.bfloat16)
    name = "model.language_model.layers.0.mlp.up_proj"
    layer = agent.family.model.get_submodule(name)
    down, up = (getattr(layer, f"lora_{part}")["default"].weight.detach().double() for part in "AB")
    exact = layer.base_layer.weight.detach().double() + layer.scaling["default"] * (up @ down)
    found = agent._published_weights()[f"{name}.weight"]
    assert found.dtype == torch.bfloat16
    assert (found != exact.bfloat16()).float().mean() < 1e-3  # ties of float32's own rounding


def test_they_are_made_anew_each_time() -> None:
    count: Iterator[int] = iter(range(9))
    weights = LazyWeights({"a": torch.empty(1, device="meta")}, {"a": lambda: torch.full((1,), float(next(count)))})
    assert [float(weights["a"]) for _ in range(3)] == [0, 1, 2]
    assert len(weights) == 1
