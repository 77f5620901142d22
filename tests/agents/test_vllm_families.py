"""The newer families through the real vLLM: weights under their published names, and answers as the trainer's model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import logprobs_of, ragged
from conversations import after, image
from safetensors.torch import load_file, save_file
from small_models import PROCESSORS, invent, tell_processor

from vlmenv.agents.engines.vllm import VLLMEngine
from vlmenv.agents.families.gemma3 import Gemma3
from vlmenv.agents.vlm import Sampling, VLMAgent
from vlmenv.core.errors import EngineError
from vlmenv.core.rollout import IMAGE_MARK, Observation, Rollout

pytestmark = pytest.mark.vllm
TOLERANCE = 1e-4
"""of log-probabilities"""
FORMER_NAMES = {"gemma3", "llava_onevision"}
"""Families whose published files name the vision tower as transformers 4 does, which vLLM asks for."""
MOST_IMAGES = {"llava_onevision": 1, "gemma4": 0}
"""vLLM reads several images of LLaVA-OneVision's prompts otherwise than the published processor, and its features of
Gemma 4's images are others."""
UNABLE = {
    **dict.fromkeys(("glm4v_moe", "internvl qwen3_moe", "gemma4 experts"), "failed to take over the weights"),
    "qwen3_5": "CPU GDN attention requires BF16",
    "qwen3_5_moe": "failed to take over the weights",
}
"""What vLLM for CPUs says where it cannot: it packs experts' weights and takes no new ones, and its delta rule there is
for bfloat16 alone."""
LEFT_OUT = {"glm46v"}
"""vLLM has no code of its own for it, takes transformers', and changes its classes in this process."""


def make(family: str, folder: Path) -> VLMAgent:
    invent(family, folder, head=32)  # the least that vLLM's attention on CPUs has
    tell_processor(family, folder)
    if family in FORMER_NAMES:
        weights = load_file(folder / "model.safetensors")
        named = {name.replace("vision_tower.", "vision_tower.vision_model."): one for name, one in weights.items()}
        save_file(named, folder / "model.safetensors", {"format": "pt"})
    agent = VLMAgent.from_pretrained(folder, sampling=Sampling(max_new_tokens=8))
    agent.seed(0)
    return agent


def asked(agent: VLMAgent) -> list[Observation]:
    shown = [one | {"prompt": IMAGE_MARK * len(one["images"]) + one["prompt"]} for one in ragged()]
    return [one for one in shown if len(one["images"]) <= most_images(agent)]


def later(agent: VLMAgent) -> list[Observation]:
    """A second turn, with an image where there may be one more."""
    more = [[image(7, 64, 96)] if len(one["images"]) < most_images(agent) else [] for one in asked(agent)]
    return [after(one, "?", "And here?", *images) for one, images in zip(asked(agent), more, strict=True)]


def most_images(agent: VLMAgent) -> int:
    return MOST_IMAGES.get(agent.family.model_type, 9)


def by(agent: VLMAgent, engine: VLLMEngine | None, sampling: Sampling) -> Rollout:
    """Episodes of two turns."""
    former = agent.engine, agent.sampling
    agent.engine, agent.sampling = engine, sampling
    try:
        return agent.proceed(agent.rollout(asked(agent)), later(agent))
    finally:
        agent.engine, agent.sampling = former


def assert_in_step(agent: VLMAgent, engine: VLLMEngine) -> None:
    """Greedy answers are those of the trainer's model, and what is sampled has its log-probabilities."""
    greedy = replace(agent.sampling, temperature=0.0)
    ours, theirs = by(agent, None, greedy), by(agent, engine, greedy)
    assert [one.token_ids.tolist() for one in theirs.completions] == [
        one.token_ids.tolist() for one in ours.completions
    ]
    for rollout in (theirs, by(agent, engine, agent.sampling)):
        expected = logprobs_of(agent, rollout).numpy()
        for row, completion in enumerate(rollout.completions if rollout.temperature else ()):
            found = completion.logprobs
            np.testing.assert_allclose(found, expected[row, : len(found)], atol=TOLERANCE)


@contextmanager
def started(agent: VLMAgent) -> Iterator[VLLMEngine]:
    device = torch.device("cpu")
    engine = VLLMEngine(agent.folder, agent.family, device=device, dtype=torch.float32, max_length=1024)
    try:
        agent.engine = engine
        yield engine
    finally:
        engine.close()


@pytest.mark.parametrize("family", [one for one in PROCESSORS if one not in {"qwen2_5_vl", *UNABLE, *LEFT_OUT}])
def test_a_family_in_vllm_is_in_step(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after an update of all weights, which an engine that missed any would not follow.

    On CPUs vLLM's attention looks back alone, so Gemma 3 does so here too.
    """
    monkeypatch.setattr(Gemma3, "sees_both_ways", frozenset())
    agent = make(family, tmp_path)
    with started(agent) as engine:
        agent.sync()
        assert_in_step(agent, engine)
        with torch.no_grad():
            for parameter in agent.parameters():
                parameter.mul_(1.05)
        agent.sync()
        assert_in_step(agent, engine)


@pytest.mark.parametrize("family", UNABLE)
def test_what_vllm_for_cpus_cannot_do_is_told(family: str, tmp_path: Path) -> None:
    agent = make(family, tmp_path)

    def go() -> None:
        agent.sync()
        agent.rollout(asked(agent))

    with started(agent), pytest.raises(EngineError, match=UNABLE[family]):
        go()
