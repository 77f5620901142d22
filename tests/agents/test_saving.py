from __future__ import annotations

import copy
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from batches import logprobs_of, observations, optimizer_of, rollout_of, train, weights_of
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

from vlmenv.agents import saving, vlm
from vlmenv.agents.vlm import Sampling, VLMAgent, find_model
from vlmenv.core.errors import CheckpointError, ModelError
from vlmenv.core.rollout import unbatch


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


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
@pytest.mark.parametrize("lora", [False, True])
def test_files_have_the_permissions_of_new_files(mask: int, mode: int, lora: bool, tmp_path: Path) -> None:
    agent, former = build("builtin", lora, value_head=True), os.umask(mask)
    try:
        agent.save(tmp_path / "model")
    finally:
        os.umask(former)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "model").rglob("*") if file.is_file()} == {mode}


@pytest.fixture
def base(folder: Path, tmp_path: Path) -> Path:
    """A published model in bfloat16 with generation settings, a licence and a sentencepiece file of its own."""
    base = tmp_path / "base"
    shutil.copytree(folder, base)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    (base / "config.json").write_text(json.dumps(config, indent=4))  # in a layout of its own
    generation = {
        "do_sample": True,
        "temperature": 1e-6,
        "repetition_penalty": 1.5,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    (base / "generation_config.json").write_text(json.dumps(generation))
    (base / "LICENSE").write_text("Free.")
    (base / "tokenizer.model").write_bytes(b"\x00\x01")
    (base / "manifest.json").write_text("{}")
    return base


def test_what_training_does_not_change_stays_as_it_came(base: Path, tmp_path: Path) -> None:
    agent = VLMAgent.from_pretrained(base, sampling=Sampling(0.8))
    train(agent, rollout_of(agent), steps=1)
    agent.save(tmp_path / "model")
    changed = {"model.safetensors", "generation_config.json", "manifest.json", "model.safetensors.index.json"}
    for file in {file.name for file in base.iterdir()} - changed:
        assert (tmp_path / "model" / file).read_bytes() == (base / file).read_bytes(), file
    assert {file.name for file in (tmp_path / "model").iterdir()} == (
        {file.name for file in base.iterdir()} - {"manifest.json"} | {"float32", "generation_config.base.json"}
    )


def test_weights_are_in_the_bases_type_on_disk_and_exact_all_the_same(base: Path, tmp_path: Path) -> None:
    agent = VLMAgent.from_pretrained(base, sampling=Sampling(0.8))
    agent.freeze(vision=True, projector=True)
    train(agent, rollout_of(agent))
    agent.save(tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    for name, tensor in agent._published_weights().items():
        assert torch.equal(stored[name], tensor.bfloat16()), name
    lost = load_file(tmp_path / "model" / "float32" / "model.safetensors")
    assert lost
    assert not [name for name in lost if "visual" in name]  # frozen: nothing is lost
    again = VLMAgent.from_pretrained(tmp_path / "model").family.model.state_dict()
    for name, tensor in agent.family.model.state_dict().items():
        assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_type_changes_the_configuration_in_nothing_else(base: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    agent = VLMAgent.from_pretrained(base)
    agent.save_dtype = dtype
    agent.save(tmp_path / "model")
    name = str(dtype).removeprefix("torch.")
    text = (base / "config.json").read_text()
    expected = re.sub(r'"dtype": "(float32|float16|bfloat16)"', f'"dtype": "{name}"', text)
    assert expected != text
    assert (tmp_path / "model" / "config.json").read_text() == expected
    assert {tensor.dtype for tensor in load_file(tmp_path / "model" / "model.safetensors").values()} == {dtype}
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype="auto")
    assert plain.dtype == dtype


@pytest.mark.slow
def test_generate_answers_as_was_trained_and_measured(tmp_path: Path) -> None:
    """The base model's penalty of repetitions, which would give other answers, is set aside."""
    base = tmp_path / "base"
    shutil.copytree(find_model("builtin"), base)
    settings = {"do_sample": True, "temperature": 1e-6, "repetition_penalty": 9.0, "eos_token_id": 2, "pad_token_id": 0}
    (base / "generation_config.json").write_text(json.dumps(settings))
    agent = VLMAgent.from_pretrained(base, sampling=Sampling(0.8, max_new_tokens=24, top_k=5, top_p=0.9))
    agent.save(tmp_path / "model")
    shown = unbatch(observations(4, 1))
    measured = agent.act(shown)

    def generated(folder: Path, **arguments: object) -> list[str]:
        plain, answers = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32), []
        for one in shown:
            prompt = agent.family.encode(one)
            ids = torch.from_numpy(prompt.input_ids)[None]
            types = (ids == plain.config.image_token_id).int()
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}
            output = plain.generate(**inputs, **prompt.images, max_new_tokens=24, **arguments)
            answers.append(agent.family.decode(output[0, ids.shape[1] :].numpy()))
        return answers

    assert generated(tmp_path / "model", do_sample=False) == measured
    assert generated(base, do_sample=False) != measured
    read = GenerationConfig.from_pretrained(tmp_path / "model")
    assert (read.do_sample, read.temperature, read.top_k, read.top_p) == (True, 0.8, 5, 0.9)
    assert read.repetition_penalty in (None, 1.0)
    assert read.eos_token_id == [2]
    assert (tmp_path / "model/generation_config.base.json").read_bytes() == (
        base / "generation_config.json"
    ).read_bytes()
    again = VLMAgent.from_pretrained(tmp_path / "model")
    again.save(tmp_path / "third")
    assert json.loads((tmp_path / "third/generation_config.base.json").read_text()) == settings


def test_all_tokens_are_sampled_among_unless_asked_otherwise(builtin: VLMAgent, tmp_path: Path) -> None:
    """Transformers' default is the 50 most likely ones."""
    builtin.save(tmp_path / "model")
    read = GenerationConfig.from_pretrained(tmp_path / "model")
    assert (read.do_sample, read.temperature, read.top_k, read.top_p) == (True, 1.0, 0, 1.0)


def test_a_model_that_would_be_saved_otherwise_than_it_came_is_found_without_saving(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = VLMAgent.from_pretrained(base)
    agent.check_saving()
    agent.add_lora(rank=2, alpha=2)
    agent.check_saving()
    revert = saving.convert_back

    def renamed(model: object, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name.replace("visual", "vision"): tensor for name, tensor in revert(model, state).items()}

    monkeypatch.setattr(saving, "convert_back", renamed)
    with pytest.raises(CheckpointError, match=r"could not be saved as they came: \d+ would get names .*vision"):
        agent.check_saving()


def test_a_model_that_was_made_in_memory_is_saved_with_its_own_configuration(tmp_path: Path) -> None:
    """The folder beside it lends it the processor alone."""
    source = VLMAgent.from_pretrained("builtin")
    config = AutoConfig.from_pretrained(find_model("builtin"))
    config.text_config.num_hidden_layers = 1
    made = AutoModelForImageTextToText.from_config(config).float()
    agent = VLMAgent(type(source.family)(made, source.family.processor), source.folder)
    agent.check_saving()
    agent.save(tmp_path / "model")
    again = VLMAgent.from_pretrained(tmp_path / "model").family.model.state_dict()
    assert again.keys() == made.state_dict().keys()
    for name, tensor in made.state_dict().items():
        assert torch.equal(again[name], tensor), name
