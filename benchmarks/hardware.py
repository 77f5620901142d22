"""Which models train on which cards: `docs/hardware.md`, whose every row is computed here.

    python benchmarks/hardware.py --models FOLDER

FOLDER holds published configurations and processors, in `qwen2_5_vl` (Qwen2.5-VL-7B-Instruct) and `qwen3_vl`
(Qwen3-VL-4B-Instruct). Sizes of their other members are changed in the configuration. No weights are read, and no card
is used: `vlmenv.doctor.prediction` counts the bytes of a step.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlmenv.agents.sampling import token_bytes
from vlmenv.agents.untrainable import read_config
from vlmenv.algos.optimizers import state_bytes
from vlmenv.doctor.prediction import Batch, Place, Sizes, measure, moments
from vlmenv.options.fields import replaced
from vlmenv.options.train import TrainConfig, default_config

ROOT = Path(__file__).parents[1]
_QWEN3 = {"num_key_value_heads": 8}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "Qwen3-VL-2B": (
        "qwen3_vl",
        {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16, **_QWEN3},
        {"out_hidden_size": 2048},
        {},
    ),
    "Qwen2.5-VL-3B": (
        "qwen2_5_vl",
        {
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "max_window_layers": 36,
            "tie_word_embeddings": True,
        },
        {"out_hidden_size": 2048},
        {"tie_word_embeddings": True},
    ),
    "Qwen3-VL-4B": ("qwen3_vl", {}, {}, {}),
    "Qwen2.5-VL-7B": ("qwen2_5_vl", {}, {}, {}),
    "Qwen3-VL-8B": (
        "qwen3_vl",
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "tie_word_embeddings": False,
            **_QWEN3,
        },
        {
            "hidden_size": 1152,
            "depth": 27,
            "intermediate_size": 4304,
            "num_heads": 16,
            "out_hidden_size": 4096,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        {"tie_word_embeddings": False},
    ),
}
"""By name: the folder, and what differs in the language model, in the vision tower and in the configuration itself."""
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, 8-bit AdamW": {"optimizer": "adamw_8bit"},
    "full, bf16 weights, 8-bit AdamW": {"optimizer": "adamw_8bit", "weights": "bf16"},
    "LoRA 64": {"lora_rank": 64},
    "LoRA 64, nf4": {"lora_rank": 64, "quantize": "nf4"},
}
PLACES = {
    **{f"{size} GB": Place(size * 1e9) for size in (16, 24, 40, 80)},
    "8 x 80 GB, FSDP2": Place(80e9, "fsdp2", 8),
}
SIDES, ANSWER, GROUP = (640, 480), 1024, 8


def folder_of(name: str, models: Path, into: Path) -> Path:
    """A folder with a model's configuration and processor."""
    source, text, vision, own = MODELS[name]
    made = into / name
    made.mkdir()
    for file in (models / source).iterdir():
        if file.name != "config.json":
            (made / file.name).symlink_to(file.resolve())
    config = json.loads((models / source / "config.json").read_text())
    language = config.setdefault("text_config", config) if "text_config" in config else config
    language |= text
    if "layer_types" in language:
        language["layer_types"] = ["full_attention"] * language["num_hidden_layers"]
    config["vision_config"] |= vision
    config |= own
    (made / "config.json").write_text(json.dumps(config))
    return made


def options(model: Path, method: Mapping[str, Any]) -> TrainConfig[Any]:
    """The options of a row."""
    common = {"precision": "bf16", "gradient_checkpointing": True, "micro_batch_size": GROUP, "group_size": GROUP}
    more = {"max_new_tokens": ANSWER, "beta": 0.0}
    return replaced(default_config(), {"model": str(model), **common, **more, **method})


def row(model: Path, method: Mapping[str, Any], known: dict[str, tuple[Sizes, Batch]]) -> list[str]:
    """The peaks of a method on all places, in GB; bold where they fit. `known` keeps what only optimizers differ in."""
    config = options(model, method)
    key = str({name: value for name, value in method.items() if name != "optimizer"})
    if key not in known:
        image = np.zeros((SIDES[1], SIDES[0], 3), np.uint8)
        text = "Please provide the bounding box of the red cup on the left of the table."
        known[key] = measure(config, {"images": (image,), "prompt": text})
    sizes, batch = known[key]
    dtype = torch.bfloat16 if config.adaptation.weights == "bf16" else torch.float32
    state = sizes.gradients / dtype.itemsize * state_bytes(config.trainer.optimizer, dtype)
    return [cell(config, replace(sizes, optimizer=state), batch, place) for place in PLACES.values()]


def cell(config: TrainConfig[Any], sizes: Sizes, batch: Batch, place: Place) -> str:
    """The peak on a place; bold where it fits."""
    model = read_config(Path(config.model))
    own = Batch.of(config, batch.longest, place.ranks)
    token, vocabulary = token_bytes(model, torch.bfloat16), int(model.get_text_config().vocab_size)
    parts = moments(sizes, own, config, place, token, vocabulary)
    peak = max(sum(one.values()) for one in parts.values())
    return f"**{peak / 1e9:.1f}**" if peak <= place.usable else f"{peak / 1e9:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True, help="folder of published configurations and processors")
    parser.add_argument("--only", nargs="*", default=list(MODELS), help="models to count; the others are not printed")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "hardware.md", help="file whose table is replaced"
    )
    options = parser.parse_args()
    lines = ["| model | " + " | ".join(["method", *PLACES]) + " |", "|---" * (len(PLACES) + 2) + "|"]
    with tempfile.TemporaryDirectory() as into:
        for name in options.only:
            source = MODELS[name][0]
            if not (options.models / source / "config.json").is_file():
                sys.exit(f"{options.models / source} has no configuration of {name}: nothing was written")
            folder = folder_of(name, options.models, Path(into))
            known: dict[str, tuple[Sizes, Batch]] = {}
            for method, changed in METHODS.items():
                lines.append(f"| {name} | {method} | " + " | ".join(row(folder, changed, known)) + " |")
                print(lines[-1], flush=True)
    text = options.output.read_text()
    before, rest = text.split(_BEGIN, 1)
    options.output.write_text(f"{before}{_BEGIN}\n" + "\n".join(lines) + f"\n{_END}{rest.split(_END, 1)[1]}")


_BEGIN, _END = "<!-- table: benchmarks/hardware.py -->", "<!-- end -->"

if __name__ == "__main__":
    main()
