"""Step time and memory of GRPO on prompts with a video: once per group, and repeated for each completion.

    python benchmarks/videos.py --output benchmarks/videos.md

The repeated way is the trainer's own without shared prompts: it encodes and sees the video for each completion. Both
learn from the same clips of noise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from common import (
    Case,
    Contestant,
    Ours,
    Way,
    alternate,
    family_without_end,
    hardware,
    new_agent,
    new_model,
    peak_memory,
    processor_for,
    ratio,
    report,
)

from vlmenv.core.rollout import Observation
from vlmenv.core.video import Video

PHASES = ("step", "cpu", "rollout", "update")
NAMES: dict[Way, str] = {"shared": "once per group", "plain": "repeated"}


@dataclass
class Args:
    """Measure steps on clips."""

    size: str = "10M"
    """Model of random weights, a Qwen3-VL."""
    frames: tuple[int, ...] = (8, 64)
    """Frames of a clip."""
    side: int = 96
    """Width and height of a frame in pixels."""
    group_size: int = 8
    """Completions of each."""
    prompts: int = 1
    """Clips in a step."""
    new_tokens: int = 16
    """Tokens of each completion."""
    rounds: int = 2
    """Steps that are counted."""
    threads: int = 1
    """Of PyTorch."""
    output: Path | None = None
    """Markdown file for the table."""


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    rows = [line for frames in args.frames for line in measured(args, frames)]
    report(
        [
            "# Videos, once per group",
            "",
            "    python benchmarks/videos.py --output benchmarks/videos.md",
            "",
            f"A Qwen3-VL of {args.size} parameters with random weights; a step has {args.prompts} clip of noise,",
            f"{args.side} × {args.side} pixels, and {args.group_size} completions of {args.new_tokens} tokens.",
            f"{hardware()}, {args.threads} thread, beside other work.",
            "Milliseconds: the median, with the least and the most; `CPU` is the processor's time, which other work of",
            "the machine changes little. Memory: peak of the tensors of an update, without what was there before.",
            "The last column is the largest difference of log-probabilities of the same completions by both ways.",
            "",
            "| frames | prompt, tokens | the video | step | CPU | rollout | update | memory, MB | differ by |",
            "|---|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            "TRL 1.16's GRPO trainer reads columns of images alone, so there is no figure of it.",
        ],
        args.output,
    )


def measured(args: Args, frames: int) -> list[str]:
    """The lines of the table for clips of some frames."""
    contestants: dict[str, Contestant] = {}
    for way, name in NAMES.items():
        processor = processor_for(args.size)
        whole = replace(processor, video_settings={"size": {"shortest_edge": 1, "longest_edge": 2**30}})
        family = family_without_end(new_model(args.size), whole)
        case = Case(args.size, 0, args.group_size, args.prompts, args.new_tokens)
        agent = new_agent(family, way, args.new_tokens)
        contestants[name] = Ours(agent, clips(args, frames), case, Accelerator(cpu=True))
    times = alternate(contestants, args.rounds)
    ours, plain = contestants.values()
    assert isinstance(ours, Ours)
    assert isinstance(plain, Ours)
    tokens, gap = len(ours.last.rollouts.rollout.prompts[0].input_ids), difference(ours, plain)
    lines = []
    for name, contestant in contestants.items():
        one, memory = times[name], peak_memory(contestant.update) / 1e6
        cells = [str(one[phase]) for phase in PHASES]
        lines.append(f"| {frames} | {tokens:,} | {name} | {' | '.join(cells)} | {memory:,.0f} | {gap} |")
    first, second = times.values()
    faster = [ratio(second, first, phase) for phase in PHASES]
    return [*lines, f"| | | once is faster by | {' | '.join(faster)} | | |"]


@torch.no_grad()
def difference(ours: Ours, plain: Ours) -> str:
    """The largest difference of log-probabilities of the same completions, by both ways with the same weights."""
    rollout = ours.last.rollouts.rollout
    shared = ours.agent.logprobs(rollout).values
    ours.agent.family_policy.share_prefixes = False
    repeated = ours.agent.logprobs(rollout).values
    ours.agent.family_policy.share_prefixes = True
    return f"{float((shared - repeated).abs().max()):.0e}"


def clips(args: Args, frames: int) -> list[Observation]:
    """Prompts with a clip of noise each, two frames per second."""
    rng = np.random.default_rng(0)
    shape = (frames, args.side, args.side, 3)
    seconds = np.arange(frames) / 2
    return [
        {
            "images": (),
            "videos": (Video(rng.integers(256, size=shape, dtype=np.uint8), seconds, frames / 2),),
            "prompt": "When is the red circle visible?",
        }
        for _ in range(args.prompts)
    ]


if __name__ == "__main__":
    main(tyro.cli(Args))
