from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from batches import logprobs_of, loss_of, observations, optimizer_of, rollout_of, train, weights_of
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from vlmenv.agents.vlm import Sampling, VLMAgent, find_model
from vlmenv.core.errors import ConfigError, ModelError

peft = pytest.importorskip("peft")


@pytest.fixture(params=["builtin", "qwen2_5_vl"])
def folder(request: pytest.FixtureRequest, qwen2_5_vl_folder: Path) -> Path:
    return qwen2_5_vl_folder if request.param == "qwen2_5_vl" else find_model("builtin")


def build(folder: str | Path, rank: int = 4, alpha: int = 8, dropout: float = 0.0, vision: bool = True) -> VLMAgent:
    torch.manual_seed(0)
    agent = VLMAgent.from_pretrained(folder, sampling=Sampling(0.8))
    agent.add_lora(rank=rank, alpha=alpha, dropout=dropout, vision=vision)
    return agent


@pytest.mark.parametrize("vision", [False, True])
def test_adapters_are_on_every_linear_layer_and_are_all_that_is_trained(folder: Path, vision: bool) -> None:
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    linear = {name for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)}
    wanted = {name for name in linear if "language_model.layers." in name or (vision and "visual." in name)}
    assert "model.visual.merger.linear_fc1" in wanted or "model.visual.merger.mlp.0" in wanted or not vision
    agent = build(folder, vision=vision)
    trained = {name for name, parameter in agent.policy.named_parameters() if parameter.requires_grad}
    assert trained == {f"model.{name}.lora_{part}.default.weight" for name in wanted for part in "AB"}
    assert len(agent.parameters()) == len(trained)
    assert agent.parameter_groups().keys() == ({"language", "vision"} if vision else {"language"})


def test_fresh_adapters_change_nothing(folder: Path) -> None:
    agent = VLMAgent.from_pretrained(folder, sampling=Sampling(0.8))
    rollout = rollout_of(agent)
    assert torch.equal(logprobs_of(build(folder), rollout), logprobs_of(agent, rollout))


def test_adapters_are_float32_over_bfloat16() -> None:
    agent = VLMAgent.from_pretrained("builtin", dtype=torch.bfloat16)
    agent.add_lora(rank=2, alpha=4)
    assert {parameter.dtype for parameter in agent.parameters()} == {torch.float32}
    assert {p.dtype for p in agent.policy.parameters() if not p.requires_grad} == {torch.bfloat16}
    train(agent, rollout_of(agent))


@pytest.mark.slow
def test_the_base_stays_as_it_is_and_is_the_reference(folder: Path) -> None:
    base = VLMAgent.from_pretrained(folder, sampling=Sampling(0.8))
    rollout = rollout_of(base)
    expected, agent = logprobs_of(base, rollout), build(folder)
    train(agent, rollout)
    for name, parameter in agent.family.model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, base.family.model.get_parameter(name.replace(".base_layer.", "."))), name
    adapted = logprobs_of(agent, rollout)
    assert (adapted - expected).abs().max() > 1e-3
    reference = agent.reference().logprobs(rollout).values
    torch.testing.assert_close(reference, expected, atol=1e-5, rtol=0)
    assert not reference.requires_grad
    assert torch.equal(logprobs_of(agent, rollout), adapted)
    assert all(parameter.requires_grad for parameter in agent.parameters())


@pytest.mark.slow
def test_adapters_are_on_again_after_an_error_in_the_reference(builtin: VLMAgent) -> None:
    rollout = rollout_of(builtin)
    agent = build("builtin")
    train(agent, rollout)
    adapted, trained = logprobs_of(agent, rollout), len(agent.parameters())
    with pytest.raises(AttributeError):
        agent.reference().logprobs(None)
    assert torch.equal(logprobs_of(agent, rollout), adapted)
    assert len(agent.parameters()) == trained


@pytest.mark.slow
def test_a_saved_model_has_the_adapters_merged_in(folder: Path, tmp_path: Path) -> None:
    agent = build(folder)
    rollout = rollout_of(agent)
    train(agent, rollout)
    before, values = weights_of(agent), logprobs_of(agent, rollout)
    agent.publish(tmp_path / "model", dtype=torch.float32)
    for name, tensor in weights_of(agent).items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(logprobs_of(agent, rollout), values)
    merged = VLMAgent.from_pretrained(tmp_path / "model", sampling=Sampling(0.8))
    torch.testing.assert_close(logprobs_of(merged, rollout), values, atol=1e-5, rtol=1e-5)
    assert merged.family.model.state_dict().keys() == VLMAgent.from_pretrained(folder).family.model.state_dict().keys()


@pytest.mark.slow
def test_saved_adapters_are_loaded_by_peft(folder: Path, tmp_path: Path) -> None:
    agent = build(folder)
    rollout = rollout_of(agent)
    train(agent, rollout)
    values = logprobs_of(agent, rollout)
    agent.save(tmp_path / "model")
    again = VLMAgent.from_pretrained(folder, sampling=Sampling(0.8))
    loaded = peft.PeftModel.from_pretrained(again.family.model, tmp_path / "model")
    assert loaded.peft_config["default"].base_model_name_or_path == str(find_model(folder))
    torch.testing.assert_close(logprobs_of(again, rollout), values, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_resuming_applies_adapters_once(folder: Path, tmp_path: Path) -> None:
    agent = build(folder)
    rollout, optimizer = rollout_of(agent), optimizer_of(agent)
    train(agent, rollout, optimizer)
    agent.save(tmp_path / "model")
    again = build(folder)
    again.load(tmp_path / "model")
    for name, tensor in weights_of(agent).items():
        assert torch.equal(again.family_policy.state_dict()[name], tensor), name
    assert torch.equal(logprobs_of(again, rollout), logprobs_of(agent, rollout))
    resumed = optimizer_of(again)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(agent, rollout, optimizer, steps=1)
    train(again, rollout, resumed, steps=1)
    assert torch.equal(logprobs_of(again, rollout), logprobs_of(agent, rollout))


@pytest.mark.slow
def test_adapters_do_not_go_onto_weights_that_have_them_already(builtin: VLMAgent, tmp_path: Path) -> None:
    agent = build("builtin")
    train(agent, rollout_of(builtin))
    agent.save(tmp_path / "model")
    agent.publish(tmp_path / "merged")
    with pytest.raises(ModelError, match=r"trained on other weights than those of .*builtin here"):
        build(tmp_path / "merged").load(tmp_path / "model")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"rank": 2}, r"adapter has r=4, the agent's r=2"),
        ({"alpha": 16}, r"adapter has lora_alpha=8, the agent's lora_alpha=16"),
        ({"vision": False}, r"the checkpoint does not fit this agent: \d+ weights .*visual"),
    ],
)
def test_adapters_of_another_make_are_refused(tmp_path: Path, other: dict[str, int], message: str) -> None:
    build("builtin").save(tmp_path / "model")
    agent = build("builtin", **other)
    before = weights_of(agent)
    with pytest.raises(ModelError, match=message):
        agent.load(tmp_path / "model")
    for name, tensor in weights_of(agent).items():
        assert torch.equal(tensor, before[name])


def test_adapters_on_one_side_alone_are_refused(builtin: VLMAgent, tmp_path: Path) -> None:
    adapted = build("builtin")
    builtin.save(tmp_path / "plain")
    adapted.save(tmp_path / "adapted")
    with pytest.raises(ModelError, match="the agent has adapter weights, which the checkpoint lacks"):
        adapted.load(tmp_path / "plain")
    with pytest.raises(ModelError, match="the checkpoint has adapter weights, which the agent lacks"):
        builtin.load(tmp_path / "adapted")


def test_a_checkpoint_of_an_earlier_version_is_named_with_what_to_do(tmp_path: Path) -> None:
    """It holds the merged model, and the adapters in a folder; both are models to start from."""
    agent = VLMAgent.from_pretrained("builtin")
    agent.add_lora(rank=2, alpha=4)
    agent.publish(tmp_path / "old")
    agent.save(tmp_path / "old" / "adapter")
    with pytest.raises(ModelError, match=f"earlier version.*cannot be resumed.*--model {tmp_path}/old/adapter"):
        agent.load(tmp_path / "old")
    assert VLMAgent.from_pretrained(tmp_path / "old").lora is None
    again = VLMAgent.from_pretrained(tmp_path / "old" / "adapter").lora
    assert again is not None
    assert again.numbers == (2, 4, 0.0)


def test_a_broken_adapter_is_refused(tmp_path: Path) -> None:
    agent = build("builtin")
    agent.save(tmp_path / "model")
    (tmp_path / "model" / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors: the weights cannot be read"):
        agent.load(tmp_path / "model")


def test_merging_rounds_once_in_bfloat16(tmp_path: Path) -> None:
    agent = VLMAgent.from_pretrained("builtin", dtype=torch.bfloat16)
    agent.add_lora(rank=2, alpha=8)
    train(agent, rollout_of(agent))
    agent.publish(tmp_path / "model", dtype=torch.bfloat16)
    name = "model.language_model.layers.0.mlp.up_proj"
    layer = agent.family.model.get_submodule(name)
    exact = (
        layer.base_layer.weight.double()
        + 4 * layer.lora_B.default.weight.double() @ layer.lora_A.default.weight.double()
    )
    assert torch.equal(load_file(tmp_path / "model" / "model.safetensors")[f"{name}.weight"], exact.bfloat16())


@pytest.mark.slow
def test_dropout_acts_only_where_there_is_gradient(builtin: VLMAgent) -> None:
    rollout = rollout_of(builtin)
    sure, agent = build("builtin"), build("builtin", dropout=0.5)
    for one in (sure, agent):
        torch.manual_seed(1)
        for parameter in one.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    agent.policy.train()
    sure.seed(3)
    agent.seed(3)
    assert agent.rollout(observations()).texts == sure.rollout(observations()).texts
    assert torch.equal(logprobs_of(agent, rollout), logprobs_of(sure, rollout))
    agent.policy.eval()
    assert (agent.logprobs(rollout).values - sure.logprobs(rollout).values).abs().max() > 0.1
    torch.manual_seed(2)
    first = loss_of(agent, rollout)
    torch.manual_seed(2)
    assert torch.equal(loss_of(agent, rollout), first)
    assert not torch.equal(loss_of(agent, rollout), first)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"alpha": 0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"LoRA needs .*{next(iter(wrong))}="):
        build("builtin", **wrong)


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r'pip install "vlmenv\[lora\]"'):
        build("builtin")
