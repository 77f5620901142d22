"""Steps of models as `vlmenv train` makes them: their peak of memory against the doctor's forecast, and their time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from common import NEVER, Case, Ours, observations, peak_memory
from hardware import METHODS, options

from gpu_parts.context import FAILED, Context, autocasting, free, head, row
from vlmenv.agents.families import weightless_family
from vlmenv.agents.fast_paths import fast_paths, written
from vlmenv.agents.trials import kind_of
from vlmenv.building import adapt, limits_of, load_for_training
from vlmenv.core.rollout import Observation
from vlmenv.doctor.prediction import Place, gigabytes, predict
from vlmenv.options.fields import replaced
from vlmenv.options.train import TrainConfig

_FIRST = ("full", "LoRA 64", "full, bf16 weights, 8-bit AdamW", "LoRA 64, nf4")
WAYS: dict[str, Mapping[str, Any]] = {
    **{name: METHODS[name] for name in _FIRST},
    **METHODS,
    "full, AdamW on the CPU": {"optimizer": "adamw_offload"},
}
"""Options by name, the most important first."""
_LONGEST = 32
"""Most tokens of a completion: what is compared is memory, and sampling takes time."""
_SECONDS = 20.0
"""About what a way takes on a card."""


def training(context: Context) -> Iterator[str]:
    case = context.args.cases[0]
    case = replace(case, new_tokens=min(_LONGEST, case.new_tokens))
    yield (
        f"`--precision {context.precision} --gradient-checkpointing`, {case.prompts} prompts of {case.tokens:,} tokens "
        f"with {case.group_size} completions of {case.new_tokens}; the model loaded from files in bfloat16. The "
        "forecast is that of `vlmenv doctor` for these options, with the moment of its peak. Both are peaks of "
        "tensors, from before the model is loaded to the end of the second step; reserved is what PyTorch's allocator "
        "took."
    )
    yield from head(
        *("weights", "forecast, GB", "at", "measured, GB", "above the forecast", "reserved, GB", "load, s"),
        *("first step, s", "second step, s", "of this rollout", "update"),
    )
    paths = ""
    for name, method in WAYS.items():
        found, told = attempt(method, case, context)
        paths = paths or told
        yield row(name, *found)
    yield f"\n{paths}"
    if context.device.type == "cuda":
        unused, whole = torch.cuda.mem_get_info()
        beside = whole - unused - torch.cuda.memory_reserved()
        yield f"\nBeside tensors {beside / 1e9:.2f} GB of the card are taken; the doctor counts with .7."


def attempt(method: Mapping[str, Any], case: Case, context: Context) -> tuple[list[str], str]:
    """The cells of a way, and the fast paths of its model."""
    if context.device.type == "cuda" and context.left < _SECONDS:
        return [f"left out: it takes some {_SECONDS:.0f} s, and {context.left:.0f} s are left", *[""] * 9], ""
    try:
        return run(method, case, context)
    except Exception as error:  # the other ways go on
        return [f"{FAILED}{kind_of(error)}", *[""] * 9], ""
    finally:
        free(context.device)


def run(method: Mapping[str, Any], case: Case, context: Context) -> tuple[list[str], str]:
    config = configuration(method, case, context)
    shown = observations(weightless_family(context.folder()), case)
    place = Place.here(context.device)
    forecast = predict(config, shown[0], place)
    if not forecast.fits:
        told = f"does not fit into {gigabytes(place.usable)}"
        return [f"{forecast.peak / 1e9:.3f}", forecast.moment, told, *[""] * 7], ""
    found: dict[str, Any] = {}
    peak = peak_memory(lambda: found.update(taken(config, shown, case, context)), context.args.device)
    expected, measured = (f"{one / 1e9:.3f}" for one in (forecast.peak, peak))
    sizes = [expected, forecast.moment, measured, f"{peak / forecast.peak - 1:+.1%}", reserved(context)]
    times = [found["load"], found["first"]["step"], *(found["second"][name] for name in ("step", "rollout", "update"))]
    return [*sizes, *(f"{one:.2f}" for one in times)], found["paths"]


def taken(config: TrainConfig[Any], shown: list[Observation], case: Case, context: Context) -> dict[str, Any]:
    """Loads the model and takes two steps: their seconds, and the model's fast paths."""
    started = time.perf_counter()
    agent = load_for_training(config, context.device)
    adapt(agent, config.adaptation, context.precision)
    agent.limits = limits_of(config)
    load = time.perf_counter() - started
    ours = Ours(agent, shown, case, autocasting(context), config=replace(config.trainer, steps=NEVER))
    first, second = ours.step(), ours.step()
    paths = written(fast_paths(agent.family_policy, context.dtype))
    return {"load": load, "first": first, "second": second, "paths": paths}


def reserved(context: Context) -> str:
    """The most that the allocator took, in GB."""
    return f"{torch.cuda.max_memory_reserved() / 1e9:.3f}" if context.device.type == "cuda" else ""


def configuration(method: Mapping[str, Any], case: Case, context: Context) -> TrainConfig[Any]:
    """The options of a way."""
    sizes = {"group_size": case.group_size, "micro_batch_size": case.group_size, "prompts_per_step": case.prompts}
    values = sizes | {"max_new_tokens": case.new_tokens, "precision": context.precision}
    return replaced(options(context.folder(), method), values)
