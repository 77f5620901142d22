"""Whole optimiser steps, and the memory of an update, against the way of VLM-R1 on the same model and prompts.

    python benchmarks/vs_reference.py --output benchmarks/vs_reference.md

VLM-R1 (arXiv 2504.07615) repeats each image and prompt for every completion, preprocessed anew, pads the batch, and
takes the log-softmax of the logits of all tokens, the prompts' too. Here that is our own trainer with a policy that
does so; all else is the same, so that the two differ by nothing else.
"""

from __future__ import annotations

import gc
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from common import (
    LETTERS,
    Case,
    Ours,
    Spread,
    Way,
    alternate,
    family_without_end,
    gradient_of,
    hardware,
    largest_difference,
    new_agent,
    new_model,
    observations,
    peak_memory,
    processor_of,
    ratio,
    report,
)
from torch.nn.utils.rnn import pad_sequence

from vlmenv.agents.base import LogProbs
from vlmenv.agents.packing import Packing
from vlmenv.agents.policy import Policy
from vlmenv.agents.vlm import find_model
from vlmenv.core.rollout import Rollout

GRID = tuple(
    Case(size, tokens, group_size, prompts, new_tokens)
    for size, new_tokens in (("1.6M", 24), ("10M", 48))
    for tokens, prompts in ((34, 4), (300, 1), (1200, 1))
    for group_size in (4, 8, 16)
    if (size, tokens, group_size) != ("10M", 1200, 16)  # the reference would take a minute a step
)


class FullLogits(Policy):
    """Holds the logits of all tokens of prompts and completions at once."""

    def forward(self, rollout: Rollout) -> LogProbs:
        packing = Packing(torch.tensor([len(one.token_ids) for one in rollout.completions]), self.device)
        prompts = [rollout.prompts[i] for i in rollout.prompt_index]
        pairs = list(zip(prompts, rollout.completions, strict=True))
        ids = [torch.from_numpy(np.concatenate([prompt.input_ids, one.token_ids])) for prompt, one in pairs]
        padded = pad_sequence(ids, batch_first=True).to(self.device)
        mask = pad_sequence([torch.ones_like(one) for one in ids], batch_first=True).to(self.device)
        logits = self.model(
            input_ids=padded,
            attention_mask=mask,
            mm_token_type_ids=(padded == self.model.config.image_token_id).int(),
            use_cache=False,
            **{name: one.to(self.device) for name, one in self.family.join_images(prompts).items()},
        ).logits.index_fill_(-1, self._banned(), -torch.inf)
        rows = zip(logits[:, :-1] / (rollout.temperature or 1.0), padded[:, 1:, None], strict=True)
        logprobs = torch.stack([row.log_softmax(dim=-1).gather(-1, chosen)[:, 0] for row, chosen in rows])
        starts = torch.tensor([len(prompt.input_ids) - 1 for prompt in prompts], device=self.device)
        values = packing.pad(logprobs[packing.rows, starts[packing.rows] + packing.places])
        return LogProbs(values, torch.zeros_like(values), packing.mask())


@dataclass
class Args:
    """Compare with VLM-R1's way."""

    rounds: int = 3
    """Steps of each that are counted."""
    threads: int = 2
    """Of PyTorch."""
    sizes: tuple[str, ...] = ("1.6M", "10M")
    """Models."""
    cases: tuple[Case, ...] = field(default=GRID)
    """What is measured."""
    output: Path | None = None
    """Markdown file for the table."""


@dataclass
class Measured:
    """A case's figures."""

    case: Case
    times: dict[str, dict[str, Spread]]
    memory: dict[str, int]
    """of an update, in bytes"""
    differences: tuple[float, float]
    """of log-probabilities, absolute; of the gradient, as a share of its largest number"""


def main(args: Args) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    found = [measure(case, args.rounds) for case in args.cases if case.size in args.sizes]
    report([*head(args), *map(row, found), *agreement(found)], args.output)


def measure(case: Case, rounds: int) -> Measured:
    contestants = {"reference": contestant(case, "plain", FullLogits), "ours": contestant(case, "shared", Policy)}
    differences = compare(contestants["ours"], contestants["reference"])
    times = alternate(dict(contestants), rounds)
    memory = {name: peak_memory(one.update) for name, one in contestants.items()}
    print(case, {name: str(found["step"]) for name, found in times.items()}, differences, flush=True)
    del contestants
    gc.collect()
    return Measured(case, times, memory, differences)


def contestant(case: Case, way: Way, policy: type[Policy]) -> Ours:
    family = family_without_end(new_model(case.size), processor_of(find_model("builtin")))
    agent = new_agent(family, way, case.new_tokens, policy)
    return Ours(agent, observations(family, case), case, Accelerator(cpu=True))


def compare(ours: Ours, reference: Ours) -> tuple[float, float]:
    """How far log-probabilities and gradients of the same completions are apart, before either has taken a step."""
    rollouts = ours.trainer.collector.next({}, 0.0).rollouts
    values, gradients = [], []
    for one in (ours, reference):
        with torch.no_grad():
            values.append(one.agent.logprobs(rollouts.rollout).values)
        one.trainer.backward(one.trainer._credited(rollouts, np.random.default_rng(0)))
        gradients.append(gradient_of(one.agent.family.model))
        one.trainer.optimizer.zero_grad()
    return float((values[0] - values[1]).abs().max()), largest_difference(*gradients)


def head(args: Args) -> list[str]:
    return [
        "# Optimiser steps of GRPO against VLM-R1's way",
        "",
        "    python benchmarks/vs_reference.py --output benchmarks/vs_reference.md",
        "",
        f"{hardware(f'{args.threads} threads, float32, ')}. Medians of {args.rounds} steps (least–most), in ms; both "
        "take turns in one process. Other work may have run on the machine meanwhile: compare within a row.",
        "",
        "The reference repeats image and prompt for every completion, preprocesses each, pads, and holds the logits "
        "of all tokens (as VLM-R1 does); else it is the same trainer, sampler, loss and optimiser. Qwen3-VL with "
        "random weights; 40 to 50 % of a prompt's tokens are its image's; end tokens are banned, so that all "
        "completions have the same length. Memory is the most that tensors take at a time in an update above weights "
        "and the optimiser's state, in MB.",
        "",
        LETTERS,
        "",
        "| model | T | G | P | L | step, reference | step, vlmenv | faster | rollout | log-probs | update "
        "| memory, reference | vlmenv | share |",
        "|---" * 14 + "|",
    ]


def row(one: Measured) -> str:
    reference, ours = one.times["reference"], one.times["ours"]
    phases = [ratio(reference, ours, name) for name in ("rollout", "logprobs", "update")]
    memory = [f"{one.memory[name] / 1e6:,.1f}" for name in ("reference", "ours")]
    share = f"**{one.memory['ours'] / one.memory['reference']:.2f}**"
    steps = [str(reference["step"]), str(ours["step"]), f"**{ratio(reference, ours, 'step')}**"]
    return f"| {' | '.join([*one.case.cells, *steps, *phases, *memory, share])} |"


def agreement(found: list[Measured]) -> list[str]:
    logprobs, gradients = (max(one.differences[i] for one in found) for i in range(2))
    return [
        "",
        f"Given the same completions, over all rows: log-probabilities differ by at most {logprobs:.1e}, gradients by "
        f"at most {gradients:.1e} of their largest number.",
    ]


if __name__ == "__main__":
    main(tyro.cli(Args))
