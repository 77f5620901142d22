"""Checkpoints, merged exports and adapters in plain vLLM: log-probabilities are those of transformers' plain pass."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from logits_elsewhere import logits
from safetensors.torch import load_file, save_file
from small_models import invent
from test_other_transformers import FAMILIES as ALL
from test_other_transformers import in_the_layout_of_4, inputs_of, merged_weights, trained

from vlmenv.agents.vlm import VLMAgent, find_model

pytestmark = pytest.mark.vllm
SCRIPT = Path(__file__).with_name("vllm_elsewhere.py")
TOLERANCE = 2e-5
"""of log-probabilities in float32, that vLLM and transformers compute by other kernels"""
WAYS = ("full", "lora", "vision lora")
TOKENS = {
    "internvl": {"image_seq_length": 4, "processor_class": "InternVLProcessor"},
    "smolvlm": {"image_seq_len": 4, "processor_class": "SmolVLMProcessor"},
}
"""What folders of published processors tell vLLM of the number of an image's tokens."""
REFUSED = {"internvl"}
"""Families of whose projector vLLM takes no adapters."""
WITHOUT = "vision lora without the option"
ROUNDED = "full in bf16"
OF_ROUNDED = ("builtin", "qwen2_5_vl")
"""Families with a checkpoint in bfloat16 too."""
FAMILIES = [one for one in ALL if one != "smolvlm" or importlib.util.find_spec("num2words")]
"""transformers' processor of SmolVLM, which vLLM asks for, needs num2words"""
Found = tuple[list[int], torch.Tensor]
"""The prompt's tokens, and the log-probability of each after the first."""


def adapted(base: Path, *, vision: bool) -> VLMAgent:
    """A model with adapters as of much training."""
    agent = VLMAgent.from_pretrained(base)
    torch.manual_seed(0)
    agent.add_lora(rank=8, alpha=16, vision=vision)
    for parameter in agent.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return agent


def make(family: str, place: Path) -> None:
    """Writes a family's base model, and what is saved and published of each way to train it."""
    base = place / "base"
    place.mkdir()
    if family == "builtin":
        base.symlink_to(find_model("builtin"))
    else:
        base.mkdir()
        invent(family, base, head=32)  # the least that vLLM's attention on CPUs has
        in_the_layout_of_4(base)
    if family in TOKENS:
        (base / "processor_config.json").write_text(json.dumps(TOKENS[family]))
    for way in WAYS:
        agent = adapted(base, vision="vision" in way) if "lora" in way else trained(base, way)
        save_file(merged_weights(agent), place / f"{way}.weights")
        agent.save_dtype = torch.float32
        agent.save(place / way)
        agent.publish(place / f"{way} published", dtype=torch.float32)
        if way == "full" and family in OF_ROUNDED:
            weights = {name: tensor.bfloat16().float() for name, tensor in merged_weights(agent).items()}
            save_file(weights, place / f"{ROUNDED}.weights")
            agent.save_dtype = torch.bfloat16
            agent.save(place / ROUNDED)
    save_file({name: tensor.contiguous() for name, tensor in inputs_of(agent).items()}, place / "inputs")
    image = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)  # as in inputs_of
    chat = agent.family.chat({"images": (image,), "prompt": "Locate the red circle."})
    ids = agent.family.processor.tokenizer.encode(chat, add_special_tokens=False)
    save_file({"ids": torch.tensor(ids), "image": torch.from_numpy(image)}, place / "prompt")


def expected(place: Path, way: str) -> Found:
    """By transformers alone: the base model's own files, with the trained weights put into them by name."""
    files = {"weights": str(place / f"{way}.weights"), "inputs": str(place / "inputs")}
    values = logits({"folder": str(place / "base"), "adapter": "", **files})[0, :-1].log_softmax(-1)
    ids = load_file(place / "inputs")["input_ids"][0]
    return ids.tolist(), values.gather(1, ids[1:, None])[:, 0]


def engine(place: Path, folder: str, *adapters: str, tower: bool = True, name: str | None = None) -> dict[str, Any]:
    """What to start vLLM with, and what to ask it: answers of a folder, or those with adapters on it."""
    asked = [
        {"out": str(place / f"{name or one}.json"), "adapter": str(place / one) if adapters else None}
        for one in adapters or [folder]
    ]
    start = {"folder": str(place / folder), "inputs": str(place / "prompt")}
    return start | {"adapters": bool(adapters), "tower": tower, "asked": asked}


def engines(place: Path) -> list[dict[str, Any]]:
    """An engine for each whole model, one for adapters, and one without vLLM's option for those of a vision tower.

    What vLLM refuses comes last, as it ends an engine.
    """
    names = ["full", "vision lora published", *[ROUNDED] * (place.name in OF_ROUNDED)]
    whole = [engine(place, name) for name in names]
    alone = engine(place, "base", "lora", "vision lora")
    return [*whole, alone, engine(place, "base", "vision lora", tower=False, name=WITHOUT)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a folder for each family, which holds what plain vLLM has found."""
    pytest.importorskip("peft")
    root = tmp_path_factory.mktemp("elsewhere")
    for family in FAMILIES:
        make(family, root / family)
    file = root / "engines.json"
    file.write_text(json.dumps([engine for family in FAMILIES for engine in engines(root / family)]))
    ended = subprocess.run([sys.executable, "-W", "ignore", SCRIPT, file], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return root


def found(place: Path, name: str) -> Found:
    if not (file := place / f"{name}.json").exists():
        pytest.fail("\n".join(f"{error.name}: {error.read_text()[-1500:]}" for error in place.glob("*.error")))
    answer = json.loads(file.read_text())
    return answer["ids"], torch.tensor(answer["logprobs"])


def difference(one: Found, right: Found) -> float:
    assert one[0] == right[0]
    return float((one[1] - right[1]).abs().max())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_exports_and_adapters_are_what_was_trained(family: str, way: str, made: Path) -> None:
    """Exports of models without adapters have the weights of the checkpoints, so vLLM is not asked again."""
    place = made / family
    right = expected(place, way)
    if not (family in REFUSED and way == "vision lora"):
        assert difference(found(place, way), right) < TOLERANCE
    if way == "vision lora":  # whose export has the adapters of both parts merged
        assert difference(found(place, f"{way} published"), right) < TOLERANCE
    if way == "full":
        saved, published = (place / name / "model.safetensors" for name in (way, f"{way} published"))
        assert saved.read_bytes() == published.read_bytes()
    other = "lora" if way == "full" else "full"
    assert difference(found(place, other), right) > 10 * TOLERANCE


@pytest.mark.parametrize("family", OF_ROUNDED)
def test_checkpoints_in_bfloat16_are_what_was_trained_rounded(family: str, made: Path) -> None:
    """As written with `--save-dtype bf16`; what this rounds away is beside the model, and not read."""
    place = made / family
    right = expected(place, ROUNDED)
    assert difference(found(place, ROUNDED), right) < TOLERANCE
    assert list((place / ROUNDED / "float32").iterdir())
    assert difference(found(place, "full"), right) > 10 * TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_the_vision_tower_need_a_setting_of_vllm(family: str, made: Path) -> None:
    place = made / family
    if family in REFUSED:
        assert "expected target modules in" in (place / f"{WITHOUT}.error").read_text()
        return
    assert difference(found(place, WITHOUT), expected(place, "vision lora")) > 10 * TOLERANCE
