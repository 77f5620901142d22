"""Resident memory of each rank when training starts and resumes, for a random model of 200 million float32 parameters.

python benchmarks/start_memory.py MODEL_FOLDER makes the model, and then:
accelerate launch --config_file examples/accelerate/fsdp2.yaml --num_processes 2 benchmarks/start_memory.py MODEL_FOLDER
With examples/accelerate/ddp.yaml every rank has whole copies. Figures are in docs/distributed.md.

Set MALLOC_MMAP_THRESHOLD_=1000000 before, as glibc otherwise keeps the freed memory of tensors of up to 32 MB.
"""

from __future__ import annotations

import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.console import Console
from transformers import AutoConfig, AutoModelForImageTextToText

from vlmenv.agents.vlm import find_model
from vlmenv.commands.train import Parts, _make_trainer, _training_envs, parse
from vlmenv.processes import leave


def make_model(folder: Path) -> None:
    """Writes the built-in model with wider and more layers."""
    config = AutoConfig.from_pretrained(find_model("builtin"))
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 1024, 4096, 12
    text.num_attention_heads = text.num_key_value_heads = 1024 // text.head_dim
    config.vision_config.out_hidden_size = 1024
    folder.mkdir(parents=True)
    for file in find_model("builtin").iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copyfile(file, folder / file.name)
    model = AutoModelForImageTextToText.from_config(config)
    print(f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.0f} million parameters")
    model.save_pretrained(folder)


def measure(folder: Path) -> None:
    """Prints this rank's memory before the model is loaded, and what comes on top.

    That is: at the peak until the first step, at the first step, and at the peak while a checkpoint is restored.
    """
    config = parse(["--model", str(folder), "--beta", "0.1", "--device", "cpu"], "start_memory").config
    accelerator = Accelerator(cpu=True)
    envs = _training_envs(config, accelerator)
    before = memory("VmRSS")
    forget_peak()
    with ExitStack() as opened:
        trainer = _make_trainer(config, Parts(), envs, accelerator, opened, Console(quiet=True))
        peak, then = memory("VmHWM"), memory("VmRSS")
        forget_peak()
        trainer.agent.load(folder)  # which has the layout of a checkpoint
        resumed = memory("VmHWM")
    told = ", ".join(
        f"{name} +{size - before:.2f} GB"
        for name, size in (("peak of the start", peak), ("at the first step", then), ("peak of resuming", resumed))
    )
    rank = f"rank {accelerator.process_index} of {accelerator.num_processes}"
    print(f"{rank}, {trainer.processes.name}: before {before:.2f} GB, {told}", flush=True)
    leave()


def memory(name: str) -> float:
    """Resident memory in GB: now (VmRSS), or at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith(f"{name}:"))


def forget_peak() -> None:
    """Lets the kernel count the peak anew."""
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = Path(sys.argv[1])
    measure(given) if given.is_dir() else make_model(given)
