"""The number of kernels that PyTorch's compiler makes of each fused function for an H100, without one.

    python benchmarks/paper_gpu/compiled.py

It needs the package `triton`. Functions are scheduled for the card and never run. The exit status is 1 if a number is
another than the one that `vlmenv.agents.fusing` counts with.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

from paper_gpu.device import NoDevice, make_device

try:
    make_device()
    import triton
except (NoDevice, ImportError) as error:
    sys.exit(f"no compiler on paper: {error}")

import torch
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import metrics
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map
from triton.backends.compiler import GPUTarget

import vlmenv.agents.policy  # noqa: F401 (whose modules define the functions)
from vlmenv.agents.fusing import ROWS, Fused

TOKENS = 8192
"""Tokens, in place of the few of an example."""
CARD = SimpleNamespace(
    name="H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    warp_size=32,
    total_memory=80 * 10**9,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20,
)
"""Properties of an H100 in CUDA's names: CUDA C++ programming guide, compute capability 9.0."""


def count(fused: Fused) -> int:
    """The number of kernels of a function."""
    arguments, mode = fused.example(), FakeTensorMode(allow_non_fake_inputs=True)

    def placed(one: Any) -> Any:
        if not isinstance(one, Tensor):
            return one
        sizes = [TOKENS if size == ROWS else size for size in one.shape]
        return torch.empty(sizes, dtype=one.dtype, device="cuda")

    with mode, torch.no_grad():
        placed_arguments = tree_map(placed, arguments)
        tensors = [one for one in placed_arguments if isinstance(one, Tensor)]
        graph = make_fx(torch.func.functionalize(_of_tensors(fused, placed_arguments)), select_decomp_table())(*tensors)
    metrics.reset()
    lowering = GraphLowering(graph, example_inputs=tensors)
    handlers = V.set_fake_mode(mode), V.set_graph_handler(lowering), V.set_debug_handler(DebugContext())
    with handlers[0], handlers[1], handlers[2], V.set_extern_kernel_nodes([]):
        lowering.run(*tensors)
        lowering.codegen()
    return int(metrics.generated_kernel_count)


def _of_tensors(fused: Fused, arguments: tuple[Any, ...]) -> Callable[..., tuple[Any, ...]]:
    """The function of its tensors alone."""

    def call(*tensors: Tensor) -> tuple[Any, ...]:
        left = iter(tensors)
        return tuple(
            tree_leaves(fused.function(*(next(left) if isinstance(one, Tensor) else one for one in arguments)))
        )

    return call


def main() -> None:
    target = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0),
    )
    triton.runtime.driver.set_active(target)
    properties = {"get_device_properties": lambda device=None: CARD, "current_device": lambda: 0}
    with (
        patch.multiple(torch.cuda, **properties, get_device_capability=lambda device=None: (9, 0)),
        patch.multiple(torch.cuda, is_available=lambda: True, device_count=lambda: 1),
        patch.object(torch.cuda, "_get_device_properties", lambda device=None: CARD, create=True),
        patch.multiple(CudaInterface.Worker, **{name: staticmethod(one) for name, one in properties.items()}),
        patch.object(CudaInterface, "is_available", staticmethod(lambda: True)),
    ):
        found = {one.function.__name__: (count(one), one.kernels) for one in Fused.every}
    for name, (made, expected) in found.items():
        print(f"{name}: {made} kernels" + ("" if made == expected else f", and not {expected}"))
    sys.exit(any(made != expected for made, expected in found.values()))


if __name__ == "__main__":
    main()
