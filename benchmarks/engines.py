"""Training with each engine, and how fast each generates.

    vlmenv serve --port 8123 --engine-length 512 &
    python benchmarks/engines.py --server http://127.0.0.1:8123 --output benchmarks/engines.md

vLLM has to be installed (docs/vllm.md). Runs are kept under `--runs`: the same command takes up an interrupted
benchmark.
"""

# ruff: noqa: I001
from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

import vlmenv.agents  # noqa: F401 (mends torchvision for CPUs, before transformers is imported)
from common import Case, Spread, family_without_end, hardware, new_agent, new_model, observations, processor_of, report
from findings.runs import check_model, evaluation_of, mean_of, seconds_of, seeds_cell, steps_of, trained

from vlmenv.agents.engines.vllm import VLLMEngine
from vlmenv.agents.vlm import VLMAgent, find_model

AHEAD = {"engine": "vllm-server", "max_staleness": 1}
WAYS: Mapping[str, Mapping[str, Any]] = {
    "hf": {},
    "vllm": {"engine": "vllm", "engine_length": 512},
    "vllm-server": {"engine": "vllm-server"},
    "a step ahead, corrected": AHEAD | {"correction": "token"},
    "a step ahead, not corrected": AHEAD | {"correction": "none"},
}
"""What differs between the runs."""
GRID = tuple(
    Case(size, tokens, group_size, 8, 48) for size in ("1.6M", "10M") for tokens in (34, 300) for group_size in (1, 8)
)


@dataclass
class Args:
    """Train with each engine, and time them."""

    server: str
    """Address of a server with the built-in model."""
    seeds: int = 3
    """Runs with each."""
    steps: int = 60
    """Of each run."""
    limit: int = 512
    """Held-out samples to measure on."""
    rounds: int = 3
    """Batches of each engine that are timed."""
    cases: tuple[Case, ...] = GRID
    """What is generated for the timing."""
    runs: Path = Path("runs/engines")
    """Folder of the runs."""
    output: Path | None = None
    """Markdown file for the tables."""


def main(args: Args) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    check_model(args.runs)
    found = {way: [run(way, seed, args) for seed in range(args.seeds)] for way in WAYS}
    speeds = {case: speed(case, args.rounds) for case in args.cases}
    report([*head(args), *learning(found), *throughput(speeds)], args.output)


def run(way: str, seed: int, args: Args) -> Path:
    options = {
        "env": "VLM-REC-v0",
        "seed": seed,
        "steps": args.steps,
        "eval_limit": args.limit,
        "max_new_tokens": 64,
        "checkpoint_every": max(1, args.steps // 2),
        "keep": 1,
        "device": "cpu",
    }
    served = {"server": [args.server]} if WAYS[way].get("engine") == "vllm-server" else {}
    return trained(args.runs / f"{way.replace(',', '').replace(' ', '-')}-seed{seed}", options | WAYS[way] | served)


def head(args: Args) -> list[str]:
    return [
        "# Engines",
        "",
        "    vlmenv serve --port 8123 --engine-length 512 &",
        f"    python benchmarks/engines.py --server http://127.0.0.1:8123 --seeds {args.seeds} --steps {args.steps} "
        f"--limit {args.limit}",
        "",
        f"{hardware('float32, one thread each, ')}; vLLM's build for CPUs, uncompiled. Compare within a table.",
    ]


def learning(found: Mapping[str, list[Path]]) -> list[str]:
    before = evaluation_of(found["hf"][0], "before")
    return [
        "",
        "## Learning",
        "",
        "GRPO on the built-in referring expressions from the built-in model. Held-out scenes, greedy answers, before "
        f"training: overlap {before['iou/mean']:.3f}, accuracy@0.5 {before['accuracy@0.5']:.3f}. Reward: of sampled "
        "answers in the last tenth of the steps. KL and effective samples are the sampler's against the policy, means "
        "over the steps. Seconds are those of the steps; the trainer waits for its answers in `rollout`.",
        "",
        "| engine | overlap | accuracy@0.5 | reward | sampler's KL | effective samples | seconds | of these rollout |",
        "|---" * 8 + "|",
        *(row(way, folders) for way, folders in found.items()),
    ]


def row(way: str, folders: list[Path]) -> str:
    after = [evaluation_of(folder) for folder in folders]
    steps = [steps_of(folder) for folder in folders]
    cells = [seeds_cell([one[name] for one in after]) for name in ("iou/mean", "accuracy@0.5")]
    cells.append(seeds_cell([mean_of(own[-max(1, len(own) // 10) :], "reward/mean") for own in steps]))
    cells.append(" / ".join(f"{mean_of(own, 'policy/sampler_kl'):.0e}" for own in steps) if way != "hf" else "")
    cells.append(seeds_cell([mean_of(own, "policy/effective_samples") for own in steps]) if way != "hf" else "")
    cells.append(seeds_cell([seconds_of(folder) for folder in folders], 0))
    cells.append(seeds_cell([sum(step["time/rollout"] for step in own) for own in steps], 0))
    return f"| {way} | {' | '.join(cells)} |"


def speed(case: Case, rounds: int) -> dict[str, Spread]:
    """Seconds that each engine takes for a batch of completions of equal length, the engines taking turns."""
    torch.set_num_threads(1)
    family = family_without_end(new_model(case.size), processor_of(find_model("builtin")))
    agent = new_agent(family, "shared", case.new_tokens)
    asked = [one for one in observations(family, case) for _ in range(case.group_size)]
    with tempfile.TemporaryDirectory() as folder:
        agent.save(Path(folder) / "model")
        length = case.tokens + case.new_tokens
        own = agent.family.processor.image_processor.size
        engine = engine_of(agent, Path(folder) / "model", length)
        assert own == agent.family.processor.image_processor.size
        taken: dict[str, list[float]] = {"hf": [], "vllm": []}
        for _ in range(rounds + 1):
            for name in taken:
                agent.engine = engine if name == "vllm" else None
                taken[name].append(seconds(agent, asked, case))
        agent.engine = engine
        agent.close()
    return {name: Spread(tuple(found[1:])) for name, found in taken.items()}


def engine_of(agent: VLMAgent, folder: Path, length: int) -> VLLMEngine:
    agent.family.processor.image_processor.save_pretrained(folder)  # it leaves images as large as they are
    return VLLMEngine(folder, agent.family, device=torch.device("cpu"), dtype=torch.float32, max_length=length)


def seconds(agent: VLMAgent, asked: Any, case: Case) -> float:
    agent.sync()  # so that nothing is known from the batch before
    started = time.perf_counter()
    rollout = agent.rollout(asked)
    taken = time.perf_counter() - started
    assert all(len(one.token_ids) == case.new_tokens for one in rollout.completions)
    return taken


def throughput(speeds: Mapping[Case, Mapping[str, Spread]]) -> list[str]:
    lines = [
        "",
        "## Throughput",
        "",
        "Tokens per second of a batch of 8 prompts (T tokens, of its image) with G completions of L tokens each, from "
        "observations to texts, right after an update of the weights; medians, the engines taking turns in one "
        "process. hf is the trainer's own sampler, which computes each prompt once.",
        "",
        "| model | T | G | P | L | hf | vllm | vllm to hf |",
        "|---" * 8 + "|",
    ]
    for case, found in speeds.items():
        tokens = {name: case.count * case.new_tokens / spread.median for name, spread in found.items()}
        cells = [f"{tokens['hf']:,.0f}", f"{tokens['vllm']:,.0f}", f"{tokens['vllm'] / tokens['hf']:.1f}×"]
        lines.append(f"| {' | '.join([*case.cells, *cells])} |")
    return lines


if __name__ == "__main__":
    main(tyro.cli(Args))
