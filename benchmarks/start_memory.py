"""Resident memory of each rank when training starts, for a random model of 200 million float32 parameters.

python benchmarks/start_memory.py MODEL_FOLDER makes the model, and then:
accelerate launch --config_file examples/accelerate/fsdp2.yaml --num_processes 2 benchmarks/start_memory.py MODEL_FOLDER

Set MALLOC_MMAP_THRESHOLD_=1000000 before, as glibc otherwise keeps the freed memory of tensors of up to 32 MB.
"""

from __future__ import annotations

import resource
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
    """Prints this rank's memory before the model is loaded, at its peak until the first step, and then."""
    config = parse(["--model", str(folder), "--beta", "0.1", "--device", "cpu"], "start_memory").config
    accelerator = Accelerator(cpu=True)
    envs = _training_envs(config, accelerator)
    before = now()
    with ExitStack() as opened:
        _make_trainer(config, Parts(), envs, accelerator, opened, Console(quiet=True))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        rank = f"rank {accelerator.process_index} of {accelerator.num_processes}"
        print(
            f"{rank}: before {before:.2f} GB, peak +{peak - before:.2f} GB, at the first step +{now() - before:.2f} GB"
        )


def now() -> float:
    """Resident memory in GB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e9


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = Path(sys.argv[1])
    measure(given) if given.is_dir() else make_model(given)
