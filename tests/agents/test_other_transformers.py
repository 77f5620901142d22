"""Checkpoints are loaded by other releases of transformers, and by peft, with the same logits.

The environment variable VLMENV_OTHER_TRANSFORMERS names folders with a release each, made by
`pip install --no-deps --target FOLDER …`, with a colon between them; `.ci/run` makes those of `.ci/transformers.txt`.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import rollout_of, train
from safetensors.torch import load_file, save_file
from small_models import invent

from vlmenv.agents.vlm import VLMAgent, find_model

FAMILIES = ("builtin", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm")
WAYS = ("full", "frozen", "lora")
SEE_OTHERWISE = {"smolvlm"}
"""Families of which transformers 4 computes other features of images."""
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
        images = {
            "pixel_values": crops[None],
            "pixel_attention_mask": torch.ones(1, *crops.shape[:1], *crops.shape[2:]).long(),
        }
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


def merged_weights(agent: VLMAgent) -> dict[str, torch.Tensor]:
    """The trained weights by the model's own names: nothing that is saved is asked."""
    state = agent.family.model.state_dict()
    whole = state if agent.lora is None else agent.lora.merged(state)
    return {name: tensor.clone() for name, tensor in whole.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with trained models of all families and ways, saved and published, and with their weights alone."""
    pytest.importorskip("peft")
    root = tmp_path_factory.mktemp("elsewhere")
    for family in FAMILIES:
        folder = root / family
        base = folder / "base"
        folder.mkdir()
        if family == "builtin":
            base.symlink_to(find_model("builtin"))
        else:
            base.mkdir()
            invent(family, base)
            in_the_layout_of_4(base)
        for way in WAYS:
            agent = trained(base, way)
            save_file(merged_weights(agent), folder / f"{way}.weights")
            agent.save_dtype = torch.float32
            agent.save(folder / way)
            agent.publish(folder / f"{way} published", dtype=torch.float32)
        save_file({name: tensor.contiguous() for name, tensor in inputs_of(agent).items()}, folder / "inputs")
    return root


class Logits:
    """Logits by a release of transformers, in a process of its own.

    Args:
        release: Folder with the release; `HERE`: the one that is installed.
        root: Folder of `made`.
    """

    def __init__(self, release: str, root: Path) -> None:
        self.release, self.root = release, root
        self.jobs: dict[tuple[str, str], dict[str, str | None]] = {}

    def ask(self, family: str, name: str, model: str, adapter: str | None = None, weights: str | None = None) -> None:
        """Asks for those of a family's model, with adapters of peft's or other weights put into it."""
        place = self.root / family
        self.jobs[family, name] = {
            "folder": str(place / model),
            "adapter": None if adapter is None else str(place / adapter),
            "weights": None if weights is None else str(place / weights),
            "inputs": str(place / "inputs"),
            "out": str(place / f"{name}.logits"),
        }

    def find(self) -> dict[tuple[str, str], torch.Tensor]:
        file = self.root / "jobs.json"
        file.write_text(json.dumps(list(self.jobs.values())))
        path = {"PYTHONPATH": "" if self.release == HERE else self.release}
        command = [sys.executable, "-W", "ignore", str(SCRIPT), str(file)]
        ended = subprocess.run(command, env=os.environ | path, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr[-3000:]
        return {key: load_file(str(job["out"]))["logits"] for key, job in self.jobs.items()}


@pytest.fixture(scope="module")
def expected(made: Path) -> dict[tuple[str, str], torch.Tensor]:
    """By the installed release: the base model with the trained weights put into it by name."""
    logits = Logits(HERE, made)
    for family, way in itertools.product(FAMILIES, WAYS):
        logits.ask(family, way, "base", weights=f"{way}.weights")
    return logits.find()


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    return float((a - b).abs().max() / b.abs().max())


OTHERS = others() or [pytest.param("", marks=pytest.mark.skip("VLMENV_OTHER_TRANSFORMERS names no other releases"))]


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("release", [HERE, *OTHERS])
def test_logits_are_the_same_in_other_releases(
    release: str, made: Path, expected: dict[tuple[str, str], torch.Tensor]
) -> None:
    """Of checkpoints, of what is published with adapters merged, and of adapters that peft puts onto the base model."""
    logits = Logits(release, made)
    for family, way in itertools.product(FAMILIES, WAYS):
        logits.ask(family, f"{way} by name", "base", weights=f"{way}.weights")
        logits.ask(family, f"{way} published", f"{way} published")
        if way == "lora":
            logits.ask(family, f"{way} saved", "base", adapter=way)
        else:
            logits.ask(family, f"{way} saved", way)
    found = logits.find()
    for (family, name), values in found.items():
        way = name.split()[0]
        assert difference(values, found[family, f"{way} by name"]) <= 1e-5, (family, name)
        assert difference(values, expected[family, way]) <= 1e-5 or family in SEE_OTHERWISE, (family, name)
    assert difference(expected["builtin", "full"], expected["builtin", "frozen"]) > 1e-3  # as trained differently
