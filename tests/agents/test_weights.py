"""Weights in bfloat16: frozen ones change nothing under autocast, and all of them can be saved exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from batches import logprobs_of, loss_of, ragged, rollout_of, weights_of
from torch import nn

from vlmenv.agents.checkpoints import find_model
from vlmenv.agents.vlm import Sampling, VLMAgent
from vlmenv.agents.weights import WideEmbedding


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model in bfloat16, as models are published."""
    folder: Path = tmp_path_factory.mktemp("bf16") / "model"
    VLMAgent.from_pretrained("builtin").publish(folder, dtype=torch.bfloat16)
    return folder


def build(folder: Path | str, dtype: torch.dtype = torch.float32, *, lora: bool = True) -> VLMAgent:
    agent = VLMAgent.from_pretrained(folder, dtype=dtype, sampling=Sampling(0.8))
    torch.manual_seed(0)
    if lora:
        agent.add_lora(rank=4, alpha=8, vision=True)
        for parameter in agent.parameters():
            nn.init.normal_(parameter, std=0.05)
    return agent


def held(agent: VLMAgent) -> int:
    return sum(one.numel() * one.element_size() for one in agent.policy.parameters())


def results(agent: VLMAgent) -> list[torch.Tensor]:
    """Log-probabilities of what is sampled and of what is learnt from, and all gradients, under autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        rollout = rollout_of(agent)
        loss = loss_of(agent, rollout)
        values = logprobs_of(agent, rollout)
    loss.backward()
    sampled = [torch.from_numpy(one.logprobs) for one in rollout.completions]
    return [values, *sampled, *(one.grad for one in agent.parameters() if one.grad is not None)]


@pytest.mark.slow
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [True, False])
def test_frozen_bfloat16_weights_change_no_bit(folder: Path, lora: bool, loaded: torch.dtype) -> None:
    agents = [build(folder, lora=lora), build(folder, loaded if lora else torch.float32, lora=lora)]
    if not lora:
        for agent in agents:
            agent.freeze(vision=True, projector=True)
    assert agents[1].hold("frozen") == 0
    trained = {one.dtype for one in agents[1].parameters()}
    assert trained == {torch.float32}
    whole, half = map(held, agents)
    assert half < (0.6 if lora else 0.95) * whole
    for ours, theirs in zip(*map(results, agents), strict=True):
        assert torch.equal(ours, theirs)


def test_the_token_embedding_gives_float32(folder: Path) -> None:
    agent = build(folder, torch.bfloat16)
    agent.hold("frozen")
    embedding = agent.family.model.get_input_embeddings()
    assert isinstance(embedding, WideEmbedding)
    assert embedding.weight.dtype == torch.bfloat16
    assert embedding(torch.tensor([3])).dtype == torch.float32
    norms = [one for name, one in agent.family.model.named_parameters() if "norm" in name and one.ndim == 1]
    assert {one.dtype for one in norms} == {torch.float32}


def test_weights_that_would_be_rounded_stay_float32() -> None:
    """The built-in model was published in float16, which bfloat16 cannot hold."""
    agent = build("builtin")
    before = weights_of(agent)
    rounded = agent.hold("frozen")
    kept = [one for name, one in agent.family.model.named_parameters() if name.endswith("base_layer.weight")]
    assert rounded >= sum(one.numel() for one in kept) > 0
    for name, tensor in weights_of(agent).items():
        assert torch.equal(tensor.float(), before[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("frozen_vision", [True, False])
def test_a_reference_in_bfloat16_is_the_same(frozen_vision: bool) -> None:
    """Also of weights that bfloat16 rounds, because autocast rounds them too; and it does not follow the policy."""
    agents = [build("builtin", lora=False), build("builtin", lora=False)]
    for agent in agents:
        agent.freeze(vision=frozen_vision, projector=frozen_vision)
    agents[1].hold("frozen")
    references = [agent.reference() for agent in agents]
    with torch.autocast("cpu", torch.bfloat16):
        rollout = rollout_of(agents[0])
    held_by = [sum(p.numel() * p.element_size() for p in one.policy.parameters()) for one in references]
    assert held_by[1] < 0.9 * held_by[0]  # a frozen tower is shared
    with torch.no_grad():
        for parameter in agents[1].parameters():
            parameter.mul_(1.5)
    with torch.autocast("cpu", torch.bfloat16):
        found = [one.logprobs(rollout).values for one in references]
    assert torch.equal(*found)


def test_a_reference_of_bfloat16_weights_does_not_follow_the_policy(folder: Path) -> None:
    agent = build(folder, torch.bfloat16, lora=False)
    agent.hold("all")
    reference, rollout = agent.reference(), rollout_of(agent)
    with torch.autocast("cpu", torch.bfloat16):
        before = reference.logprobs(rollout).values
        with torch.no_grad():
            for parameter in agent.parameters():
                parameter.mul_(1.5)
        assert torch.equal(reference.logprobs(rollout).values, before)
        assert not torch.equal(logprobs_of(agent, rollout), before)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["builtin", "bf16"])
def test_all_weights_in_bfloat16_are_saved_exactly(base: str, folder: Path, tmp_path: Path) -> None:
    """Also beside a base model in float16."""
    name = find_model("builtin") if base == "builtin" else folder
    agent = build(name, torch.bfloat16, lora=False)
    agent.hold("all")
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    agent.save(tmp_path / "model")
    again = build(name, torch.bfloat16, lora=False)
    again.hold("all")
    again.load(tmp_path / "model")
    for key, tensor in weights_of(agent).items():
        assert torch.equal(weights_of(again)[key], tensor), key
        assert tensor.dtype == torch.bfloat16 or not tensor.is_floating_point()
    whole = VLMAgent.from_pretrained(tmp_path / "model")
    assert all(
        torch.equal(whole.family_policy.state_dict()[key], one.float()) for key, one in weights_of(agent).items()
    )


@pytest.mark.slow
def test_adapters_know_their_base_in_any_data_type(folder: Path, tmp_path: Path) -> None:
    agent = build(folder, torch.bfloat16)
    agent.hold("frozen")
    agent.save(tmp_path / "adapter")
    again = build(folder)
    again.load(tmp_path / "adapter")
    rollout = agent.imitate(ragged(), ["a b c"] * len(ragged()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logprobs_of(again, rollout), logprobs_of(agent, rollout))
    merged = [one._published_weights() for one in (agent, again)]
    for name, tensor in merged[0].items():
        assert torch.equal(tensor.bfloat16(), merged[1][name].bfloat16()), name
