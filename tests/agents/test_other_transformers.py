"""Checkpoints are loaded by other releases of transformers, and by peft, with the same logits.

The environment variable VLMENV_OTHER_TRANSFORMERS names folders with a release each, made by
`pip install --no-deps --target FOLDER …`, with a colon between them; `.ci/run` makes those of `.ci/transformers.txt`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import rollout_of, train
from safetensors.torch import load_file, save_file
from small_models import invent
from transformers import AutoModelForImageTextToText

from vlmenv.agents.vlm import VLMAgent, find_model

FAMILIES = ("builtin", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm")
WAYS = ("full", "frozen", "lora")
HERE = "this release"
SCRIPT = Path(__file__).with_name("logits_elsewhere.py")


def others() -> list[str]:
    return [folder for folder in os.environ.get("VLMENV_OTHER_TRANSFORMERS", "").split(":") if folder]


def in_the_layout_of_4(folder: Path) -> None:
    """Rewrites config.json as transformers 4 writes it, where it has no key `rope_parameters`."""
    config = json.loads((folder / "config.json").read_text())
    for part in (config, *(part for part in config.values() if isinstance(part, dict))):
        rope = part.pop("rope_parameters", None)
        if rope is None or part is config.get("vision_config"):
            continue
        part["rope_theta"] = rope.pop("rope_theta")
        kind = rope.pop("rope_type")
        part["rope_scaling"] = {"rope_type": kind, "type": "mrope" if rope else kind, **rope} if rope else None
    tied = config.setdefault("tie_word_embeddings", True)
    config["text_config"]["tie_word_embeddings"] = tied
    config["transformers_version"] = "4.57.6"
    (folder / "config.json").write_text(json.dumps(config, indent=4))


def inputs_of(agent: VLMAgent) -> dict[str, torch.Tensor]:
    """A prompt with an image, as transformers' models take it."""
    image = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
    prompt = agent.family.encode({"images": (image,), "prompt": "Locate the red circle."})
    ids = torch.from_numpy(prompt.input_ids)[None]
    images = dict(prompt.images)
    if agent.family.model_type == "smolvlm":
        crops = images["pixel_values"][:, 0]
        images = {"pixel_values": crops[None], "pixel_attention_mask": torch.ones(1, *crops.shape[:1], *crops.shape[2:]).long()}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images}
    if hasattr(agent.family.model.model, "get_rope_index"):
        inputs["mm_token_type_ids"] = (ids == agent.family.model.config.image_token_id).int()
    return inputs


def trained(base: Path, way: str) -> VLMAgent:
    agent = VLMAgent.from_pretrained(base)
    if way == "lora":
        torch.manual_seed(0)
        agent.add_lora(rank=4, alpha=8, vision=True)
    if way == "frozen":
        agent.freeze(vision=True, projector=True)
    train(agent, rollout_of(agent))
    return agent


def expected_of(agent: VLMAgent, base: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the base model with the trained weights put into it by name: no file of ours is read."""
    plain: Any = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
    state = agent.family.model.state_dict()
    plain.load_state_dict(state if agent.lora is None else agent.lora.merged(state))
    with torch.no_grad():
        return plain(**inputs).logits


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, str], torch.Tensor]]:
    """Trained models of all families and ways in folders, and the logits that they must give."""
    root, expected = tmp_path_factory.mktemp("elsewhere"), {}
    for family in FAMILIES:
        base = root / family / "base"
        base.parent.mkdir()
        if family == "builtin":
            base.symlink_to(find_model("builtin"))
        else:
            base.mkdir()
            invent(family, base)
            in_the_layout_of_4(base)
        for way in WAYS:
            agent = trained(base, way)
            inputs = inputs_of(agent)
            save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, root / family / "inputs.safetensors")
            expected[family, way] = expected_of(agent, base, inputs)
            agent.save_dtype = torch.float32
            agent.save(root / family / way)
            agent.publish(root / family / f"{way} merged", dtype=torch.float32)
        plain: Any = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
        with torch.no_grad():
            expected[family, "base"] = plain(**inputs).logits
    return root, expected


def logits_by(release: str, root: Path, jobs: Sequence[tuple[str, str, str | None]]) -> dict[tuple[str, str], torch.Tensor]:
    """Logits by a release of families' folders, some with adapters on them."""
    listed = [
        {
            "folder": str(root / family / folder),
            "adapter": None if adapter is None else str(root / family / adapter),
            "inputs": str(root / family / "inputs.safetensors"),
            "out": str(root / f"{family} {folder} {adapter}.out"),
        }
        for family, folder, adapter in jobs
    ]
    (root / "jobs.json").write_text(json.dumps(listed))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    path = {} if release == HERE else {"PYTHONPATH": release}
    command = [sys.executable, "-W", "ignore", str(SCRIPT), str(root / "jobs.json")]
    ended = subprocess.run(command, env=environment | path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return {
        (family, adapter or folder): load_file(one["out"])["logits"]
        for (family, folder, adapter), one in zip(jobs, listed, strict=True)
    }


def check(found: dict[tuple[str, str], torch.Tensor], expected: Callable[[str, str], torch.Tensor]) -> None:
    """Compares in float32: to 1e-5 of the largest logit."""
    for (family, what), logits in found.items():
        wanted = expected(family, what)
        difference = float((logits - wanted).abs().max())
        assert difference <= 1e-5 * float(wanted.abs().max()), f"{family}, {what}: {difference}"


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("release", [HERE, *others()] if others() else [HERE, pytest.param("", marks=pytest.mark.skip("VLMENV_OTHER_TRANSFORMERS names no folders of other releases"))])
def test_logits_are_the_same_in_other_releases(
    release: str, made: tuple[Path, dict[tuple[str, str], torch.Tensor]]
) -> None:
    """Of whole models, of adapters that are merged, and of adapters that peft puts onto the base model."""
    root, expected = made
    pytest.importorskip("peft")
    jobs: list[tuple[str, str, str | None]] = []
    for family in FAMILIES:
        jobs += [(family, "base", None), (family, "full", None), (family, "frozen", None)]
        jobs += [(family, f"{way} merged", None) for way in WAYS]
        jobs += [(family, "base", "lora")]
    check(logits_by(release, root, jobs), lambda family, what: expected[family, what.removesuffix(" merged")])
