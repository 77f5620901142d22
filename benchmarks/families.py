"""Whether GRPO raises the reward of a small model of each family, from a base taught as the built-in model was.

    python benchmarks/families.py --output benchmarks/families.md

Each model has one or two million weights, the built-in model's tokenizer, and the chat template and image processor of
its family in the forms of `tests/agents/small_models.py`. It begins with the built-in model's matrices where name and
shape are alike, and with random weights elsewhere. It is taught referring expressions on loose boxes for some minutes
(`examples/builtin_model.py`), and then trained by `vlmenv train` with three seeds. An interrupted benchmark is taken up
by the same command.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import tyro
from transformers import AutoConfig, AutoModelForImageTextToText

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT / part) for part in ("tests", "tests/agents", "examples", "benchmarks/findings")]

import builtin_model  # noqa: E402
import small_models  # noqa: E402
from runs import evaluation_of, hardware, mean_of, seeds_cell, steps_of, tail, tell_rows, trained  # noqa: E402

from vlmenv.agents.vlm import BUILTIN, VLMAgent, find_model  # noqa: E402
from vlmenv.envs.data.scenes import SIDE  # noqa: E402
from vlmenv.envs.rewards.detection import pairwise_iou  # noqa: E402

WIDTH, HEAD, PATCH = 128, 32, 16
ONE_TILE = {"height": SIDE, "width": SIDE}
IMAGES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "internvl": {"size": ONE_TILE},
        "gemma3": {"size": ONE_TILE},
        "idefics3": {"size": {"longest_edge": SIDE}, "max_image_size": {"longest_edge": SIDE}},
        "smolvlm": {"size": {"longest_edge": SIDE}, "max_image_size": {"longest_edge": SIDE}},
        "mistral3": {"patch_size": PATCH},
        "llava_onevision": {"size": ONE_TILE, "image_grid_pinpoints": [[SIDE, SIDE]]},
    }
)
"""Settings of image processors by the model's type, under which a scene is one tile. Default: no changes."""
LAYERS: Mapping[str, list[str]] = MappingProxyType(
    {
        "qwen3_5": ["linear_attention", "linear_attention", "full_attention"],
        "qwen3_5_moe": ["linear_attention", "linear_attention", "full_attention"],
        "gemma3": ["sliding_attention", "sliding_attention", "full_attention"],
    }
)
"""Kinds of layers, by the model's type. Default: attention."""
NEWER = ("qwen3_5", "qwen3_5_moe", "gemma3", "gemma4", "gemma4 experts", "glm46v", "glm4v_moe", "mistral3")
NEWER += ("llava_onevision", "internvl qwen3")
ROUNDS: Mapping[str, int] = MappingProxyType({"gemma4": 2, "gemma4 experts": 2})
"""Rounds of teaching of models that do not locate after one. Default: 1."""


@dataclass
class Args:
    """Teach and train a small model of each family."""

    families: tuple[str, ...] = NEWER
    """Names in `small_models.INVENTED`."""
    teaching: int = 800
    """Supervised steps, of 16 scenes with four expressions."""
    steps: int = 400
    """Steps of GRPO, of 8 prompts with 8 answers."""
    limit: int = 256
    """Held-out samples to measure on."""
    seeds: int = 3
    """Number of runs of GRPO from a base, with seeds from 0."""
    runs: Path = Path("runs/families")
    """Folder of the runs."""
    output: Path | None = None
    """Markdown file for the table."""


def main(args: Args) -> None:
    tell_rows(head(args), (row(name, args) for name in args.families), args.output)


def head(args: Args) -> list[str]:
    return [
        "# Learning of small models of each family",
        "",
        f"`python benchmarks/families.py --teaching {args.teaching} --steps {args.steps} --seeds {args.seeds} "
        f"--limit {args.limit}`, on {hardware()}.",
        "",
        "A model of each family begins with the built-in model's matrices where name and shape are alike, and with "
        "random weights elsewhere. It is taught referring expressions on the built-in scenes, with boxes drawn too "
        f"wide, and then trained by GRPO with the reward IoU, seeds 0 to {args.seeds - 1} from one base. Cells of "
        "several numbers tell them by seed. Rewards are means of sampled answers over the first and the last tenth of "
        f"the steps. Overlap is the mean IoU of greedy answers to {args.limit} held-out questions, with 95 % "
        "intervals; the change is of the same questions. Blind is the overlap of answers with the boxes of all other "
        "questions: one who does not look has as much of its own. Coordinates are those of the image. The table shows "
        "whether training works in each family. It compares none: models, processors and prompts differ. Teaching has "
        f"one round; {', '.join(f'{name} has {number}' for name, number in ROUNDS.items())}.",
        "",
        "| model | weights (M) | begun with (%) | teaching (minutes) | reward at first | at last | overlap before "
        "| after | change, by seed | blind before | after | readable after | step (s) |",
        "|---" * 13 + "|",
    ]


def row(name: str, args: Args) -> str:
    """A family's line of the table, once its runs are through."""
    base = args.runs / name.replace(" ", "-") / "base"
    lessons = taught(name, base, args)
    runs = [trained(base.with_name(f"run-{seed}"), options(base, seed, args)) for seed in range(args.seeds)]
    tenths = [steps_of(run)[: max(1, args.steps // 10)] for run in runs]
    seconds = [sum(tail(run, f"time/{part}") for part in ("rollout", "score", "update")) for run in runs]
    weights = sum(parameter.numel() for parameter in VLMAgent.from_pretrained(base).family.model.parameters())
    parts = [name, f"{weights / 1e6:.1f}", f"{100 * lessons['begun']:.0f}", f"{lessons['minutes']:.1f}"]
    parts += [
        seeds_cell([mean_of(tenth, "reward/mean") for tenth in tenths]),
        seeds_cell([tail(run, "reward/mean") for run in runs]),
        interval(runs[0], "before"),
        seeds_cell([evaluation_of(run)["iou/mean"] for run in runs]),
        " / ".join(interval(run, "change", "+") for run in runs),
        f"{blind(runs[0], 'before'):.3f}",
        seeds_cell([blind(run, "after") for run in runs]),
        f"{min(evaluation_of(run)['format'] for run in runs):.2f}",
        f"{sum(seconds) / len(seconds):.2f}",
    ]
    return f"| {' | '.join(parts)} |"


def options(base: Path, seed: int, args: Args) -> dict[str, Any]:
    """The options of a run; the device is the CPU, where all have been measured."""
    return {
        "model": str(base),
        "steps": args.steps,
        "prompts_per_step": 8,
        "group_size": 8,
        "eval_limit": args.limit,
        "seed": seed,
        "coordinates": "original",
        "checkpoint_every": args.steps,
        "device": "cpu",
    }


def interval(run: Path, when: str, sign: str = "") -> str:
    """The overlap of a run's evaluation with its interval."""
    told = json.loads((run / "evaluation.json").read_text())[when]["iou/mean"]
    return f"{told['value']:{sign}.3f} ({told['low']:{sign}.3f} to {told['high']:{sign}.3f})"


def blind(run: Path, when: str) -> float:
    """The mean IoU of a run's answers with the boxes of all other questions."""
    rows = [json.loads(line) for line in (run / when / "answers.jsonl").read_text().splitlines()]
    boxes = [np.array([row[name] or [0.0] * 4 for row in rows]) for name in ("prediction", "target")]
    overlaps = pairwise_iou(*boxes)
    return float(overlaps[~np.eye(len(rows), dtype=bool)].mean())


def taught(name: str, folder: Path, args: Args) -> dict[str, float]:
    """Makes a base and teaches it, as far as that is not done: minutes, and the share of weights that it began with."""
    note = folder.with_name("taught.json")
    if note.exists():
        told = {"rounds": 1.0} | json.loads(note.read_text())
    else:
        folder.mkdir(parents=True, exist_ok=True)
        told = {"rounds": 0.0, "minutes": 0.0, "begun": new_model(name, folder)}
    while told["rounds"] < ROUNDS.get(name, 1):
        agent = VLMAgent.from_pretrained(folder)
        lessons = builtin_model.Args(folder, steps=args.teaching, scenes=16, tasks={}, seed=0)
        if told["rounds"]:
            lessons = replace(lessons, init=str(folder), seed=int(told["rounds"]))
        started = time.monotonic()
        builtin_model.teach(agent, lessons)
        agent.publish(folder)
        told["minutes"] += (time.monotonic() - started) / 60
        told["rounds"] += 1
        note.write_text(json.dumps(told))
    return told


def new_model(name: str, folder: Path) -> float:
    """Writes a model with its tokenizer and processor. Returns the share of weights that are the built-in model's."""
    small_models.invent(name, folder, HEAD)
    file = folder / "preprocessor_config.json"
    family = name.split()[0]
    file.write_text(json.dumps(json.loads(file.read_text()) | IMAGES.get(family, {})))
    config = AutoConfig.from_pretrained(folder)
    widen(config)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    begun = begin(model)
    model.generation_config.eos_token_id = config.get_text_config().eos_token_id
    model.save_pretrained(folder)
    return begun


def begin(model: torch.nn.Module) -> float:
    """Copies the built-in model's matrices where name and shape are alike, and its tokens. Returns their share."""
    builtin = AutoModelForImageTextToText.from_pretrained(find_model(BUILTIN)).state_dict()
    copied = 0
    for name, parameter in model.named_parameters():
        found, rows = builtin.get(name), len(parameter)
        if found is not None and name.endswith("embed_tokens.weight"):
            rows = min(len(found), rows)
            found = torch.cat([found[:rows], parameter.data[rows:]])
        if found is not None and parameter.ndim > 1 and found.shape == parameter.shape:
            parameter.data.copy_(found)
            copied += parameter[:rows].numel()
    return copied / sum(parameter.numel() for parameter in model.parameters())


def widen(config: Any) -> None:
    """Gives a configuration of `small_models` the built-in model's width, and about its number of layers."""
    text, vision, kind = config.get_text_config(), config.vision_config, config.model_type
    text.hidden_size, text.intermediate_size, text.initializer_range = WIDTH, 3 * WIDTH, 0.05
    text.num_attention_heads, text.num_key_value_heads = WIDTH // HEAD, WIDTH // HEAD // 2
    text.tie_word_embeddings = config.tie_word_embeddings = True
    if kind in LAYERS:
        text.layer_types = LAYERS[kind]
    text.num_hidden_layers = len(getattr(text, "layer_types", None) or LAYERS["gemma3"])
    for name, value in (("sliding_window", 64), ("final_logit_softcapping", 30.0), ("hidden_size_per_layer_input", 32)):
        if getattr(text, name, None):
            setattr(text, name, value)
    for name in ("moe_intermediate_size", "shared_expert_intermediate_size"):
        if hasattr(text, name):
            setattr(text, name, WIDTH)
    sizes = {"hidden_size": WIDTH, "embed_dim": WIDTH, "intermediate_size": 3 * WIDTH, "out_hidden_size": WIDTH}
    sizes |= dict.fromkeys(("num_heads", "num_attention_heads", "num_key_value_heads"), WIDTH // HEAD)
    for name, value in sizes.items():
        if hasattr(vision, name):
            setattr(vision, name, value)
    vision.initializer_range = 0.05
    if kind in IMAGES:
        vision.patch_size, vision.image_size = PATCH, SIDE
    if kind == "internvl":
        vision.patch_size, vision.image_size = (PATCH, PATCH), (SIDE, SIDE)
    if kind == "gemma3":
        config.mm_tokens_per_image = (SIDE // PATCH // 2) ** 2
    if kind == "llava_onevision":
        config.image_grid_pinpoints = [[SIDE, SIDE]]


if __name__ == "__main__":
    main(tyro.cli(Args))
