"""Optimiser steps of GRPO against TRL's, with a model of random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from common import LETTERS, Case, Contestant, Ours, Spread, alternate, observations, peak_memory
from profile_step import MODEL, PHASES, Clock, watch
from transformers import PreTrainedModel

from gpu_parts.context import FAILED, Context, autocasting, free, head, row
from vlmenv.agents.trials import kind_of

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
"""Dense bfloat16 operations per second, by the makers' data sheets (H100, H200: SXM)."""


@dataclass
class Measured:
    """A contestant's figures, or why there are none."""

    case: Case
    name: str
    times: dict[str, Spread] | None = None
    memory: int = 0
    """bytes, of an update"""
    operations: float = 0.0
    """of an update"""
    phases: dict[str, float] | None = None
    """median seconds of each in a step"""
    fault: str = ""


def steps(context: Context) -> Iterator[str]:
    """The first case."""
    return compared(context.args.cases[:1], context)


def more_steps(context: Context) -> Iterator[str]:
    """The other cases, which take longer."""
    return compared(context.args.cases[1:], context)


def compared(cases: Sequence[Case], context: Context) -> Iterator[str]:
    args = context.args
    yield (
        f"All weights and passes in {args.dtype} (`--precision bf16 --weights bf16`), gradient checkpointing, medians "
        f"of {args.rounds} steps after a first one. The contestants run one after the other. Utilisation is that of "
        "the update: the operations that each has to do in its own way (2 for each weight and token, three times that "
        "for the whole update, what is recomputed not counted, and the language model's attention), by time and the "
        "most that the device can do."
    )
    yield ""
    yield LETTERS
    yield from head(
        *("", "T", "G", "P", "L", "step, s", "rollout, s", "update, s", "log-probs, s", "generated tokens/s"),
        *("tokens/s", "utilisation", "peak memory, GB"),
    )
    own = []
    for case in cases:
        for name, maker in CONTESTANTS.items():
            found = alone(name, maker, case, context)
            own += [found] if found.phases is not None else []
            yield row(name, *case.cells[1:], *figures(found, context))
    yield from phases(own)


def alone(name: str, maker: Callable[[Case, Context], Contestant], case: Case, context: Context) -> Measured:
    """Measures one contestant, whose memory is free again afterwards."""
    if context.left < (needed := seconds_for(case, context)):
        return Measured(case, name, fault=f"left out: it takes some {needed:.0f} s, and {context.left:.0f} s are left")
    try:
        found = run(name, maker(case, context), case, context)
    except torch.OutOfMemoryError:
        found = Measured(case, name, fault="out of memory")
    except Exception as error:  # the other contestant goes on
        found = Measured(case, name, fault=f"{FAILED}{kind_of(error)}")
    free(context.device)
    return found


def seconds_for(case: Case, context: Context) -> float:
    """About what a contestant takes on a card: .06 s for a token of each step, twice as many steps for the phases."""
    if context.device.type == "cpu":
        return 0.0
    return 15 + 2 * (1 + context.args.rounds) * (2 + 0.06 * case.new_tokens)


def run(name: str, contestant: Contestant, case: Case, context: Context) -> Measured:
    times = alternate({name: contestant}, context.args.rounds)[name]
    memory = peak_memory(contestant.update, context.args.device)
    ours = contestant if isinstance(contestant, Ours) else None
    model = contestant.trainer.model if ours is None else ours.agent.family.model  # type: ignore[attr-defined]
    operations = 3 * forward_operations(model, case, shared=ours is not None)
    by_phase = None if ours is None else phases_of(ours, context)
    return Measured(case, name, times, memory, operations, by_phase)


def phases_of(ours: Ours, context: Context) -> dict[str, float]:
    clock = Clock(context.device)
    restore = watch(ours.trainer, clock)
    taken = []
    for _ in range(context.args.rounds):
        clock.seconds = dict.fromkeys(PHASES, 0.0)
        clock.enter("rest")
        ours.step()
        clock.leave()
        taken.append(clock.seconds)
    restore()
    return {phase: float(np.median([seconds[phase] for seconds in taken])) for phase in PHASES}


def new_ours(case: Case, context: Context) -> Ours:
    agent = context.agent(case)
    agent.enable_gradient_checkpointing()
    return Ours(agent, observations(agent.family, case), case, autocasting(context))


def new_trl(case: Case, context: Context) -> Contestant:
    from trl_contestant import TRL  # here, as it is missing on some machines

    family = context.family()
    options = {"use_cpu": context.device.type == "cpu", "bf16": context.precision == "bf16"}
    return TRL(family.model, family, observations(family, case), case, gradient_checkpointing=True, **options)


CONTESTANTS: dict[str, Callable[[Case, Context], Contestant]] = {"vlmenv": new_ours, "TRL": new_trl}


def forward_operations(model: PreTrainedModel, case: Case, *, shared: bool) -> float:
    """Multiplications and additions of a forward pass: those of weights, and of the language model's attention.

    Args:
        model: That runs.
        case: On what.
        shared: Whether a prompt is run once, or for each of its completions.
    """
    text, visual = model.config.get_text_config(), model.get_submodule("model.visual")
    merger = weights_in(visual.get_submodule("merger"))
    blocks = weights_in(model.get_submodule("model.language_model.layers"))
    patches = visual.spatial_merge_size**2
    copies = 1 if shared else case.group_size
    prompt = copies * (case.tokens * blocks + case.image_tokens * (patches * (weights_in(visual) - merger) + merger))
    head = text.vocab_size * text.hidden_size
    own = case.group_size * case.new_tokens * (blocks + head)
    met = copies * case.tokens**2 / 2 + case.group_size * case.new_tokens * (case.tokens + case.new_tokens / 2)
    width = text.num_attention_heads * model.get_submodule("model.language_model.layers.0.self_attn").head_dim
    return 2.0 * case.prompts * (prompt + own + 2 * met * width * text.num_hidden_layers)


def weights_in(module: torch.nn.Module) -> int:
    """Of matrices."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)


def figures(one: Measured, context: Context) -> list[str]:
    if one.times is None:
        return [one.fault, *[""] * 7]
    seconds = [one.times[name].median for name in ("step", "rollout", "update", "logprobs")]
    new = one.case.count * one.case.new_tokens
    speeds = [new / one.times["generate"].median, new / one.times["step"].median]
    peak = context.args.peak or peak_of(context.args.device)
    utilisation = "" if peak is None else f"{one.operations / one.times['update'].median / peak:.0%}"
    return [*(f"{s:,.2f}" for s in seconds), *(f"{s:,.0f}" for s in speeds), utilisation, f"{one.memory / 1e9:,.2f}"]


def peak_of(device: str) -> float | None:
    name: Any = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((peak for known, peak in PEAKS.items() if known in name), None)


def phases(own: list[Measured]) -> Iterator[str]:
    """vlmenv's own steps by phase."""
    if not own:
        return
    yield ""
    yield "vlmenv's step by phase, in seconds. Bold phases are not the model's."
    yield from head("", *(f"G {one.case.group_size}, L {one.case.new_tokens}" for one in own))
    for phase in PHASES:
        name = phase if phase in MODEL else f"**{phase}**"
        yield row(name, *(f"{(one.phases or {})[phase]:.3f}" for one in own))
