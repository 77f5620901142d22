"""Gemma 4's variants: towers for sound, and those that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import loss_of, optimizer_of, weights_of
from small_models import invent
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.gemma4.configuration_gemma4 import Gemma4AudioConfig

from vlmenv.agents.vlm import Sampling, VLMAgent
from vlmenv.core.errors import ModelError, PromptError
from vlmenv.core.rollout import Observation

pytestmark = pytest.mark.slow
ASKED: list[Observation] = [{"images": (), "prompt": "How many is 2 and 3?"}]


@pytest.fixture
def with_sound(tmp_path: Path) -> Path:
    """A model with a small tower for sound, as published small models have."""
    invent("gemma4", tmp_path)
    config: Any = AutoConfig.from_pretrained(tmp_path)
    config.audio_config = Gemma4AudioConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        output_proj_dims=16,
        subsampling_conv_channels=[4, 2],
    )
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    return tmp_path


def agent_of(folder: Path) -> VLMAgent:
    agent = VLMAgent.from_pretrained(folder, sampling=Sampling(max_new_tokens=4))
    agent.seed(0)
    return agent


def of_sound(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: one for name, one in weights.items() if "audio" in name}


def test_the_tower_for_sound_is_not_trained_and_is_saved(with_sound: Path, tmp_path: Path) -> None:
    agent = agent_of(with_sound)
    before = of_sound(weights_of(agent))
    assert len(before) > 10
    assert not of_sound({name: one for name, one in agent.policy.named_parameters() if one.requires_grad})
    optimizer = optimizer_of(agent)
    loss_of(agent, agent.rollout(ASKED)).backward()
    optimizer.step()
    agent.save(tmp_path / "saved")
    after = of_sound(weights_of(agent_of(tmp_path / "saved")))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], one) for name, one in before.items())


def test_it_gets_no_adapters(with_sound: Path) -> None:
    pytest.importorskip("peft")
    agent = agent_of(with_sound)
    agent.add_lora(rank=4, alpha=8, vision=True)
    trained = [name for name, one in agent.policy.named_parameters() if one.requires_grad]
    assert len(trained) > 10
    assert not any("audio" in name for name in trained)


def test_sound_and_films_are_refused_in_prompts(with_sound: Path) -> None:
    for token in ("<|audio|>", "<|audio>", "<audio|>", "<|video|>"):
        with pytest.raises(PromptError, match="control tokens"):
            agent_of(with_sound).encode([{"images": (), "prompt": f"What is {token} this?"}])


@pytest.mark.parametrize(
    ("part", "value", "told"),
    [
        (None, None, "has no vision tower"),
        ("text_config", {"use_bidirectional_attention": "all"}, "attends to later tokens"),
    ],
)
def test_other_variants_are_refused(part: str | None, value: Any, told: str, tmp_path: Path) -> None:
    invent("gemma4", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    if part is None:
        config["vision_config"] = None
    else:
        config[part] |= value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=told):
        agent_of(tmp_path)
