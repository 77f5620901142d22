"""Optimiser steps of GRPO on a GPU, with a model of 3 billion parameters and images of a thousand tokens, against TRL.

    python benchmarks/gpu.py --output benchmarks/gpu.md

The model has the shape of `--model` and random weights: of that folder or repository only the configuration, the
tokenizer and the image processor are read. Contestants run one after the other, each alone in the GPU's memory, and
both with gradient checkpointing. With `--vllm`, where it is installed, vLLM generates too, in the same process.
"""

from __future__ import annotations

import gc
import logging
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from common import (
    LETTERS,
    Case,
    Contestant,
    Ours,
    Spread,
    alternate,
    family_without_end,
    hardware,
    model_from,
    new_agent,
    observations,
    peak_memory,
    processor_of,
    report,
    seconds_of,
)
from huggingface_hub import snapshot_download
from profile_step import MODEL, PHASES, Clock, watch
from transformers import AutoConfig, PreTrainedModel
from trl_contestant import TRL

from vlmenv.agents.engines.vllm import VLLMEngine
from vlmenv.agents.families import Family
from vlmenv.agents.vlm import VLMAgent

GRID = tuple(Case("3B", 1152, size, 2, new_tokens, 0.9) for size in (8, 16) for new_tokens in (128, 512))
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
"""Dense bfloat16 operations per second, by the makers' data sheets (H100, H200: SXM)."""


@dataclass
class Args:
    """Measure on a GPU."""

    model: str = "Qwen/Qwen2.5-VL-3B-Instruct"
    """Folder, or repository on the Hugging Face hub, whose configuration and processor are used."""
    device: Literal["cuda", "cpu"] = "cuda"
    """The CPU is for trying this script out."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of weights and arithmetic."""
    rounds: int = 3
    """Steps of each that are counted."""
    trl: bool = True
    """Measure TRL too."""
    vllm: bool = False
    """Measure generation by vLLM too."""
    cases: tuple[Case, ...] = GRID
    """What is measured."""
    peak: float | None = None
    """Operations per second that the device can do at most, where it is not known here."""
    output: Path | None = None
    """Markdown file for the tables."""


@dataclass
class Measured:
    """A contestant's figures; none where it ran out of memory."""

    case: Case
    name: str
    times: dict[str, Spread] | None = None
    memory: int = 0
    """bytes, of an update"""
    operations: float = 0.0
    """of an update"""
    phases: dict[str, float] | None = None
    """median seconds of each in a step"""


def main(args: Args) -> None:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA GPU here; --device cpu tries the script out, with a small model")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    found = [one for case in args.cases for one in measure(case, args)]
    engines = {case: generation(case, args) for case in args.cases} if args.vllm else {}
    report([*head(args, found), *speeds(found, args), *phases(found), *generating(engines)], args.output)


def measure(case: Case, args: Args) -> list[Measured]:
    makers: dict[str, Callable[..., Contestant]] = {"vlmenv": new_ours, **({"TRL": new_trl} if args.trl else {})}
    return [alone(name, maker, case, args) for name, maker in makers.items()]


def alone(name: str, maker: Callable[..., Contestant], case: Case, args: Args) -> Measured:
    """Measures one contestant, whose memory is free again afterwards."""
    try:
        found = run(name, maker(case, args), case, args)
    except torch.cuda.OutOfMemoryError:
        found = Measured(case, name)
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()
    print(name, case, "out of memory" if found.times is None else found.times["step"], flush=True)
    return found


def run(name: str, contestant: Contestant, case: Case, args: Args) -> Measured:
    times = alternate({name: contestant}, args.rounds)[name]
    memory = peak_memory(contestant.update, args.device)
    model = contestant.trainer.model if isinstance(contestant, TRL) else contestant.agent.family.model  # type: ignore[attr-defined]
    operations = 3 * forward_operations(model, case, shared=isinstance(contestant, Ours))
    by_phase = phases_of(contestant, args) if isinstance(contestant, Ours) else None
    return Measured(case, name, times, memory, operations, by_phase)


def phases_of(ours: Ours, args: Args) -> dict[str, float]:
    clock = Clock(torch.device(args.device))
    restore = watch(ours.trainer, clock)
    taken = []
    for _ in range(args.rounds):
        clock.seconds = dict.fromkeys(PHASES, 0.0)
        clock.enter("rest")
        ours.step()
        clock.leave()
        taken.append(clock.seconds)
    restore()
    return {phase: float(np.median([seconds[phase] for seconds in taken])) for phase in PHASES}


def generation(case: Case, args: Args) -> dict[str, Spread]:
    """Seconds of generating by the trainer's own sampler and by vLLM, and of what vLLM needs around it."""
    family = new_family(args)
    agent = new_agent(family, "shared", case.new_tokens)
    asked = [one for one in observations(family, case) for _ in range(case.group_size)]
    with tempfile.TemporaryDirectory() as folder:
        agent.save(Path(folder) / "model")
        family.processor.image_processor.save_pretrained(
            Path(folder) / "model"
        )  # it leaves images as large as they are
        engine = VLLMEngine(
            Path(folder) / "model",
            family,
            device=torch.device(args.device),
            dtype=getattr(torch, args.dtype),
            max_length=case.tokens + case.new_tokens,
        )
        engine.sleep()
        taken = [turn(agent, engine, asked) for _ in range(args.rounds + 1)][1:]
        agent.close()
    print(case, taken[-1], flush=True)
    return {what: Spread(tuple(one[what] for one in taken)) for what in taken[0]}


def turn(agent: VLMAgent, engine: VLLMEngine, asked: Any) -> dict[str, float]:
    agent.engine = None
    taken = {"hf": seconds_of(lambda: agent.rollout(asked))}
    agent.engine = engine
    steps = {"wake": agent.wake, "sync": agent.sync, "vllm": lambda: agent.rollout(asked), "sleep": agent.sleep}
    return taken | {what: seconds_of(step) for what, step in steps.items()}


def new_ours(case: Case, args: Args) -> Ours:
    family = new_family(args)
    agent = new_agent(family, "shared", case.new_tokens)
    agent.enable_gradient_checkpointing()
    return Ours(agent, observations(family, case), case, Accelerator(cpu=args.device == "cpu"))


def new_trl(case: Case, args: Args) -> TRL:
    family = new_family(args)
    on_cpu = args.device == "cpu"
    return TRL(family.model, family, observations(family, case), case, use_cpu=on_cpu, gradient_checkpointing=True)


def new_family(args: Args) -> Family:
    folder = processor_folder(args.model)
    model = model_from(AutoConfig.from_pretrained(folder), args.device, getattr(torch, args.dtype))
    return family_without_end(model, processor_of(folder))


def processor_folder(name: str) -> Path:
    """A folder, or what a repository holds beside its weights."""
    if Path(name).is_dir():
        return Path(name)
    return Path(
        snapshot_download(name, allow_patterns=["*.json", "*.jinja", "*.txt"], ignore_patterns=["*.index.json"])
    )


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


def head(args: Args, found: list[Measured]) -> list[str]:
    device = torch.cuda.get_device_name() if args.device == "cuda" else "no GPU"
    return [
        "# Optimiser steps of GRPO on a GPU",
        "",
        f"    python benchmarks/gpu.py --model {args.model}{' --vllm' if args.vllm else ''} --output benchmarks/gpu.md",
        "",
        f"{device}, {hardware(f'{args.dtype}, ')}; a model of the shape of {args.model} with random weights, gradient "
        f"checkpointing, medians of {args.rounds} steps. The contestants run one after the other. Utilisation is that "
        "of the update: the operations that each has to do in its own way (2 for each weight and token, three times "
        "that for the whole update, what is recomputed not counted, and the language model's attention), by time and "
        "the most that the device can do.",
        "",
        LETTERS,
    ]


def speeds(found: list[Measured], args: Args) -> list[str]:
    lines = [
        "",
        "| | T | G | P | L | step, s | rollout, s | update, s | log-probs, s | generated tokens/s | tokens/s "
        "| utilisation | peak memory, GB |",
        "|---" * 13 + "|",
    ]
    for one in found:
        first = [one.name, *one.case.cells[1:]]
        lines.append(f"| {' | '.join([*first, *figures(one, args)])} |")
    return lines


def figures(one: Measured, args: Args) -> list[str]:
    if one.times is None:
        return ["out of memory", *[""] * 7]
    seconds = [one.times[name].median for name in ("step", "rollout", "update", "logprobs")]
    new = one.case.count * one.case.new_tokens
    speeds = [new / one.times["generate"].median, new / one.times["step"].median]
    peak = args.peak or peak_of(args.device)
    utilisation = "" if peak is None else f"{one.operations / one.times['update'].median / peak:.0%}"
    return [*(f"{s:,.2f}" for s in seconds), *(f"{s:,.0f}" for s in speeds), utilisation, f"{one.memory / 1e9:,.2f}"]


def peak_of(device: str) -> float | None:
    name: Any = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((peak for known, peak in PEAKS.items() if known in name), None)


def phases(found: list[Measured]) -> list[str]:
    """vlmenv's own steps by phase."""
    own = [one for one in found if one.phases is not None]
    lines = ["", "## By phase", "", "Of vlmenv's step, in seconds. Bold phases are not the model's.", ""]
    lines.append(f"| | {' | '.join(f'G {one.case.group_size}, L {one.case.new_tokens}' for one in own)} |")
    lines.append("|---" * (1 + len(own)) + "|")
    for phase in PHASES:
        name = phase if phase in MODEL else f"**{phase}**"
        lines.append(f"| {name} | {' | '.join(f'{(one.phases or {})[phase]:.3f}' for one in own)} |")
    return lines if own else []


def generating(found: dict[Case, dict[str, Spread]]) -> list[str]:
    lines = [
        "",
        "## vLLM in the same process",
        "",
        "Tokens per second from observations to texts, right after an update of the weights; and seconds that vLLM "
        "takes to wake, to take the weights over and to sleep. hf is the trainer's own sampler.",
        "",
        "| T | G | P | L | hf, tokens/s | vllm, tokens/s | vllm to hf | wake | sync | sleep |",
        "|---" * 10 + "|",
    ]
    for case, one in found.items():
        hf, vllm = (case.count * case.new_tokens / one[name].median for name in ("hf", "vllm"))
        around = [f"{one[what].median:.2f}" for what in ("wake", "sync", "sleep")]
        cells = [*case.cells[1:], f"{hf:,.0f}", f"{vllm:,.0f}", f"{vllm / hf:.1f}×", *around]
        lines.append(f"| {' | '.join(cells)} |")
    return lines if found else []


if __name__ == "__main__":
    main(tyro.cli(Args))
