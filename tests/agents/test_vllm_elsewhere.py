"""Checkpoints, merged exports and adapters in plain vLLM: log-probabilities are those of transformers' plain pass."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import rollout_of, train
from logits_elsewhere import logits
from safetensors.torch import save_file
from test_other_transformers import inputs_of, merged_weights

from vlmenv.agents.vlm import VLMAgent, find_model

pytestmark = pytest.mark.vllm
SCRIPT = Path(__file__).with_name("vllm_elsewhere.py")
TOLERANCE = 2e-5
"""of log-probabilities in float32, that vLLM and transformers compute by other kernels"""


@pytest.fixture(scope="module", params=["builtin", "qwen2_5_vl"])
def base(request: pytest.FixtureRequest, qwen2_5_vl_folder: Path) -> Path:
    return qwen2_5_vl_folder if request.param == "qwen2_5_vl" else find_model("builtin")


def trained(base: Path, **lora: Any) -> VLMAgent:
    agent = VLMAgent.from_pretrained(base)
    torch.manual_seed(0)
    if lora:
        agent.add_lora(rank=8, alpha=16, **lora)
        for parameter in agent.parameters():  # as of much training
            torch.nn.init.normal_(parameter, std=0.1)
    train(agent, rollout_of(agent))
    return agent


def expected(agent: VLMAgent, base: Path, place: Path) -> tuple[list[int], torch.Tensor]:
    """By transformers alone: the base model's own files, with the trained weights put into them by name."""
    inputs = inputs_of(agent)
    save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, place / "inputs")
    save_file(merged_weights(agent), place / "weights")
    job = {"folder": str(base), "adapter": "", "weights": str(place / "weights"), "inputs": str(place / "inputs")}
    ids = inputs["input_ids"][0]
    values = logits(job)[0, :-1].log_softmax(-1)
    return ids.tolist(), values.gather(1, ids[1:, None])[:, 0]


def write_prompt(agent: VLMAgent, place: Path) -> Path:
    """The prompt of `inputs_of` as vLLM takes it."""
    image = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
    chat = agent.family.chat({"images": (image,), "prompt": "Locate the red circle."})
    ids = agent.family.processor.tokenizer.encode(chat, add_special_tokens=False)
    save_file({"ids": torch.tensor(ids), "image": torch.from_numpy(image)}, place / "prompt")
    return place / "prompt"


def by_vllm(place: Path, prompt: Path, *jobs: dict[str, Any]) -> list[tuple[list[int], torch.Tensor]]:
    """What plain vLLM finds, one process a job, because an engine keeps its process."""
    found = []
    for number, job in enumerate(jobs):
        asked = {"adapter": None, "tower": False, "inputs": str(prompt), "out": str(place / f"{number}.json")} | job
        file = place / f"job-{number}.json"
        file.write_text(json.dumps([asked]))
        ended = subprocess.run([sys.executable, "-W", "ignore", SCRIPT, file], capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr[-3000:]
        answer = json.loads(Path(asked["out"]).read_text())
        found.append((answer["ids"], torch.tensor(answer["logprobs"])))
    return found


def difference(found: tuple[list[int], torch.Tensor], right: tuple[list[int], torch.Tensor]) -> float:
    assert found[0] == right[0]
    return float((found[1] - right[1]).abs().max())


def test_a_checkpoint_of_all_weights(base: Path, tmp_path: Path) -> None:
    agent = trained(base)
    agent.save_dtype = torch.float32
    agent.save(tmp_path / "saved")
    agent.publish(tmp_path / "published", dtype=torch.float32)
    right = expected(agent, base, tmp_path)
    jobs = [{"folder": str(folder)} for folder in (tmp_path / "saved", tmp_path / "published", base)]
    *own, untrained = by_vllm(tmp_path, write_prompt(agent, tmp_path), *jobs)
    assert [difference(one, right) < TOLERANCE for one in own] == [True, True]
    assert difference(untrained, right) > 10 * TOLERANCE


def test_adapters_of_the_language_model_merged_and_alone(base: Path, tmp_path: Path) -> None:
    agent = trained(base, vision=False)
    agent.save(tmp_path / "saved")
    agent.publish(tmp_path / "published", dtype=torch.float32)
    right = expected(agent, base, tmp_path)
    jobs = [{"folder": str(tmp_path / "published")}, {"folder": str(base), "adapter": str(tmp_path / "saved")}]
    for found in by_vllm(tmp_path, write_prompt(agent, tmp_path), *jobs):
        assert difference(found, right) < TOLERANCE


def test_adapters_of_the_vision_tower_are_merged_or_need_a_setting_of_vllm(base: Path, tmp_path: Path) -> None:
    agent = trained(base, vision=True)
    agent.save(tmp_path / "saved")
    agent.publish(tmp_path / "published", dtype=torch.float32)
    right = expected(agent, base, tmp_path)
    alone = {"folder": str(base), "adapter": str(tmp_path / "saved")}
    jobs = [{"folder": str(tmp_path / "published")}, alone, alone | {"tower": True}]
    found = by_vllm(tmp_path, write_prompt(agent, tmp_path), *jobs)
    assert difference(found[0], right) < TOLERANCE
    assert difference(found[1], right) > 10 * TOLERANCE
    assert difference(found[2], right) < TOLERANCE
