"""Every kernel and compiled function against the way that it replaces, by the trials that choose them in training."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

from gpu_parts.context import Context, head, row
from vlmenv.agents.fast_paths import fast_paths
from vlmenv.agents.fusing import Fused
from vlmenv.agents.kernels import FlashKernel, Kernel, kernel_for, kernels_of, try_kernel, try_segments
from vlmenv.agents.trials import Trial
from vlmenv.agents.wide_gradients import try_products

HEADS = (32, 64, 72, 80, 128, 256)
"""Sizes of heads: the built-in model's, those of published towers and language models."""
DTYPES = (torch.float32, torch.bfloat16)


def kernels(context: Context) -> Iterator[str]:
    yield "Differences are those of values and gradients, as shares of the largest number."
    yield from attention(context.device)
    yield from compiled(context.device)
    yield from paths(context)


def attention(device: torch.device) -> Iterator[str]:
    """A line for each kernel and size of heads."""
    yield from head("attention", "heads of", "float32", "bfloat16")
    for name, attempt in trials(device.type).items():
        for size in HEADS:
            half = name.startswith(FlashKernel.__name__)  # alone
            wide = "for half precision" if half else told(attempt(torch.float32, size))
            yield row(name, size, wide, told(attempt(torch.bfloat16, size)))
    for masked in (False, True):
        for size in HEADS:
            taken = [kernel_for(torch.empty(size, device=device, dtype=dtype), masked=masked) for dtype in DTYPES]
            yield row(f"taken, {'with' if masked else 'without'} a mask", size, *(type(one).__name__ for one in taken))


def trials(device: str) -> dict[str, Callable[[torch.dtype, int], Trial]]:
    """Trials of a data type and a size of heads, by name."""

    def of(kernel: Kernel, masked: bool) -> Callable[[torch.dtype, int], Trial]:
        return lambda dtype, size: try_kernel(kernel, device, dtype, size, masked)

    found = {
        type(kernel).__name__ + (", masked" if masked else ""): of(kernel, masked)
        for masked in (False, True)
        for kernel in kernels_of(device, masked)
    }
    segments = {"FlashKernel, packed": lambda dtype, size: try_segments(device, dtype, size)}
    return found | (segments if device == "cuda" else {})


def compiled(device: torch.device) -> Iterator[str]:
    """What is compiled on CUDA."""
    if device.type != "cuda":
        yield ""
        yield "Compiled functions, and products with float32 results: skipped, they are for CUDA."
    else:
        yield from functions(device)


def functions(device: torch.device) -> Iterator[str]:
    """A line for each compiled function, with the time that its compilation takes, and one for wide products."""
    yield from head("compiled function", "difference", "compiled in, s")
    for one in Fused.every:
        started = time.perf_counter()
        trial = one.attempt(device)
        yield row(f"`{name_of(one)}`", told(trial), f"{time.perf_counter() - started:.1f}")
    yield row("products with float32 results", told(try_products(device.type, torch.bfloat16)), "")


def name_of(one: Fused) -> str:
    function = one.function
    return f"{function.__module__.rpartition('.')[2]}.{function.__name__}"


def paths(context: Context) -> Iterator[str]:
    """A line for each fast path of the model."""
    policy = context.agent(context.args.cases[0]).family_policy
    yield from head("fast path of the model", "on", "why not everywhere")
    for path in fast_paths(policy, context.dtype):
        yield row(path.name, path.state, path.why)


def told(trial: Trial) -> str:
    """A trial's result."""
    number = f"{trial.difference:.1e}"
    if not trial.fault:
        return number
    return f"**no**: {trial.fault}" + ("" if trial.difference != trial.difference else f" ({number})")
