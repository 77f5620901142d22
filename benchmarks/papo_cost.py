"""What PAPO's masked images cost in a step, with prompts once per group and repeated for each completion.

    python benchmarks/papo_cost.py --output benchmarks/papo_cost.md

PAPO (arXiv 2507.06448) computes each completion twice: after the image, and after the masked image. The usual way is a
second batch as large as the first. With shared prompts it is one more prompt per group, and the completions again.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from accelerate import Accelerator
from common import (
    Case,
    Ours,
    Spread,
    alternate,
    family_without_end,
    hardware,
    new_agent,
    new_model,
    observations,
    peak_memory,
    processor_for,
    report,
)

from vlmenv.algos import GRPO, GRPOConfig
from vlmenv.algos.papo import PAPO, PAPOConfig

GRID = (Case("1.6M", 100, 8, 4, 24), Case("1.6M", 300, 8, 2, 24), Case("1.6M", 1200, 8, 1, 24))
WAYS = {"repeated": "plain", "once per group": "shared"}
"""How prompts are computed, and the name of that in `common`."""


@dataclass
class Args:
    """Time steps of GRPO and of PAPO."""

    rounds: int = 5
    """Steps of each that are counted."""
    threads: int = 1
    """Of PyTorch."""
    output: Path | None = None
    """Markdown file for the table."""


def main(args: Args) -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    report([*head(args), *(line for case in GRID for line in rows(case, args.rounds))], args.output)


def rows(case: Case, rounds: int) -> list[str]:
    contestants = {
        (prompts, masks): contestant(case, way, masks=masks) for prompts, way in WAYS.items() for masks in (False, True)
    }
    times = alternate({f"{prompts} {masks}": one for (prompts, masks), one in contestants.items()}, rounds)
    lines = []
    for prompts in WAYS:
        plain, seeing = (times[f"{prompts} {masks}"] for masks in (False, True))
        memory = [peak_memory(contestants[prompts, masks].update) / 1e6 for masks in (False, True)]
        lines.append(
            f"| {case.tokens} | {case.group_size} | {prompts} | {written(plain)} | {written(seeing)} "
            f"| {milliseconds(seeing) - milliseconds(plain):,.0f} | {memory[0]:.0f} | {memory[1]:.0f} |"
        )
        print(lines[-1], flush=True)
    return lines


def contestant(case: Case, way: str, *, masks: bool) -> Ours:
    family = family_without_end(new_model(case.size), processor_for(case.size))
    size = case.group_size
    algorithm = PAPO(PAPOConfig(group_size=size)) if masks else GRPO(GRPOConfig(group_size=size))
    agent = new_agent(family, way, case.new_tokens)  # type: ignore[arg-type]
    return Ours(agent, observations(family, case), case, Accelerator(cpu=True), algorithm)


def milliseconds(times: dict[str, Spread]) -> float:
    return times["cpu"].median * 1e3


def written(times: dict[str, Spread]) -> str:
    return str(times["cpu"])


def head(args: Args) -> list[str]:
    options = f"--rounds {args.rounds} --threads {args.threads}"
    return [
        "# The cost of masked images",
        "",
        f"    python benchmarks/papo_cost.py {options} --output benchmarks/papo_cost.md",
        "",
        f"{hardware()}. A Qwen3-VL of 1.6 million random weights, completions of 24 tokens. The processor's time of a "
        f"whole step in ms, medians of {args.rounds} (least–most), which other work changes little; the four take "
        "turns in one process. T: tokens of a prompt; G: completions of each. Memory: the most that tensors of an "
        "update take at a time, in MB, in one pass over the whole batch.",
        "",
        "| T | G | prompts | GRPO | PAPO | PAPO's more | memory, GRPO | PAPO |",
        "|---|---|---|---|---|---|---|---|",
    ]


if __name__ == "__main__":
    main(tyro.cli(Args))
