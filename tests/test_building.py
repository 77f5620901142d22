"""What ranks load that get their shards of the weights from the main rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vlmenv.agents.engines.base import Engine
from vlmenv.agents.vlm import VLMAgent
from vlmenv.building import ENGINES, load_for_training
from vlmenv.core.errors import ConfigError
from vlmenv.options.fields import replaced
from vlmenv.options.train import default_config

CPU = torch.device("cpu")


class Met(Engine):
    """An engine that remembers what it was made from, and how often it got weights."""

    def __init__(self, config: Any, agent: VLMAgent, dtype: torch.dtype) -> None:
        self.is_meta, self.device = agent.device.type == "meta", agent.target_device
        self.updates = 0

    def generate(self, *_: Any) -> Any:
        raise AssertionError("nothing is asked")

    def sync(self, *_: Any, **__: Any) -> None:
        self.updates += 1

    def close(self) -> None:
        pass


@pytest.mark.parametrize(("engine", "has_shapes"), [("vllm", True), ("vllm-server", True), ("own", False)])
def test_engines_are_made_from_shapes_but_for_those_that_are_registered(
    engine: str, has_shapes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine's first weights are those of the first hand-over in training."""
    monkeypatch.setitem(ENGINES, engine, Met)
    server = {"server": ("http://host:8000",)} if engine == "vllm-server" else {}
    config = replaced(default_config(), {"engine": engine, **server})
    agent = load_for_training(config, CPU, gets_shards=True, syncs=False)
    met: Any = agent.engine
    assert (met.is_meta, met.device, met.updates) == (has_shapes, CPU, 0)
    assert all(one.is_meta == has_shapes for one in agent.policy.parameters())
    whole: Any = load_for_training(config, CPU).engine
    assert (whole.is_meta, whole.updates) == (False, int(engine == "vllm-server"))


def test_adapters_as_the_model_need_no_weights_to_begin_with(tmp_path: Path) -> None:
    """What is refused where the reference would need other adapters is refused on ranks without weights too."""
    pytest.importorskip("peft")
    trained = VLMAgent.from_pretrained("builtin")
    trained.add_lora(rank=2, alpha=4)
    trained.save(tmp_path / "adapters")
    config = replaced(default_config(), {"model": str(tmp_path / "adapters")})
    agent = load_for_training(config, CPU, gets_shards=True, syncs=False)
    shapes = {name: one.shape for name, one in trained.policy.named_parameters()}
    assert {name: one.shape for name, one in agent.policy.named_parameters()} == shapes
    assert all(one.is_meta for one in agent.policy.parameters())
    agent.sharded = True
    with pytest.raises(ConfigError, match="a reference that has adapters does not work with shards"):
        agent.reference()


def test_quantisation_needs_the_weights() -> None:
    pytest.importorskip("peft")
    config = replaced(default_config(), {"quantize": "int8", "lora_rank": 2})
    agent = load_for_training(config, CPU, gets_shards=True, syncs=False)
    assert not any(one.is_meta for one in agent.policy.parameters())
