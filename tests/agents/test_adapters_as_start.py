"""Adapters in peft's format as the model: evaluated as they are, and trained further."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import logprobs_of, rollout_of, train
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from vlmenv.agents.vlm import Sampling, VLMAgent, find_model
from vlmenv.building import adapt
from vlmenv.core.errors import ConfigError, ModelError
from vlmenv.options.train import AdaptationOptions

pytestmark = pytest.mark.usefixtures("without_pictures")

peft = pytest.importorskip("peft")


@pytest.fixture(params=["builtin", "qwen2_5_vl"])
def base(request: pytest.FixtureRequest, qwen2_5_vl_folder: Path) -> Path:
    return qwen2_5_vl_folder if request.param == "qwen2_5_vl" else find_model("builtin")


def somebodys(folder: Path, base: Path, **changes: Any) -> Path:
    """Adapters that peft alone has made, with weights that change the model."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 3, "lora_alpha": 5, "target_modules": r".*language_model.*\.(q_proj|down_proj)"} | changes
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    return folder


def by_peft(folder: Path, base: Path) -> Any:
    return peft.PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval(), folder
    )


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(7, 60)[None]
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def load(folder: Path) -> VLMAgent:
    return VLMAgent.from_pretrained(folder, sampling=Sampling(0.8))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 9}},
    ],
)
def test_they_are_what_peft_makes_of_them_merged_or_not(base: Path, changes: dict[str, Any], tmp_path: Path) -> None:
    folder = somebodys(tmp_path / "adapter", base, **changes)
    agent, expected = load(folder), logits(by_peft(folder, base))
    assert (agent.folder, agent.adapter) == (base, folder)
    torch.testing.assert_close(logits(agent.family.model), expected, atol=1e-4, rtol=1e-5)
    agent.publish(tmp_path / "merged", dtype=torch.float32)
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-5)
    assert (logits(AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)) - expected).abs().max() > 0.1


@pytest.mark.slow
def test_they_are_trained_further_with_their_own_rank_and_layers(base: Path, tmp_path: Path) -> None:
    folder = somebodys(tmp_path / "adapter", base)
    agent = load(folder)
    adapt(agent, AdaptationOptions())
    rollout = rollout_of(agent)
    train(agent, rollout)
    agent.save(tmp_path / "trained")
    before, after = (load_file(one / "adapter_model.safetensors") for one in (folder, tmp_path / "trained"))
    assert before.keys() == after.keys()
    assert all(before[name].shape == after[name].shape for name in before)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert not list((tmp_path / "trained").glob("model*.safetensors"))
    torch.testing.assert_close(
        logits(by_peft(tmp_path / "trained", base)), logits(agent.family.model), atol=1e-4, rtol=1e-5
    )
    again = load(folder)
    again.load(tmp_path / "trained")
    assert torch.equal(logprobs_of(again, rollout), logprobs_of(agent, rollout))


@pytest.mark.slow
def test_the_reference_is_the_model_with_the_adapters_that_training_began_with(tmp_path: Path) -> None:
    agent = load(somebodys(tmp_path / "adapter", find_model("builtin")))
    rollout = rollout_of(agent)
    before, reference = logprobs_of(agent, rollout), agent.reference()
    train(agent, rollout)
    after = logprobs_of(agent, rollout)
    torch.testing.assert_close(reference.logprobs(rollout).values, before, atol=1e-6, rtol=0)
    assert (after - before).abs().max() > 1e-3
    assert torch.equal(logprobs_of(agent, rollout), after)


def test_with_shards_such_a_reference_is_refused(tmp_path: Path) -> None:
    agent = load(somebodys(tmp_path / "adapter", find_model("builtin")))
    agent.sharded = True
    with pytest.raises(ConfigError, match="merge the adapters by `vlmenv export --merged`"):
        agent.reference()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": 4}, r"with lora_rank 3, not 4, lora_alpha 5, not 8"),
        ({"lora_rank": 3, "lora_alpha": 5, "lora_vision": True}, r"lora_vision False, not True"),
        ({"freeze_vision": True}, r"LoRA freezes the whole model already"),
    ],
)
def test_other_adapters_are_not_asked_for(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    agent = load(somebodys(tmp_path / "adapter", find_model("builtin")))
    adapt(agent, AdaptationOptions(lora_rank=3, lora_alpha=5))  # the same ones
    with pytest.raises(ConfigError, match=message):
        adapt(agent, AdaptationOptions(**options))


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"peft_type": "IA3"}, "of type IA3"),
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, r"modules that are saved whole \(modules_to_save\)"),
        ({"bias": "all"}, r"trained biases \(bias=all\)"),
        ({"init_lora_weights": "pissa_niter_4"}, "adapters by pissa_niter_4, which changes the base model"),
    ],
)
def test_other_kinds_are_refused_by_name(changes: dict[str, Any], kind: str, tmp_path: Path) -> None:
    folder = somebodys(tmp_path / "adapter", find_model("builtin"))
    config = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"only plain LoRA adapters can be trained further, not {kind}: merge them"):
        load(folder)


def test_the_base_model_is_found_or_asked_for(tmp_path: Path) -> None:
    """By its path, from the present folder or from that of the adapters."""
    folder = somebodys(tmp_path / "adapter", find_model("builtin"))

    def named(name: str | None) -> Path:
        config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": name}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return find_model(folder)

    shutil.copytree(find_model("builtin"), tmp_path / "model")
    assert named("../model").resolve() == tmp_path / "model"
    for name, message in {
        "/nowhere/model": "base model is not found: /nowhere/model: no such model folder. Write the folder",
        None: "base model is not named",
        str(folder): "is an adapter itself",
    }.items():
        with pytest.raises(ModelError, match=message):
            named(name)


def test_adapters_of_another_model_do_not_fit(tmp_path: Path, qwen2_5_vl_folder: Path) -> None:
    folder = somebodys(tmp_path / "adapter", qwen2_5_vl_folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(find_model("builtin"))
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="does not fit this agent"):
        load(folder)
