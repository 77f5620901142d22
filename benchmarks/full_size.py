"""A step of LoRA training of full-size models on this machine: its memory against the prediction, its log-probs against
those of plain transformers. Weights are random; configuration and processor are the published ones.

    python benchmarks/full_size.py --models FOLDER --image PHOTO.jpg
    python benchmarks/full_size.py --models FOLDER --image PHOTO.jpg --float32

The second one takes no step: it compares log-probs with all weights in float32. FOLDER is that of
`benchmarks/hardware.py`. A model takes twice its size of disk and memory for a while; on two cores a step takes
minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from hardware import MODELS, folder_of
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

from vlmenv.agents.families import weightless_family
from vlmenv.agents.saving import published_weights
from vlmenv.agents.weights import tied_names
from vlmenv.algos import Trainer, find_algorithm
from vlmenv.building import adapt, limits_of, load_for_training, task_arguments
from vlmenv.core.rollout import Rollout
from vlmenv.doctor.forecast import predict
from vlmenv.doctor.prediction import Place
from vlmenv.envs.making import make_envs
from vlmenv.options.fields import replaced
from vlmenv.options.train import TrainConfig, default_config

HERE = Path(__file__).parent
GROUP, TOKENS, RANK, PIXELS = 4, 32, 16, 256 * 28 * 28


def write_weights(folder: Path, dtype: torch.dtype) -> None:
    """Writes random weights by their published names, a file of about 1 GB at a time."""
    family = weightless_family(folder)
    shapes = {name: one.shape for name, one in published_weights(family, family.model.state_dict()).items()}
    random, index, part, count = torch.Generator().manual_seed(0), {}, {}, 0
    tied = tied_names(family.model)
    for name, shape in shapes.items():
        if name in tied:
            continue
        is_norm = len(shape) == 1 and name.endswith("weight")
        made = torch.randn(shape, generator=random).mul_(0.02).to(dtype)
        part[name] = torch.ones(shape, dtype=dtype) if is_norm else made
        if sum(one.nbytes for one in part.values()) > 1e9:
            count += 1
            index |= _written(folder, part, count)
            part = {}
    index |= _written(folder, part, count + 1)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _written(folder: Path, part: dict[str, torch.Tensor], number: int) -> dict[str, str]:
    file = f"model-{number:05}.safetensors"
    save_file(part, folder / file, {"format": "pt"})
    return dict.fromkeys(part, file)


def configuration(folder: Path, data: Path) -> TrainConfig[Any]:
    """The options of the step."""
    values = {"model": str(folder), "dataset": [str(data)], "precision": "bf16", "gradient_checkpointing": True}
    values |= {"lora_rank": RANK, "group_size": GROUP, "prompts_per_step": 1, "max_new_tokens": TOKENS, "steps": 1}
    return replaced(default_config(), values | {"max_pixels": PIXELS, "eval_limit": 0, "device": "cpu"})


def step(folder: Path, data: Path) -> None:
    """A child process: predicts a step, takes it, and prints what both took."""
    torch.set_num_threads(os.cpu_count() or 1)
    config = configuration(folder, data)
    envs = make_envs(config.env, GROUP, group_size=GROUP, **config.data.arguments(), **task_arguments(config))
    observation = {key: value[0] for key, value in envs.reset(seed=0)[0].items()}
    predicted = predict(config, observation, Place(1e12, is_card=False)).peak
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    own, started = _status("VmRSS"), time.perf_counter()
    agent = load_for_training(config, torch.device("cpu"))
    adapt(agent, config.adaptation, "bf16")
    agent.limits = limits_of(config)
    loaded, loading = time.perf_counter() - started, _status("VmHWM")
    algorithm = find_algorithm(config.algo).make(config.algorithm)
    trainer = Trainer(agent, envs, algorithm, config.trainer, accelerator)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory begins anew
    started = time.perf_counter()
    result = next(iter(trainer.train(seed=0)))
    seconds, peak = time.perf_counter() - started, _status("VmHWM")
    rollout = result.rollouts.rollout
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), agent.lora.as_at_start():
        values = agent.logprobs(rollout)
    keep(folder, rollout, values.values)
    told = {
        "predicted": predicted + own,
        "peak": peak,
        "process": own,
        "loading": loading,
        "prompt": len(rollout.prompts[0].input_ids),
    }
    print("RESULT", json.dumps(told | {"loaded": loaded, "seconds": seconds}), flush=True)


def keep(folder: Path, rollout: Rollout, values: torch.Tensor) -> None:
    """Writes what plain transformers needs to compute the same log-probs, and these."""
    prompt = rollout.prompts[0]
    images = {name: one.numpy() for name, one in prompt.images.items()}
    tokens = np.stack([one.token_ids for one in rollout.completions])
    np.savez(folder / "rollout.npz", input_ids=prompt.input_ids, tokens=tokens, found=values.numpy(), **images)


def answer(folder: Path, data: Path) -> None:
    """A child process: samples completions in float32 and computes their log-probs."""
    torch.set_num_threads(os.cpu_count() or 1)
    config = replaced(configuration(folder, data), {"precision": "fp32", "lora_rank": None})
    envs = make_envs(config.env, GROUP, group_size=GROUP, **config.data.arguments(), **task_arguments(config))
    agent = load_for_training(config, torch.device("cpu"))
    agent.limits = limits_of(config)
    agent.seed(0)
    with torch.no_grad():
        rollout = agent.rollout(envs.reset(seed=0)[0])
        keep(folder, rollout, agent.logprobs(rollout).values)
    print("RESULT", json.dumps({"prompt": len(rollout.prompts[0].input_ids)}), flush=True)


def plain(folder: Path, data: Path, dtype: torch.dtype) -> None:
    """A child process: log-probs of the same completions by plain transformers, and how far they are off."""
    torch.set_num_threads(os.cpu_count() or 1)
    with np.load(folder / "rollout.npz") as kept:
        known = dict(kept)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
    images = {
        name: torch.from_numpy(one) for name, one in known.items() if name not in ("input_ids", "tokens", "found")
    }
    prompt, found = torch.from_numpy(known["input_ids"]), []
    banned = torch.from_numpy(weightless_family(folder).banned_tokens)
    for tokens in torch.from_numpy(known["tokens"]):
        ids = torch.cat([prompt, tokens])[None]
        kinds = (ids == model.config.image_token_id).long()
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, **images).logits
        logits = logits[0, len(prompt) - 1 : -1].float().index_fill_(-1, banned, -torch.inf)
        found.append(torch.log_softmax(logits, -1).gather(-1, tokens[:, None])[:, 0])
    gaps = (torch.stack(found) - torch.from_numpy(known["found"])).abs()
    print("RESULT", json.dumps({"mean_gap": gaps.mean().item(), "largest_gap": gaps.max().item()}), flush=True)


def _status(name: str) -> float:
    """Bytes of a line of this process's status."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024.0 * int(found[1])


def _child(what: str, folder: Path, data: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", what, str(folder), str(data)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))[7:])


def measured(name: str, models: Path, image: Path, *, float32: bool) -> str:
    """A row of the table."""
    with tempfile.TemporaryDirectory() as into:
        folder, data = folder_of(name, models, Path(into)), Path(into) / "photo.jsonl"
        width, height = Image.open(image).size
        row = {
            "image": str(image.resolve()),
            "question": "the largest thing",
            "answer": [0, 0, width // 2, height // 2],
        }
        data.write_text(json.dumps(row) + "\n")
        write_weights(folder, torch.float32 if float32 else torch.bfloat16)
        found = _child("answer" if float32 else "step", folder, data)
        found |= _child("plain32" if float32 else "plain", folder, data)
    gaps = [f"{found[key]:{'.1e' if float32 else '.4f'}}" for key in ("mean_gap", "largest_gap")]
    cells = [name, f"{found['prompt']:.0f}", *([] if float32 else measures(found)), *gaps]
    return "| " + " | ".join(cells) + " |"


def measures(found: dict[str, float]) -> list[str]:
    """Memory and time of a step, as cells of its row."""
    share = found["peak"] / found["predicted"] - 1
    sizes = [f"{found[key] / 1e9:.2f}" for key in ("predicted", "peak")]
    times = [f"{found[key]:.0f} s" for key in ("loaded", "seconds")]
    return [*sizes, f"{share:+.1%}", f"{found['loading'] / 1e9:.2f}", *times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", type=Path, required=True, help="folder of published configurations and processors")
    parser.add_argument("--image", type=Path, required=True, help="photo")
    parser.add_argument("--only", nargs="*", default=["Qwen2.5-VL-3B", "Qwen3-VL-4B"], choices=list(MODELS))
    parser.add_argument("--float32", action="store_true", help="compare log-probs in float32, and take no step")
    options = parser.parse_args()
    for name in options.only:
        print(measured(name, options.models, options.image, float32=options.float32), flush=True)


CHILDREN = {
    "step": step,
    "answer": answer,
    "plain": partial(plain, dtype=torch.bfloat16),
    "plain32": partial(plain, dtype=torch.float32),
}

if __name__ == "__main__":
    if "--child" in sys.argv:
        CHILDREN[sys.argv[2]](Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
