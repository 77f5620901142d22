"""All checks in order, and the table of their findings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from vlmenv.core.console import PlainTable, open_console, styled
from vlmenv.core.errors import VLMEnvError
from vlmenv.doctor import answers, machine, prompts, weights
from vlmenv.doctor.subject import GROUP, SAMPLES, Seen, Subject, Unchecked
from vlmenv.options.doctor import DoctorConfig


@dataclass(frozen=True, slots=True)
class Check:
    """A check, one line of the table."""

    name: str
    look: Callable[[Subject], Seen]
    remedy: str
    """advice if the check raises an error"""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a check."""

    check: str
    figure: str
    """what the check measured, or why it could not"""
    passed: bool | None
    """None if it was not checked: an earlier check failed, or there is nothing to check"""
    remedy: str = ""
    """advice if it failed"""


def model(subject: Subject) -> Seen:
    """Loads the model, with the engine if that starts."""
    subject.load_model()
    agent = subject.agent
    every, trained = (sum(p.numel() for p in part) for part in (agent.policy.parameters(), agent.parameters()))
    share = "all" if trained == every else f"{trained / 1e6:.4g} million"
    return f"{agent.family.model_type}, {every / 1e6:.4g} million parameters, {share} trained", ""


def samples(subject: Subject) -> Seen:
    """Loads the samples."""
    subject.load_samples()
    sizes = sorted({image.shape[1::-1] for one in subject.shown for image in one["images"]}, key=lambda s: s[0] * s[1])
    images = sum(len(one["images"]) for one in subject.shown[::GROUP])
    if not images:
        return f"{SAMPLES}, without images", ""
    shown = " to ".join(f"{width} x {height}" for width, height in dict.fromkeys((sizes[0], sizes[-1])))
    return f"{SAMPLES}, with {images} images of {shown} pixels", ""


def engine(subject: Subject) -> Seen:
    """Checks that the engine started and answers. Other checks compare how it encodes prompts."""
    agent, name = subject.agent, subject.config.generation.engine
    if subject.engine_fault:
        return subject.engine_fault, "docs/vllm.md tells what it needs. Without it, checks of the engine are skipped."
    if agent.engine is None:
        return "the model itself", ""
    room = agent.engine.max_length
    subject.try_engine()
    return f"{name}, with room for {room} tokens", ""


_FILES = "Copy the processor's files from the published model into the model's folder."
_FAILS = "The engine fails on plain requests: its message tells why."
CHECKS = (
    Check("versions", machine.versions, "Install vlmenv with pip, so that its requirements are known."),
    Check("device", machine.device, "Check the GPU with nvidia-smi, or give --device cpu."),
    Check(
        "model", model, "Give a folder in the published layout, or a name on the hub, of a family in docs/families.md."
    ),
    Check("fast paths", machine.paths, "Install the versions of transformers and torch that vlmenv requires."),
    Check("samples", samples, "`vlmenv data check` lists all faults of a data set."),
    Check("weight names", weights.names, "Take a checkpoint in the published layout."),
    Check("image features", prompts.image_features, _FILES),
    Check("engine", engine, "It fails on plain requests: its message tells why. Checks of the engine are skipped."),
    Check("prompt lengths", prompts.lengths, "`vlmenv data check --model …` lists the rows that are too long."),
    Check("prompt text", prompts.prompt_text, _FILES),
    Check("prompt images", prompts.prompt_images, _FILES),
    Check("log-probs", weights.logprobs, _FAILS),
    Check("greedy answers", weights.greedy, _FAILS),
    Check(
        "after an update",
        weights.update,
        "The engine cannot load new weights, and would generate with old ones. Serve the same model in the same "
        "layout.",
    ),
    Check("weights put back", weights.put_back, "As for the line before."),
    Check(
        "weight checksums",
        weights.checksums,
        "The engine gives no checksums of its weights: its message tells why. Use a version of vLLM that docs/vllm.md "
        "names.",
    ),
    Check("right answers", answers.right_answers, "A method of the task fails on its own samples: mend it."),
    Check("coordinates", answers.coordinates, "Leave out --coordinates."),
    Check("answers read", answers.read, "The task fails on an answer of the model: fix its parse()."),
    Check("answers cut off", answers.cut_off, _FAILS),
    Check("rewards", answers.rewards, "A reward term fails on an answer of the model: its message names the term."),
    Check("memory", machine.memory, "Memory cannot be predicted: try one step before a long run."),
)
"""In order: later checks need what earlier ones loaded."""


def examine(config: DoctorConfig[Any], device: torch.device, console: Console | None = None) -> list[Finding]:
    """Runs all checks. An error in a check fails only that check."""
    console = console or open_console(quiet=True)
    with closing(Subject(config, device)) as subject, console.status("") as status:
        found = []
        for check in CHECKS:
            status.update(f"checking: {check.name}")
            found.append(_looked(check, subject))
        return found


def _looked(check: Check, subject: Subject) -> Finding:
    try:
        figure, remedy = check.look(subject)
    except Unchecked as reason:
        return Finding(check.name, str(reason), None)
    except Exception as error:
        told = str(error) if isinstance(error, VLMEnvError) else f"{type(error).__name__}: {error}"
        return Finding(check.name, told, False, check.remedy)
    return Finding(check.name, figure, not remedy, remedy)


def findings_table(config: DoctorConfig[Any], findings: Sequence[Finding]) -> Table:
    """A table with a line per check."""
    table = PlainTable(title=f"{config.model}, {config.env}, engine {config.generation.engine}")
    table.add_column("check", no_wrap=True)
    table.add_column("found", ratio=1, overflow="fold")
    table.add_column("passed, or what to do", ratio=1, overflow="fold")
    for one in findings:
        word, style = ("not checked", "yellow") if one.passed is None else ("passed", "green")
        verdict = styled(("failed: ", "red"), one.remedy) if one.passed is False else styled((word, style))
        table.add_row(one.check, one.figure, verdict)
    return table
