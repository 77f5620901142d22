from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from batches import logprobs_of, observations, optimizer_of, rollout_of, train, weights_of
from transformers import AutoModelForImageTextToText

from vlmenv.agents import saving, vlm
from vlmenv.agents.vlm import Sampling, VLMAgent, find_model
from vlmenv.core.errors import ModelError


@pytest.fixture(params=["builtin", "qwen2_5_vl"])
def folder(request: pytest.FixtureRequest, qwen2_5_vl_folder: Path) -> Path:
    return qwen2_5_vl_folder if request.param == "qwen2_5_vl" else find_model("builtin")


def build(folder: Path | str, lora: bool = False, value_head: bool = False) -> VLMAgent:
    agent = VLMAgent.from_pretrained(folder, sampling=Sampling(0.8))
    if lora:
        pytest.importorskip("peft")
        agent.add_lora(rank=4, alpha=8)
    if value_head:
        agent.add_value_head()
    return agent


@pytest.mark.slow
@pytest.mark.parametrize(("lora", "value_head"), [(False, False), (False, True), (True, True)])
def test_training_goes_on_from_a_checkpoint_as_if_undisturbed(
    folder: Path, tmp_path: Path, lora: bool, value_head: bool
) -> None:
    agent = build(folder, lora, value_head)
    rollout, optimizer = rollout_of(agent), optimizer_of(agent)
    train(agent, rollout, optimizer)
    agent.save(tmp_path / "model")
    again = build(folder, lora, value_head)
    again.load(tmp_path / "model")
    resumed = optimizer_of(again)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for steps in (0, 1):
        train(agent, rollout, optimizer, steps)
        train(again, rollout, resumed, steps)
        for name, tensor in weights_of(agent).items():
            assert torch.equal(again.family_policy.state_dict()[name], tensor), name
        assert torch.equal(logprobs_of(again, rollout), logprobs_of(agent, rollout))


@pytest.mark.slow
def test_sampling_goes_on_from_a_state(builtin: VLMAgent) -> None:
    builtin.seed(1)
    builtin.rollout(observations())
    state = builtin.rng_state()
    expected = builtin.rollout(observations()).texts
    assert builtin.rollout(observations()).texts != expected
    again = build("builtin")
    again.sampling = builtin.sampling
    again.set_rng_state(state)
    assert again.rollout(observations()).texts == expected


def test_the_folder_of_a_critic_is_still_the_published_layout(builtin: VLMAgent, tmp_path: Path) -> None:
    """Servers read every safetensors file beside the weights, so the value head is not there."""
    builtin.add_value_head()
    builtin.save(tmp_path / "model")
    assert [file.name for file in (tmp_path / "model").glob("*.safetensors")] == ["model.safetensors"]
    assert (tmp_path / "model" / "value_head" / "value_head.safetensors").is_file()
    _, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not report["unexpected_keys"]


def test_a_gathered_state_is_written_in_place_of_the_policys_own(builtin: VLMAgent, tmp_path: Path) -> None:
    builtin.add_value_head()
    gathered = {name: tensor + 1 for name, tensor in weights_of(builtin).items()}
    builtin.save(tmp_path / "model", gathered)
    builtin.load(tmp_path / "model")
    for name, tensor in builtin.family_policy.state_dict().items():
        assert torch.equal(tensor, gathered[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_large_models_are_written_in_several_files(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: bool
) -> None:
    monkeypatch.setattr(saving, "_LARGEST", "100KB")
    agent = build(folder, lora)
    rollout = rollout_of(agent)
    train(agent, rollout)
    agent.save(tmp_path / "model")
    agent.publish(tmp_path / "published", dtype=torch.float32)
    for name in {"published", "published" if lora else "model"}:
        assert len(list((tmp_path / name).glob("model-*-of-*.safetensors"))) > 2
        AutoModelForImageTextToText.from_pretrained(tmp_path / name)
    whole = VLMAgent.from_pretrained(tmp_path / "model", sampling=Sampling(0.8))
    torch.testing.assert_close(logprobs_of(whole, rollout), logprobs_of(agent, rollout), atol=1e-5, rtol=1e-5)
    again = build(folder, lora)
    again.load(tmp_path / "model")
    assert torch.equal(logprobs_of(again, rollout), logprobs_of(agent, rollout))


@pytest.mark.slow
def test_a_save_that_fails_leaves_what_was_there(
    builtin: VLMAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builtin.save(tmp_path / "model")
    before, generation = weights_of(builtin), builtin.family.model.generation_config

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(vlm, "write_settings", full)
    train(builtin, rollout_of(builtin))
    with pytest.raises(OSError, match="No space left"):
        builtin.save(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert builtin.family.model.generation_config is generation
    builtin.load(tmp_path / "model")
    for name, tensor in weights_of(builtin).items():
        assert torch.equal(tensor, before[name])


def test_checkpoints_of_another_build_are_refused(builtin: VLMAgent, qwen2_5_vl_folder: Path, tmp_path: Path) -> None:
    critic = build("builtin", value_head=True)
    critic.save(tmp_path / "critic")
    builtin.save(tmp_path / "plain")
    before = weights_of(builtin)
    with pytest.raises(ModelError, match="the checkpoint has value head weights, which the agent lacks"):
        builtin.load(tmp_path / "critic")
    with pytest.raises(ModelError, match="the agent has value head weights, which the checkpoint lacks"):
        critic.load(tmp_path / "plain")
    with pytest.raises(ModelError, match="the checkpoint does not fit this agent"):
        builtin.load(qwen2_5_vl_folder)
    with pytest.raises(ModelError, match="cannot be read"):
        builtin.load(tmp_path / "none")
    for name, tensor in weights_of(builtin).items():
        assert torch.equal(tensor, before[name])
