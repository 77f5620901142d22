"""The first thing to run on a card: within ten minutes it checks and measures what was tested on CPUs.

    python benchmarks/gpu.py --output benchmarks/gpu.md

Sections run in the order of their importance, each in a process of its own, so that none takes another one along. What
fails is told, and the others go on. The page is written anew whenever a section has found something.

The model has the shape of `--model` and random weights: of that folder or repository only the configuration, the
tokenizer and the image processor are read. Where the hub is not reached, `--models` takes them from a folder. TRL, vLLM
and bitsandbytes are measured where they are installed. The exit status is 1 if a section failed.
"""

from __future__ import annotations

import importlib.metadata
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import tyro
from common import hardware
from gpu_parts.context import FAILED, Args, Context, SkippedError, head, row, source_of
from gpu_parts.engines import servers, vllm
from gpu_parts.equality import equality
from gpu_parts.kernels import kernels
from gpu_parts.steps import more_steps, steps
from gpu_parts.training import training

from vlmenv.agents.trials import kind_of
from vlmenv.processes import end_with_parent


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    name: str
    title: str
    write: Callable[[Context], Iterator[str]]
    seconds: int
    """that it takes on a card, about"""


SECTIONS = (
    Section("kernels", "Kernels against the ways that they replace", kernels, 75),
    Section("equality", "Shared prompts against plain rows", equality, 40),
    Section("training", "Memory against the forecast", training, 60),
    Section("steps", "Steps against TRL's", steps, 60),
    Section("vllm", "vLLM in the same process", vllm, 90),
    Section("servers", "A server of vLLM on the same card", servers, 75),
    Section("more", "More steps against TRL's", more_steps, 90),
)
LIBRARIES = ("transformers", "accelerate", "trl", "vllm", "bitsandbytes", "triton")
_SKIPPED = "skipped: "


def main(args: Args) -> int:
    """Writes the page; 1 if a section failed."""
    started = time.time()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA GPU here; --device cpu tries the script out, with a small model")
    if unknown := set(args.sections) - {one.name for one in SECTIONS}:
        raise SystemExit(f"there is no section {', '.join(sorted(unknown))}; there are {', '.join(_names())}")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        (scratch / "source").mkdir()
        context = Context(args, source_of(args, scratch / "source"), scratch, started + 60 * args.minutes)
        page = Page(context)
        for section in page.sections:
            carry_out(section, page)
        page.write()
    print(page.text())
    return int(any(state.startswith(FAILED) for state in page.states.values()))


def _names() -> list[str]:
    return [one.name for one in SECTIONS]


class Page:
    """What the sections have found so far."""

    def __init__(self, context: Context) -> None:
        self.context, wanted = context, context.args.sections
        self.sections = [one for one in SECTIONS if one.name in wanted or not wanted]
        self.states: dict[str, str] = {}
        self._top = top(context.args)

    def part(self, section: Section) -> Path:
        """The file that a section writes."""
        return self.context.scratch / f"{section.name}.md"

    def text(self) -> str:
        table = [row(one.title, self.states.get(one.name, "not begun")) for one in self.sections]
        lines = [*self._top, *head("section", "state"), *table]
        for section in self.sections:
            if self.part(section).exists():
                lines += ["", f"## {section.title}", "", self.part(section).read_text(encoding="utf-8").rstrip()]
        return "\n".join(lines) + "\n"

    def write(self) -> None:
        if self.context.args.output is not None:
            self.context.args.output.write_text(self.text(), encoding="utf-8")


def top(args: Args) -> list[str]:
    """The head of the page, with the hardware."""
    found = {name: _version(name) for name in LIBRARIES}
    versions = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    missing = ", ".join(name for name, version in found.items() if not version)
    return [
        "# On a GPU",
        "",
        f"    {' '.join(['python benchmarks/gpu.py', *sys.argv[1:]])}",
        "",
        f"{card(args.device)}; {hardware()}, {versions}; not installed: {missing or 'nothing of these'}. A model of "
        f"the shape of {args.model} with random weights.",
    ]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def card(device: str) -> str:
    """The GPU, its memory and its driver."""
    if device == "cpu":
        return "no GPU"
    fields = "--query-gpu=name,memory.total,driver_version"
    try:
        told = subprocess.run(
            ["nvidia-smi", fields, "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
        name, memory, driver = (one.strip() for one in told.stdout.splitlines()[0].split(","))
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return f"{torch.cuda.get_device_name()} (nvidia-smi tells no driver)"
    return f"{name}, {memory}, driver {driver}, CUDA {torch.version.cuda}"


def carry_out(section: Section, page: Page) -> None:
    """Runs a section in a process of its own, and notes how it ended."""
    left = page.context.left
    if left < (section.seconds if page.context.device.type == "cuda" else 0):
        page.states[section.name] = f"left out: it takes some {section.seconds} s, and {max(0, left):.0f} s were left"
        return
    started = time.time()
    page.states[section.name] = "under way"
    process = multiprocessing.get_context("spawn").Process(
        target=work, args=(section.name, page.context, page.part(section))
    )
    process.start()
    while process.is_alive() and page.context.left > 0:
        process.join(min(1.0, max(0.0, page.context.left)))
        page.write()
    page.states[section.name] = f"{state(process, page.part(section))}, {time.time() - started:.0f} s"
    page.write()
    print(f"{section.title}: {page.states[section.name]}", flush=True)


def state(process: BaseProcess, part: Path) -> str:
    """How a section has ended, after it was stopped if it had not."""
    if process.is_alive():
        end(process)
        return "stopped at the limit"
    if process.exitcode:
        return f"{FAILED}its process ended with status {process.exitcode}"
    last = part.read_text(encoding="utf-8").rstrip().rpartition("\n")[2]
    if last.startswith(FAILED):
        return last
    if last.startswith(_SKIPPED):
        return last
    faults = sum(part.read_text(encoding="utf-8").count(mark) for mark in ("**no**", FAILED))
    return f"done, **faults told: {faults}**" if faults else "done"


def end(process: BaseProcess) -> None:
    """Ends a section's process, and those that it has started."""
    with suppress(ProcessLookupError):  # it leads a group only once it has begun
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.kill()
    process.join()


def work(name: str, context: Context, part: Path) -> None:
    """The process of a section: writes its lines one by one."""
    os.setsid()
    end_with_parent()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are ended too
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    section = next(one for one in SECTIONS if one.name == name)
    with part.open("w", encoding="utf-8", buffering=1) as stream:
        try:
            for line in section.write(context):
                print(line, file=stream)
        except SkippedError as reason:
            print(f"{_SKIPPED}{reason}", file=stream)
        except Exception as error:
            traceback.print_exc()
            print(f"\n{FAILED}{kind_of(error)}", file=stream)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
