"""Whole optimiser steps of GRPO, and the memory of an update, against TRL's GRPOTrainer on the same model and prompts.

    python benchmarks/vs_trl.py --output benchmarks/vs_trl.md

Both generate as many tokens, for the same prompts, with the same optimiser and loss; they are stepped in turn in one
process. Before anything is timed, both are given the same completions: their log-probabilities and gradients must
agree. Ours runs in three ways, to tell what it gains by looking at an image once from what it gains by computing a
prompt once.
"""

from __future__ import annotations

import gc
import logging
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from accelerate import Accelerator
from common import (
    LETTERS,
    Case,
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
    processor_of,
    ratio,
    report,
)
from trl_contestant import TRL

from vlmenv.agents.vlm import find_model
from vlmenv.core.rollout import Completion, Rollout

Times = dict[str, dict[str, Spread]]

GRID = (
    *(Case("1.6M", tokens, 8, prompts, 24) for tokens, prompts in ((34, 8), (100, 4), (300, 2), (600, 2), (1200, 1))),
    *(Case("1.6M", 34, size, 8, 24) for size in (4, 16)),
    *(Case("1.6M", 300, size, 2, 24) for size in (4, 16)),
    *(Case("10M", tokens, 8, prompts, 48) for tokens, prompts in ((34, 4), (300, 1), (1200, 1))),
    *(Case("10M", 300, size, 1, 48) for size in (4, 16)),
)
WAYS = ("shared", "image once", "plain")


@dataclass
class Args:
    """Compare with TRL."""

    rounds: int = 3
    """Steps of each that are counted."""
    threads: int = 2
    """Of PyTorch."""
    sizes: tuple[str, ...] = ("1.6M", "10M")
    """Models."""
    most_tokens: int = 1200
    """Leave out longer prompts."""
    cases: tuple[Case, ...] = field(default=GRID)
    """What is measured."""
    output: Path | None = None
    """Markdown file for the tables."""


@dataclass
class Measured:
    """A case's figures."""

    case: Case
    times: Times
    memory: dict[str, int]
    """of an update, in bytes"""
    differences: tuple[float, float, float]
    """of log-probabilities, absolute; of the gradient, as a share of its largest number; of the loss"""


def main(args: Args) -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    chosen = [case for case in args.cases if case.size in args.sizes and case.tokens <= args.most_tokens]
    found = [measure(case, args.rounds) for case in chosen]
    report([*head(args), *speeds(found), *ways(found), *memories(found), *agreement(found)], args.output)


def measure(case: Case, rounds: int) -> Measured:
    contestants = {"TRL": new_trl(case)} | {way: new_ours(case, way) for way in WAYS}
    trl, ours = contestants["TRL"], contestants["shared"]
    assert isinstance(trl, TRL)
    assert isinstance(ours, Ours)
    times = alternate(contestants, rounds)
    memory = {name: peak_memory(contestant.update) for name, contestant in contestants.items()}
    memory["TRL, recomputing"] = recomputing(trl)
    differences = compare(case)
    print(case, {name: str(found["step"]) for name, found in times.items()}, differences, flush=True)
    del contestants, trl, ours
    gc.collect()
    return Measured(case, times, memory, differences)


def new_trl(case: Case) -> TRL:
    model = new_model(case.size)
    family = family_without_end(model, processor_of(find_model("builtin")))
    return TRL(model, family, observations(family, case), case)


def new_ours(case: Case, way: str) -> Ours:
    family = family_without_end(new_model(case.size), processor_of(find_model("builtin")))
    agent = new_agent(family, way, case.new_tokens)  # type: ignore[arg-type]
    return Ours(agent, observations(family, case), case, Accelerator(cpu=True))


def recomputing(trl: TRL) -> int:
    """The memory of TRL's update under its own default, gradient checkpointing."""
    trl.trainer.model.gradient_checkpointing_enable()
    found = peak_memory(trl.update)
    trl.trainer.model.gradient_checkpointing_disable()
    return found


def compare(case: Case) -> tuple[float, float, float]:
    """Gives both the same completions, and tells how far log-probabilities, gradients and losses are apart."""
    trl, ours = new_trl(case), new_ours(case, "shared")
    policy = ours.agent.family_policy
    rollouts = ours.trainer._round(*ours.trainer.envs.reset(), {})  # no step, which would change our weights alone
    with none_banned(policy):
        rollouts.rollout = rollout = with_logprobs(ours, rollouts.rollout)
        trl.answer([one.token_ids.tolist() for one in rollout.completions])
        theirs = trl.logprobs()
        mine = torch.stack([torch.from_numpy(one.logprobs) for one in rollout.completions])
        order = [match(row, rollout) for row in trl.inputs["completion_ids"]]
        prompts = [rollout.prompts[i].input_ids.tolist() for i in rollout.prompt_index[order]]
        assert trl.inputs["prompt_ids"].tolist() == prompts, "the prompts are not the same"
        batch = ours.trainer._credited(rollouts)
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
    import transformers
    import trl

    line = hardware(f"{args.threads} threads, float32, ")
    return [
        f"# Optimiser steps of GRPO against TRL {trl.__version__}",
        "",
        "    python benchmarks/vs_trl.py --output benchmarks/vs_trl.md",
        "",
        f"{line}, transformers {transformers.__version__}. Medians of {args.rounds} steps (least–most), in ms; the "
        "trainers take turns in one process. Other work may have run on the machine meanwhile: compare within a row.",
        "",
        "Qwen3-VL with random weights, the built-in model's tokenizer; every prompt has an image of noise (40 to 50 % "
        "of its tokens) and filler words, all prompts of a step are equally long (so TRL has no padding to compute), "
        "and end tokens are banned on both sides, so that all completions have the same length. AdamW, one iteration, "
        "no KL penalty. TRL runs with the fastest settings that it has for this: no gradient checkpointing (its "
        "default), no vLLM (it needs another engine for both, and does not concern the update). Its dataloader, "
        "callbacks and logging are left out; ours are the trainer's whole step. `rollout` is from observations to "
        "scored completions, `generate` what of it is sampling tokens; `log-probs` is a pass without gradient, which "
        "is no part of the step here; `update` is forward, backward and optimiser.",
    ]


def speeds(found: list[Measured]) -> list[str]:
    lines = [
        "",
        "## Time",
        "",
        LETTERS,
        "",
        "| model | T | G | P | L | step, TRL | step, vlmenv | faster | rollout | generate | log-probs | update |",
        "|---" * 12 + "|",
    ]
    for one in found:
        theirs, ours = one.times["TRL"], one.times["shared"]
        phases = [ratio(theirs, ours, name) for name in ("rollout", "generate", "logprobs", "update")]
        cells = [*one.case.cells, str(theirs["step"]), str(ours["step"]), f"**{ratio(theirs, ours, 'step')}**", *phases]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def ways(found: list[Measured]) -> list[str]:
    lines = [
        "",
        "## What is computed once",
        "",
        "vlmenv's own step in three ways: image and prompt repeated for each completion in a padded batch "
        "(`--no-share-prefixes`, and the image preprocessed for each too); the image looked at once and its features "
        "repeated; the whole prompt computed once.",
        "",
        "| model | T | G | P | L | repeated | image once | prompt once | by the image | by the prompt | both |",
        "|---" * 11 + "|",
    ]
    for one in found:
        plain, image, shared = (one.times[way] for way in reversed(WAYS))
        steps = [str(times["step"]) for times in (plain, image, shared)]
        pairs = [ratio(plain, image, "step"), ratio(image, shared, "step"), ratio(plain, shared, "step")]
        lines.append(f"| {' | '.join([*one.case.cells, *steps, *pairs])} |")
    return lines


def memories(found: list[Measured]) -> list[str]:
    lines = [
        "",
        "## Memory of an update",
        "",
        "The most that tensors take at a time, in MB, above weights and the optimiser's state: activations, gradients "
        "and what kernels need for themselves, by PyTorch's own count. The last column is TRL with gradient "
        "checkpointing, which costs it another forward pass.",
        "",
        "| model | T | G | P | L | TRL | vlmenv | share | vlmenv, repeated | TRL, checkpointing |",
        "|---" * 10 + "|",
    ]
    for one in found:
        memory = one.memory
        share = memory["shared"] / memory["TRL"]
        figures = [memory[name] / 1e6 for name in ("TRL", "shared", "plain", "TRL, recomputing")]
        trl, ours, plain, recomputing = (f"{figure:,.1f}" for figure in figures)
        cells = [*one.case.cells, trl, ours, f"**{share:.2f}**", plain, recomputing]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


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
