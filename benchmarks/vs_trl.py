"""Whole optimiser steps of GRPO, and the memory of an update, against TRL's GRPOTrainer on the same model and prompts.

    python benchmarks/vs_trl.py --output benchmarks/vs_trl.md

Both generate as many tokens, for the same prompts, with the same optimiser and loss; they are stepped in turn in one
process. Before anything is timed, both are given the same completions: their log-probabilities and gradients must
agree. Ours runs in three ways, to tell what it gains by looking at an image once from what it gains by computing a
prompt once.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from common import (
    GEMMA3,
    LETTERS,
    QWEN35,
    Case,
    Contestant,
    Ours,
    Spread,
    alternate,
    family_without_end,
    gradient_of,
    hardware,
    largest_difference,
    new_agent,
    new_model,
    none_banned,
    observations,
    peak_memory,
    processor_for,
    ratio,
    report,
)
from transformers import __version__ as transformers_version
from trl import __version__ as trl_version
from trl_contestant import TRL

from vlmenv.core.rollout import Completion, Rollout

GRID = (
    *(Case("1.6M", 34, size, 16, 24) for size in (4, 8, 16)),
    Case("1.6M", 100, 8, 4, 24),
    *(Case("1.6M", 300, size, 2, 24) for size in (4, 8, 16)),
    Case("1.6M", 300, 8, 2, 96),
    Case("1.6M", 600, 8, 1, 24),
    Case("1.6M", 1200, 8, 1, 24),
    Case("10M", 34, 8, 4, 24),
    *(Case("10M", 300, size, 4, 24) for size in (4, 8, 16)),
    Case("10M", 1200, 8, 1, 24),
    Case(QWEN35, 300, 8, 4, 24),
    Case(GEMMA3, 300, 8, 4, 24),
)
KINDEST = (Case("1.6M", 34, 8, 16, 24), Case("1.6M", 300, 8, 2, 24))
"""Where TRL is measured as on GPUs too."""
WAYS = ("plain", "image once", "shared")
WAYS_GRID = (
    Case("1.6M", 34, 8, 4, 24),
    Case("1.6M", 300, 8, 1, 24),
    Case("1.6M", 1200, 8, 1, 24),
    Case("10M", 300, 8, 1, 24),
)


@dataclass
class Args:
    """Compare with TRL."""

    rounds: int = 3
    """Steps of each that are counted; three times as many where prompts are short, whose steps vary more."""
    threads: int = 2
    """Of PyTorch."""
    cases: tuple[Case, ...] = GRID
    """What is measured against TRL."""
    ways_cases: tuple[Case, ...] = WAYS_GRID
    """What is measured in our own three ways."""
    output: Path | None = None
    """Markdown file for the tables."""


@dataclass
class Measured:
    """A case's figures."""

    case: Case
    times: dict[str, dict[str, Spread]]
    memory: dict[str, int]
    """of an update, in bytes"""
    differences: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """of log-probabilities, absolute; of the gradient, as a share of its largest number; of the loss"""


def main(args: Args) -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    found = [against_trl(case, args.rounds) for case in args.cases]
    own = [in_our_ways(case, args.rounds) for case in args.ways_cases]
    report(
        [*head(args), *speeds(found), *phases(found), *kindest(found), *memories(found), *ways(own), *agreement(found)],
        args.output,
    )


def against_trl(case: Case, rounds: int) -> Measured:
    trl, ours = new_trl(case), new_ours(case, "shared")
    contestants: dict[str, Contestant] = {"TRL": trl, "ours": ours}
    if case in KINDEST:
        contestants["TRL, as on GPUs"] = new_trl(case, as_on_gpus=True)
    times = alternate(contestants, rounds * (3 if _is_short(case) else 1))
    memory = {name: peak_memory(contestant.update) for name, contestant in contestants.items()}
    memory |= {"TRL, recomputing": recomputing(trl), "ours, recomputing": ours_recomputing(ours)}
    found = Measured(case, times, memory, compare(case))
    print(case, {name: str(one["step"]) for name, one in times.items()}, found.differences, flush=True)
    return found


def _is_short(case: Case) -> bool:
    return case.size == "1.6M" and case.tokens <= 100


def in_our_ways(case: Case, rounds: int) -> Measured:
    contestants = {way: new_ours(case, way) for way in WAYS}
    times = alternate(dict(contestants), rounds)
    print(case, {name: str(one["step"]) for name, one in times.items()}, flush=True)
    return Measured(case, times, {way: peak_memory(one.update) for way, one in contestants.items()})


def new_trl(case: Case, *, as_on_gpus: bool = False) -> TRL:
    model = new_model(case.size)
    family = family_without_end(model, processor_for(case.size))
    return TRL(model, family, observations(family, case), case, as_on_gpus=as_on_gpus)


def new_ours(case: Case, way: str) -> Ours:
    family = family_without_end(new_model(case.size), processor_for(case.size))
    agent = new_agent(family, way, case.new_tokens)  # type: ignore[arg-type]
    return Ours(agent, observations(family, case), case, Accelerator(cpu=True))


def recomputing(trl: TRL) -> int:
    """The memory of TRL's update under its own default, gradient checkpointing."""
    trl.trainer.model.gradient_checkpointing_enable()
    found = peak_memory(trl.update)
    trl.trainer.model.gradient_checkpointing_disable()
    return found


def ours_recomputing(ours: Ours) -> int:
    """The memory of our update with `--gradient-checkpointing`."""
    ours.agent.enable_gradient_checkpointing()
    return peak_memory(ours.update)


def compare(case: Case) -> tuple[float, float, float]:
    """Gives both the same completions, and tells how far log-probabilities, gradients and losses are apart."""
    trl, ours = new_trl(case), new_ours(case, "shared")
    policy = ours.agent.family_policy
    rollouts = ours.trainer.collector.next({}, 0.0).rollouts  # no step, which would change our weights alone
    with none_banned(policy):
        rollouts.rollout = rollout = with_logprobs(ours, rollouts.rollout)
        trl.answer([one.token_ids.tolist() for one in rollout.completions])
        theirs = trl.logprobs()
        mine = torch.stack([torch.from_numpy(one.logprobs) for one in rollout.completions])
        order = [match(row, rollout) for row in trl.inputs["completion_ids"]]
        prompts = [rollout.prompts[i].input_ids.tolist() for i in rollout.prompt_index[order]]
        assert trl.inputs["prompt_ids"].tolist() == prompts, "the prompts are not the same"
        batch = ours.trainer._credited(rollouts, np.random.default_rng(0))
        loss = ours.trainer.backward(batch)["loss"] / int(batch.mask.sum())
    their_loss = trl.backward()
    gradients = [gradient_of(model) for model in (policy.model, trl.trainer.model)]
    return (
        float((mine[order] - theirs).abs().max()),
        largest_difference(gradients[0], gradients[1]),
        abs(float(loss) - their_loss),
    )


def with_logprobs(ours: Ours, rollout: Rollout) -> Rollout:
    """A rollout whose log-probabilities are the policy's as it is now."""
    with torch.no_grad():
        now = ours.agent.logprobs(rollout).values.numpy()
    pairs = zip(rollout.completions, now, strict=True)
    changed = [Completion(one.text, one.token_ids, row[: len(one.token_ids)], one.finish_reason) for one, row in pairs]
    return Rollout(rollout.prompts, rollout.prompt_index, changed, rollout.temperature)


def match(row: torch.Tensor, rollout: Rollout) -> int:
    """Which completion a row of TRL's shuffled batch is."""
    return next(i for i, one in enumerate(rollout.completions) if one.token_ids.tolist() == row.tolist())


def head(args: Args) -> list[str]:
    line = hardware(f"{args.threads} threads, float32, ")
    return [
        f"# Optimiser steps of GRPO against TRL {trl_version}",
        "",
        "    python benchmarks/vs_trl.py --output benchmarks/vs_trl.md",
        "",
        f"{line}, transformers {transformers_version}. Medians of {args.rounds} steps (least–most), in ms, of "
        f"{3 * args.rounds} at 1.6M up to 100 tokens; the trainers take turns in one process. The machine is shared: "
        "compare within a row.",
        "",
        "Qwen3-VL, and Qwen3.5 where it is named, with random weights, the built-in model's tokenizer; "
        "every prompt has an image of noise (a quarter "
        "to a half of its tokens) and filler words, all prompts of a step are equally long (so TRL has no padding to "
        "compute), and end tokens are banned on both sides, so that all completions have the same length. AdamW, one "
        "iteration, no KL penalty. TRL runs with the fastest settings that it has for this: no gradient checkpointing "
        "(its default), no vLLM (an engine that either could use). Its dataloader, callbacks and logging are left out; "
        "ours is the trainer's whole step.",
        "",
        LETTERS,
    ]


def speeds(found: list[Measured]) -> list[str]:
    lines = [
        "",
        "## Time",
        "",
        "How many times as fast vlmenv is: in the whole step; in the rollout, from observations to scored completions; "
        "in generating alone, which is most of it; in the update, which is forward and backward pass and optimiser; "
        "and in a pass without gradient over the same completions, as old or reference log-probabilities take (no part "
        "of this step). CPU: the whole step by the processor's time, which other processes change little.",
        "",
        "| model | T | G | P | L | step, TRL | step, vlmenv | faster | CPU | rollout | generate | update | log-probs |",
        "|---" * 13 + "|",
    ]
    for one in found:
        theirs, ours = one.times["TRL"], one.times["ours"]
        phases = [ratio(theirs, ours, name) for name in ("cpu", "rollout", "generate", "update", "logprobs")]
        cells = [*one.case.cells, str(theirs["step"]), str(ours["step"]), f"**{ratio(theirs, ours, 'step')}**", *phases]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def phases(found: list[Measured]) -> list[str]:
    lines = [
        "",
        "The same phases in ms, TRL's and then ours:",
        "",
        "| model | T | G | P | L | rollout | generate | update | log-probs |",
        "|---" * 9 + "|",
    ]
    for one in found:
        theirs, ours = one.times["TRL"], one.times["ours"]
        cells = [f"{theirs[name]} : {ours[name]}" for name in ("rollout", "generate", "update", "logprobs")]
        lines.append(f"| {' | '.join([*one.case.cells, *cells])} |")
    return lines


def kindest(found: list[Measured]) -> list[str]:
    """TRL without what it does on CPUs alone."""
    chosen = [one for one in found if "TRL, as on GPUs" in one.times]
    lines = [
        "",
        "On CPUs TRL applies the head to the prompts' tokens too, on GPUs to the completions' alone. Made to do the "
        "same here:",
        "",
        "| model | T | G | P | L | step, TRL so | step, vlmenv | faster | update |",
        "|---" * 9 + "|",
    ]
    for one in chosen:
        theirs, ours = one.times["TRL, as on GPUs"], one.times["ours"]
        cells = [str(theirs["step"]), str(ours["step"]), ratio(theirs, ours, "step"), ratio(theirs, ours, "update")]
        lines.append(f"| {' | '.join([*one.case.cells, *cells])} |")
    return lines if chosen else []


def memories(found: list[Measured]) -> list[str]:
    lines = [
        "",
        "## Memory of an update",
        "",
        "The most that tensors take at a time, in MB, above weights and the optimiser's state: activations, gradients "
        "and what kernels need for themselves, by PyTorch's own count. With gradient checkpointing both recompute "
        "activations. TRL's buffer for logits is cut to the vocabulary's width (it makes it 32,768 wide).",
        "",
        "| model | T | G | P | L | TRL | vlmenv | share | both checkpointing: TRL | vlmenv | share |",
        "|---" * 11 + "|",
    ]
    for one in found:
        pairs = (("TRL", "ours"), ("TRL, recomputing", "ours, recomputing"))
        cells = [cell for pair in pairs for cell in megabytes(*(one.memory[name] for name in pair))]
        lines.append(f"| {' | '.join([*one.case.cells, *cells])} |")
    return lines


def megabytes(theirs: int, ours: int) -> list[str]:
    return [f"{theirs / 1e6:,.1f}", f"{ours / 1e6:,.1f}", f"**{ours / theirs:.2f}**"]


def ways(found: list[Measured]) -> list[str]:
    lines = [
        "",
        "## What is computed once",
        "",
        "vlmenv's own step in three ways: image and prompt repeated for each completion, in the rollout and in a "
        "padded batch, and the image preprocessed for each; the image looked at once and its features repeated; the "
        "whole prompt computed once.",
        "",
        "| model | T | G | P | L | repeated | image once | prompt once | by the image | by the prompt | both "
        "| memory, MB: repeated | image once | prompt once |",
        "|---" * 14 + "|",
    ]
    for one in found:
        plain, image, shared = (one.times[way] for way in WAYS)
        steps = [str(times["step"]) for times in (plain, image, shared)]
        pairs = [ratio(plain, image, "step"), ratio(image, shared, "step"), ratio(plain, shared, "step")]
        memory = [f"{one.memory[way] / 1e6:,.1f}" for way in WAYS]
        lines.append(f"| {' | '.join([*one.case.cells, *steps, *pairs, *memory])} |")
    return lines if found else []


def agreement(found: list[Measured]) -> list[str]:
    logprobs, gradients, losses = (max(one.differences[i] for one in found) for i in range(3))
    return [
        "",
        "## The same numbers",
        "",
        "Given the same completions, with no tokens banned on our side either, over all rows: log-probabilities "
        f"differ by at most {logprobs:.1e}, gradients by at most {gradients:.1e} of their largest number, losses by "
        f"at most {losses:.1e}.",
    ]


if __name__ == "__main__":
    main(tyro.cli(Args))
