"""What the sections are given: options, time, and a model of random weights."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from common import GEMMA3, QWEN35, Case, family_without_end, model_from, processor_of
from hardware import MODELS, folder_of
from huggingface_hub import snapshot_download
from transformers import AutoConfig

from vlmenv.agents.families import Family
from vlmenv.agents.trials import kind_of
from vlmenv.agents.vlm import Sampling, VLMAgent

GRID = tuple(Case("3B", 1152, size, 2, new_tokens, 0.9) for new_tokens in (128, 512) for size in (8, 16))
FAILED = "**failed**: "
"""Begins what is told of an error."""


@dataclass
class Args:
    """Measure on a GPU."""

    model: str = "Qwen/Qwen2.5-VL-3B-Instruct"
    """Folder, or repository on the Hugging Face hub, whose configuration and processor are used."""
    models: Path | None = None
    """Folder of published configurations, as for `benchmarks/hardware.py`, in place of the hub."""
    device: Literal["cuda", "cpu"] = "cuda"
    """The CPU is for trying this script out."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type of passes, and of the weights where all have one."""
    minutes: float = 9.5
    """Limit of the whole. Sections that would not end before it are left out."""
    sections: tuple[str, ...] = ()
    """Names of the sections to run. None: all."""
    rounds: int = 2
    """Steps of each contestant that are counted."""
    cases: tuple[Case, ...] = GRID
    """Steps that are timed, the most important first; the first one gives the sizes of the other sections too."""
    small: tuple[str, ...] = ("1.6M", QWEN35, GEMMA3)
    """Small models on which shared prompts are compared with plain rows."""
    peak: float | None = None
    """Operations per second that the device can do at most, where it is not known here."""
    output: Path | None = None
    """Markdown file for the page."""


class SkippedError(Exception):
    """A section has nothing to do here; the message tells why."""


@dataclass(frozen=True)
class Context:
    """What a section is given."""

    args: Args
    source: Path
    """folder of a configuration and a processor, without weights"""
    scratch: Path
    """folder that the sections share"""
    until: float
    """end of the time, as `time.time` tells it"""

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.until - time.time()

    @property
    def device(self) -> torch.device:
        return torch.device(self.args.device)

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.args.dtype)
        return found

    @property
    def precision(self) -> str:
        """The data type by its name in `vlmenv train`."""
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"

    def family(self, dtype: torch.dtype | None = None) -> Family:
        """The model with random weights on the device. Its completions are as long as they may be."""
        model = model_from(AutoConfig.from_pretrained(self.source), self.args.device, dtype or self.dtype)
        return family_without_end(model, processor_of(self.source))

    def agent(self, case: Case, dtype: torch.dtype | None = None) -> VLMAgent:
        return VLMAgent(self.family(dtype), self.source, sampling=Sampling(max_new_tokens=case.new_tokens))

    def folder(self) -> Path:
        """A folder of the model with random weights in bfloat16, as models are published; written once."""
        folder = self.scratch / "model"
        if not folder.exists():
            agent = self.agent(self.args.cases[0], torch.bfloat16)
            agent.publish(folder, dtype=torch.bfloat16)
            agent.family.processor.image_processor.save_pretrained(folder)  # it leaves images as large as they are
            del agent
            free(self.device)
        return folder


def source_of(args: Args, into: Path) -> Path:
    """A folder with the model's configuration and processor.

    Raises:
        SystemExit: There is none.
    """
    if args.models is not None:
        name = args.model.rpartition("/")[2].removesuffix("-Instruct")
        if name not in MODELS:
            raise SystemExit(f"with --models, --model is one of {', '.join(MODELS)}, and not {name}")
        if not (args.models / MODELS[name][0] / "config.json").is_file():
            raise SystemExit(f"{args.models / MODELS[name][0]} has no configuration of {name}")
        return folder_of(name, args.models, into)
    if Path(args.model).is_dir():
        return Path(args.model)
    wanted, ignored = ["*.json", "*.jinja", "*.txt"], ["*.index.json"]
    try:
        return Path(snapshot_download(args.model, allow_patterns=wanted, ignore_patterns=ignored))
    except Exception as error:  # of networks there are many
        raise SystemExit(
            f"{args.model} is neither a folder nor found on the hub ({kind_of(error)}); where no hub is reached, give "
            "--models a folder of configurations, as benchmarks/hardware.py takes it"
        ) from error


def free(device: torch.device) -> None:
    """Gives back the memory of what is not used any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def autocasting(context: Context) -> Accelerator:
    """The device, with passes in the context's precision."""
    half = "bf16" if context.precision == "bf16" else "no"
    return Accelerator(cpu=context.args.device == "cpu", mixed_precision=half)


def cell(text: object) -> str:
    """Text that a cell of a table can hold."""
    return str(text).replace("|", "/").replace("\n", " ")


def row(*cells: object) -> str:
    """A line of a table."""
    return f"| {' | '.join(map(cell, cells))} |"


def head(*names: str) -> list[str]:
    """The first lines of a table."""
    return ["", row(*names), "|---" * len(names) + "|"]
