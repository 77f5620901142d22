"""Where the time of a training step goes, phase by phase, with the real environment.

    python benchmarks/profile_step.py --output benchmarks/profile_step.md

Phases are timed by wrapping the functions that do the work; time in an inner phase is no part of the outer one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
import tyro
from accelerate import Accelerator
from common import LR, NEVER, hardware, new_agent, new_model, report

import vlmenv  # noqa: F401 (registers the environments)
from vlmenv.agents import vlm
from vlmenv.agents.families import Processor, family_of
from vlmenv.agents.vlm import VLMAgent, find_model
from vlmenv.algos import GRPO, GRPOConfig, Trainer, TrainerConfig

MODEL = ("vision tower", "prefill", "decode", "log-probs forward", "backward")
PHASES = ("reset", "encode", *MODEL[:3], "texts", "score", *MODEL[3:], "optimiser", "rest")


@dataclass
class Args:
    """Profile training steps."""

    env: str = "VLM-REC-v0"
    """Environment."""
    sizes: tuple[str, ...] = ("builtin", "10M")
    """Models: the built-in one as it is shipped, or one of random weights."""
    prompts: int = 16
    """Samples in a step."""
    group_size: int = 8
    """Completions of each."""
    new_tokens: int = 64
    """The longest completion."""
    steps: int = 10
    """Steps that are counted; the first ones are not."""
    threads: int = 2
    """Of PyTorch."""
    output: Path | None = None
    """Markdown file for the table."""


class Clock:
    """Seconds by phase, of which only the innermost runs."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._stack: list[str] = []
        self._since = time.perf_counter()
        self._device = device

    def enter(self, phase: str) -> None:
        self._charge()
        self._stack.append(phase)

    def leave(self) -> None:
        self._charge()
        self._stack.pop()

    def wrap(self, owner: Any, name: str, phase: str, unless: str | None = None) -> None:
        """Times a function of an object or module; within the phase `unless` it stays part of that."""
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if unless is not None and unless in self._stack:
                return function(*args, **kwargs)
            self.enter(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        setattr(owner, name, timed)

    def _charge(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._since
        self._since = now


def watch(trainer: Trainer, clock: Clock) -> Callable[[], None]:
    """Times all phases of a trainer's steps; gives back what ends that."""
    agent, sample = trainer.agent, vlm.sample
    assert isinstance(agent, VLMAgent)
    policy = agent.family_policy
    clock.wrap(trainer.envs, "reset", "reset")
    clock.wrap(agent, "encode", "encode")
    clock.wrap(policy, "_look", "vision tower")
    clock.wrap(policy, "prefill", "prefill", unless="log-probs forward")
    clock.wrap(vlm, "sample", "decode")
    clock.wrap(agent, "_text", "texts")
    clock.wrap(trainer.envs, "step", "score")
    clock.wrap(agent, "logprobs", "log-probs forward")
    clock.wrap(trainer.accelerator, "backward", "backward")
    clock.wrap(trainer.processes, "step", "optimiser")
    return lambda: setattr(vlm, "sample", sample)


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    found = {size: measure(size, args) for size in args.sizes}
    report([*head(args, found), *table(found)], args.output)


@dataclass
class Measured:
    """Steps of one model."""

    parameters: int
    prompt: float
    """mean tokens"""
    completion: float
    """mean tokens"""
    steps: list[dict[str, float]]
    """seconds by phase of each"""

    def median(self, phase: str) -> float:
        return float(np.median([step[phase] for step in self.steps]))

    @property
    def whole(self) -> float:
        return float(np.median([sum(step.values()) for step in self.steps]))


def measure(size: str, args: Args) -> Measured:
    trainer = new_trainer(size, args)
    clock = Clock(trainer.agent.device)
    restore = watch(trainer, clock)
    try:
        return run(trainer, clock, args)
    finally:
        restore()


def new_trainer(size: str, args: Args) -> Trainer:
    num_envs = args.prompts * args.group_size
    envs = gymnasium.make_vec(args.env, num_envs=num_envs, group_size=args.group_size)
    if size == "builtin":
        agent = VLMAgent.from_pretrained("builtin", sampling=vlm.Sampling(max_new_tokens=args.new_tokens))
    else:
        model = new_model(size)
        processor = Processor.from_pretrained(find_model("builtin"))
        agent = new_agent(family_of(model.config.model_type)(model, processor), "shared", args.new_tokens)
    config = TrainerConfig(steps=NEVER, lr=LR, warmup_steps=0, lr_schedule="constant")
    return Trainer(agent, envs, GRPO(GRPOConfig(group_size=args.group_size)), config, Accelerator(cpu=True))


def run(trainer: Trainer, clock: Clock, args: Args) -> Measured:
    taken, prompts, completions = [], [], []
    steps = trainer.train(seed=0)
    for _ in range(args.steps + 2):
        clock.seconds = dict.fromkeys(PHASES, 0.0)
        clock.enter("rest")
        rollout = next(steps).rollouts.rollout
        clock.leave()
        taken.append(clock.seconds)
        prompts += [len(prompt.input_ids) for prompt in rollout.prompts]
        completions += [len(one.token_ids) for one in rollout.completions]
    parameters = sum(p.numel() for p in trainer.agent.parameters())
    return Measured(parameters, float(np.mean(prompts)), float(np.mean(completions)), taken[2:])


def head(args: Args, found: dict[str, Measured]) -> list[str]:
    models = "; ".join(
        f"{size}: {one.parameters / 1e6:.1f} M parameters, prompts of {one.prompt:.0f} tokens, completions of "
        f"{one.completion:.0f} on average"
        for size, one in found.items()
    )
    return [
        f"# Where a training step's time goes, {args.env}",
        "",
        "    python benchmarks/profile_step.py --output benchmarks/profile_step.md",
        "",
        f"{hardware(f'{args.threads} threads, float32, ')}. GRPO, {args.prompts} prompts with {args.group_size} "
        f"completions of up to {args.new_tokens} tokens; {models}. Medians of {args.steps} steps, in ms, and shares of "
        "the whole. Bold phases are not the model's. `texts` is decoding tokens to text; the vision tower runs in the "
        "rollout and again, with gradients, in the update.",
        "",
    ]


def table(found: dict[str, Measured]) -> list[str]:
    columns = " | ".join(f"{size}, ms | share" for size in found)
    lines = [f"| | {columns} |", "|---" * (1 + 2 * len(found)) + "|"]
    for phase in PHASES:
        name = phase if phase in MODEL else f"**{phase}**"
        cells = [f"{one.median(phase) * 1e3:,.1f} | {one.median(phase) / one.whole:.1%}" for one in found.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, f"| whole step | {' | '.join(f'{one.whole * 1e3:,.1f} |' for one in found.values())} |"]


if __name__ == "__main__":
    main(tyro.cli(Args))
