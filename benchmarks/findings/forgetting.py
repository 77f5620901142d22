"""Forgetting: one narrow task by supervised and by reinforcement learning, to the same gain on it.

    python benchmarks/findings/forgetting.py --output benchmarks/findings/forgetting.md

"RL's Razor" (arXiv 2509.04259) finds that at the same gain on a new task, reinforcement learning forgets less than SFT,
and that the KL divergence from the base on the new task tells how much. VLM-R1 (arXiv 2504.07615, section 4.3) finds
SFT below its start on data of another kind, and reinforcement learning above. The built-in model has been taught five
tasks, and here learns referring expressions further. SFT is taken at the first measurement that reaches what GRPO
reached with the same seed. It imitates answers in the base's own words, and others that are far from the base's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gymnasium
import torch
import tyro
from backwards import NAME as BACKWARDS
from other_scenes import KINDS, write_scenes
from runs import (
    check_model,
    draw_changes,
    evaluation_of,
    hardware,
    last_model,
    measured,
    measurements_of,
    publish,
    seeds_cell,
    spread_cell,
    trained,
)

from vlmenv.agents import VLMAgent
from vlmenv.envs.base import VisualTaskEnv

ENV = "VLM-REC-v0"
METRIC = "iou/mean"
WAYS = {
    "grpo": {"env": ENV, "algo": "grpo"},
    "sft": {"env": ENV, "algo": "sft"},
    "sft, backwards": {"env": f"backwards:{BACKWARDS}", "algo": "sft"},
}
"""Options of each way."""
OTHERS = {
    **dict.fromkeys(KINDS, METRIC),
    "VLM-OVD-v0": "image_ap/mean",
    "VLM-VQA-v0": "accuracy",
    "VLM-Math-v0": "accuracy",
    "VLM-Caption-v0": "keyword_recall",
}
"""What is not trained, with its metric."""
LONGER = 15
"""How many times as long answers backwards are imitated, as they have to be learnt first."""
KLS = ("KL(base, model)", "KL(model, base)")
SAMPLES_AT_ONCE = 32


@dataclass
class Args:
    """Train one task both ways to the same gain, and measure the others."""

    seeds: int = 3
    """Runs of each."""
    steps: int = 16
    """Of GRPO."""
    sft_steps: int = 40
    """Of SFT, at most."""
    prompts: int = 8
    """In a step; GRPO answers each eight times."""
    every: int = 4
    """Steps between measurements of SFT."""
    limit: int = 256
    """Held-out samples of each kind."""
    runs: Path = Path("runs/findings/forgetting")
    """Folder of the runs and the scenes."""
    output: Path | None = None
    """Markdown file for the table; the figure goes beside it, as .png."""


def main(args: Args) -> None:
    check_model(args.runs)
    files = {kind: write_scenes(args.runs / "scenes" / kind.replace(" ", "-"), kind, args.limit) for kind in KINDS}
    folders = {way: [run(way, seed, args) for seed in range(args.seeds)] for way in WAYS}
    goals = [evaluation_of(folder)[METRIC] for folder in folders["grpo"]]
    models = {
        way: [
            last_model(folder) if way == "grpo" else first_as_good(folder, goal)
            for folder, goal in zip(own, goals, strict=True)
        ]
        for way, own in folders.items()
    }
    found = {"base": [figures(args.runs / "base", "builtin", files, args)]} | {
        way: [figures(model.parents[1] / model.name, str(model), files, args) for model in own]
        for way, own in models.items()
    }
    steps = {way: [int(model.name.removeprefix("step-")) for model in own] for way, own in models.items()}
    changes = {
        way: {name: [one[name] - found["base"][0][name] for one in found[way]] for name in (ENV, *OTHERS)}
        for way in WAYS
    }
    draw = partial(draw_changes, changes=changes, label="change of the metric")
    publish([*head(args), *table(found, steps)], args.output, draw)


def run(way: str, seed: int, args: Args) -> Path:
    times = LONGER if way == "sft, backwards" else 1
    steps = args.steps if way == "grpo" else args.sft_steps * times
    every = args.steps if way == "grpo" else args.every * times
    options = WAYS[way] | {
        "seed": seed,
        "steps": steps,
        "prompts_per_step": args.prompts,
        "eval_limit": args.limit,
        "eval_every": every,
        "checkpoint_every": every,
        "device": "cpu",
    }
    return trained(args.runs / f"{way.replace(', ', '-')}-seed{seed}", options)


def first_as_good(folder: Path, goal: float) -> Path:
    """The model of the first measurement that reaches a metric."""
    for step, value in measurements_of(folder, METRIC):
        if value >= goal:
            return folder / "checkpoints" / f"step-{step}"
    raise SystemExit(f"{folder} never reaches the {METRIC} of GRPO, {goal:.3f}: raise --sft-steps")


def figures(folder: Path, model: str, files: Mapping[str, Path], args: Args) -> dict[str, float]:
    """The metrics of a model on the trained task and on the others, and its divergence from the base."""
    found = {}
    for name, metric in {ENV: METRIC, **OTHERS}.items():
        options = {"env": name, "model": model, "eval_limit": args.limit, "device": "cpu"}
        if name in files:
            options |= {"env": ENV, "dataset": str(files[name])}
        found[name] = measured(folder / "on" / name.replace(" ", "-"), options)[metric]
    return found | dict(zip(KLS, divergences(folder / "kl.json", model, args.limit), strict=True))


def divergences(file: Path, model: str, limit: int) -> list[float]:
    """KL(base, model) and KL(model, base) on the trained task, in nats per token of sampled answers; kept in a file."""
    if not file.exists():
        base, agent = VLMAgent.from_pretrained("builtin"), VLMAgent.from_pretrained(model)
        file.write_text(json.dumps([gap(base, agent, limit), gap(agent, base, limit)]))
    return list(json.loads(file.read_text()))


@torch.no_grad()
def gap(sampler: VLMAgent, other: VLMAgent, limit: int) -> float:
    """By how much the sampler's answers to held-out samples are likelier under it than under the other model."""
    task = gymnasium.make(ENV, split="eval").unwrapped
    assert isinstance(task, VisualTaskEnv)
    torch.manual_seed(0)
    total, tokens = 0.0, 0
    for start in range(0, limit, SAMPLES_AT_ONCE):
        observations = [task.observe(task.source.get(i)) for i in range(start, min(start + SAMPLES_AT_ONCE, limit))]
        rollout = sampler.rollout(observations)
        own, others = sampler.logprobs(rollout), other.logprobs(rollout)
        total += float((own.values - others.values).sum())
        tokens += int(own.mask.sum())
    return total / tokens


def head(args: Args) -> list[str]:
    options = ("seeds", "steps", "sft_steps", "prompts", "every", "limit")
    given = " ".join(f"--{name.replace('_', '-')} {getattr(args, name)}" for name in options)
    lines = [
        "# Forgetting",
        "",
        f"    python benchmarks/findings/forgetting.py {given}",
        "",
        f"The built-in model, seeds 0 to {args.seeds - 1}; {hardware()}. "
        f"GRPO trains {args.steps} steps of {args.prompts} prompts on referring "
        f"expressions. SFT imitates true boxes of the same scenes, and is measured every {args.every} steps: the first "
        "model that reaches GRPO's mean IoU counts. In `backwards` the words of the thought before a box are in "
        f"reverse, as the base never has them; it takes up to {LONGER} times as many steps, and is measured as many "
        f"times. Greedy answers to {args.limit} held-out samples of each task; and of referring expressions in "
        'other phrasing ("Point out" for "Locate"), in other shades of the colours, of sizes not in training, and '
        "among six to eight shapes in place of two to four. KL is that on held-out referring expressions, in nats per "
        "token of sampled answers. The mean over seeds ± the standard deviation, and each seed.",
    ]
    return lines if args.output is None else [*lines, "", f"![Change of each metric]({args.output.stem}.png)"]


def table(found: Mapping[str, list[dict[str, float]]], steps: Mapping[str, list[int]]) -> list[str]:
    titles = {
        f"{name}: {metric}, {'trained' if name == ENV else 'not trained'}": name
        for name, metric in {ENV: METRIC, **OTHERS}.items()
    } | {name: name for name in KLS}
    rows = (
        (title, [spread_cell([one[name] for one in own]) for own in found.values()]) for title, name in titles.items()
    )
    return [
        "",
        f"| | {' | '.join(found)} |",
        "|---" * (len(found) + 1) + "|",
        *(f"| {title} | {' | '.join(cells)} |" for title, cells in rows),
        f"| steps | – | {' | '.join(seeds_cell(steps[name], 0) for name in found if name in steps)} |",
    ]


if __name__ == "__main__":
    main(tyro.cli(Args))
