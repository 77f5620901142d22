from __future__ import annotations

import copy
import gc
from pathlib import Path

import pytest
import torch
from batches import loss_of, optimizer_of, rollout_of, weights_of
from conftest import cut_vision
from transformers import AutoModelForImageTextToText

from vlmenv.agents import policy
from vlmenv.agents.families.qwen3_vl import Qwen3VL
from vlmenv.agents.policy import Policy
from vlmenv.agents.vlm import Sampling, VLMAgent, find_model
from vlmenv.core.errors import ConfigError


@pytest.fixture(params=["builtin", "qwen2_5_vl"])
def agent(request: pytest.FixtureRequest, qwen2_5_vl_folder: Path) -> VLMAgent:
    folder = qwen2_5_vl_folder if request.param == "qwen2_5_vl" else find_model("builtin")
    return VLMAgent.from_pretrained(folder, sampling=Sampling(0.8))


def is_frozen(name: str, vision: bool, projector: bool) -> bool:
    """By the published names of the weights."""
    return "visual." in name and (projector if "merger" in name else vision)


@pytest.mark.parametrize(("vision", "projector"), [(True, False), (False, True), (True, True)])
def test_frozen_parts_get_no_gradient_and_stay_as_they_are(agent: VLMAgent, vision: bool, projector: bool) -> None:
    agent.freeze(vision=vision, projector=projector)
    named = dict(agent.policy.named_parameters())
    trained = {name for name in named if not is_frozen(name, vision, projector)}
    assert 0 < len(trained) < len(named)
    assert {id(p) for p in agent.parameters()} == {id(named[name]) for name in trained}
    before, optimizer = weights_of(agent), optimizer_of(agent)
    loss_of(agent, rollout_of(agent)).backward()
    optimizer.step()
    for name, parameter in named.items():
        assert (parameter.grad is not None) == (name in trained), name
        assert torch.equal(parameter, before[name]) != (name in trained), name


def test_nothing_is_frozen_unasked(agent: VLMAgent) -> None:
    agent.freeze(vision=False, projector=False)
    assert len(agent.parameters()) == len(list(agent.policy.parameters()))


def test_deepstack_mergers_are_projectors(builtin: VLMAgent) -> None:
    config = copy.deepcopy(builtin.family.model.config)
    cut_vision(config.vision_config)
    family = Qwen3VL(AutoModelForImageTextToText.from_config(config), builtin.family.processor)
    VLMAgent(family, builtin.folder).freeze(vision=False, projector=True)
    frozen = {name for name, parameter in family.model.named_parameters() if not parameter.requires_grad}
    assert any("deepstack_merger_list.0." in name for name in frozen)
    assert frozen == {name for name, _ in family.model.named_parameters() if is_frozen(name, False, True)}


def test_groups_are_the_trained_parameters_by_part(agent: VLMAgent) -> None:
    agent.add_value_head()
    groups = agent.parameter_groups()
    assert groups.keys() == {"language", "vision"}
    for name, parameter in agent.policy.named_parameters():
        part = "vision" if "visual." in name else "language"
        assert [group for group, members in groups.items() if any(parameter is p for p in members)] == [part], name
    together = [p for members in groups.values() for p in members]
    assert sorted(map(id, together)) == sorted(map(id, agent.parameters()))
    agent.freeze(vision=True, projector=False)
    merger = [p for name, p in agent.policy.named_parameters() if "merger" in name]
    assert {id(p) for p in agent.parameter_groups()["vision"]} == {id(p) for p in merger}
    agent.freeze(vision=False, projector=True)
    assert list(agent.parameter_groups()) == ["language"]


def test_freezing_and_adapters_exclude_each_other(builtin: VLMAgent) -> None:
    pytest.importorskip("peft")
    builtin.freeze(vision=True, projector=False)
    with pytest.raises(ConfigError, match="neither with frozen parts nor with other adapters"):
        builtin.add_lora(rank=2, alpha=4)
    other = VLMAgent.from_pretrained("builtin")
    other.add_lora(rank=2, alpha=4)
    with pytest.raises(ConfigError, match="freezes the whole model already"):
        other.freeze(vision=True, projector=True)
    with pytest.raises(ConfigError, match="neither with frozen parts nor with other adapters"):
        other.add_lora(rank=2, alpha=4)


@pytest.mark.slow
def test_a_frozen_tower_sees_each_prompt_once(agent: VLMAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Policy and reference share what it saw, for as long as the prompts are there, and no longer."""
    agent.freeze(vision=True, projector=True)
    looks: list[int] = []
    look = Policy._look
    monkeypatch.setattr(Policy, "_look", lambda self, prompts: looks.append(len(prompts)) or look(self, prompts))
    before, rollout = len(policy._FEATURES), rollout_of(agent)
    first = agent.logprobs(rollout).values
    shown = sum(bool(prompt.images) for prompt in rollout.prompts)
    assert len(policy._FEATURES) - before == len(looks) == shown > 1
    assert torch.equal(agent.logprobs(rollout).values, first)
    agent.reference().logprobs(rollout)
    assert len(looks) == shown
    del rollout
    gc.collect()
    assert len(policy._FEATURES) == before


def test_a_tower_that_learns_is_asked_each_time(agent: VLMAgent) -> None:
    before = len(policy._FEATURES)
    rollout = rollout_of(agent)
    agent.logprobs(rollout)
    assert len(policy._FEATURES) == before
