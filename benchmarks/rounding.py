"""How far AdamW's weights and moments in bfloat16 go from those in float32, by our optimizer and by torchao's.

    pip install torchao
    python benchmarks/rounding.py

400 steps on 512 x 256 weights from 1, at a learning rate of 1e-4. Gradients are noise around .02, with standard
deviation 1 in the first 20 steps and .05 later, so that the second moment should fall.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from common import hardware
from torch import nn

from vlmenv.algos.optimizers import RoundingAdamW

STEPS, LOUD = 400, 20


def main() -> None:
    rows = ["| | mean weight | second moment | first step, s | the others, s |", "|---|---|---|---|---|"]
    rows.append(row("float32", lambda own: torch.optim.AdamW(own, lr=1e-4, weight_decay=0.0), torch.float32))
    rows.append(row("ours, bf16", lambda own: RoundingAdamW(own, lr=1e-4), torch.bfloat16))
    rows.append(row("torchao, bf16", torchao, torch.bfloat16))
    print("\n".join([f"{hardware()}.", "", *rows]))


def torchao(own: list[nn.Parameter]) -> torch.optim.Optimizer:
    from torchao.optim import _AdamW

    made: torch.optim.Optimizer = _AdamW(own, lr=1e-4, weight_decay=0.0, bf16_stochastic_round=True)
    return made


def row(name: str, make: Callable[[list[nn.Parameter]], Any], dtype: torch.dtype) -> str:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.ones(512, 256, dtype=dtype))
    optimizer, generator, times = make([weight]), torch.Generator().manual_seed(1), [time.perf_counter()]
    for step in range(STEPS):
        noise = torch.randn(weight.shape, generator=generator)
        weight.grad = (noise * (1.0 if step < LOUD else 0.05) + 0.02).bfloat16().to(dtype)
        optimizer.step()
        times.append(time.perf_counter())
    moment = optimizer.state[weight]["exp_avg_sq"].float().mean().item()
    first, others = times[1] - times[0], times[-1] - times[1]
    return f"| {name} | {weight.float().mean().item():.6f} | {moment:.6f} | {first:.1f} | {others:.1f} |"


if __name__ == "__main__":
    main()
