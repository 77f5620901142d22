"""Reports which faster or leaner ways to compute the same are on, and why others are not.

Beside the policy's own ways, these are the private parts of other libraries (`vlmenv.compat`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from vlmenv import compat
from vlmenv.agents import fusing, step_graphs, wide_gradients
from vlmenv.agents.kernels import (
    CPUKernel,
    ExplicitKernel,
    FlashKernel,
    fault_of_fastest,
    kernel_for,
    segments_fault,
)
from vlmenv.agents.patch_embedding import PatchProjection
from vlmenv.agents.policy import Policy
from vlmenv.agents.vision_attention import attends_by_segments
from vlmenv.compat.transformers import keys_of_blocks


class FastPath(NamedTuple):
    """A way to compute the same faster or in less memory."""

    name: str
    state: str
    """"yes", "no", or how many of how many"""
    why: str = ""
    """why it is not on everywhere"""

    @property
    def written(self) -> str:
        """State and reason."""
        return self.state + (f" ({self.why})" if self.why else "")


def fast_paths(policy: Policy, dtype: torch.dtype) -> list[FastPath]:
    """Finds which fast paths of a policy are on.

    Args:
        policy: The policy.
        dtype: Data type in which attention is computed.
    """
    own = [_shared(policy), _lean(policy), *_vision(policy), _kernel(policy, dtype), *_on_gpus(policy, dtype)]
    return [*own, *map(_parts_of, compat.reports())]


def written(paths: list[FastPath]) -> str:
    """A line about fast paths."""
    return "fast paths: " + ", ".join(f"{path.name} {path.written}" for path in paths)


def _parts_of(library: compat.Report) -> FastPath:
    """The private parts of a library, which make other ways possible."""
    why = "; ".join(f"{name}: {problem}" for name, problem in library.problems.items())
    return FastPath(f"parts of {library.library}", f"{library.on} of {library.of}", why)


def _shared(policy: Policy) -> FastPath:
    if policy.share_prefixes:
        return FastPath("shared prompts", "yes")
    return FastPath("shared prompts", "no", "each completion repeats its prompt, as asked for")


def _lean(policy: Policy) -> FastPath:
    layers, recomputed = policy.lean_layers, any("forward" in one.__dict__ for one in policy.model.modules())
    reasons = [f"{name}: {fault}" for name, fault in layers.faults.items()]
    if recomputed:
        reasons.append("recomputed blocks keep nothing, so they count only while a block is recomputed")
    return FastPath("lean layers", f"{layers.on} of {layers.of}", "; ".join(reasons))


def _vision(policy: Policy) -> Iterator[FastPath]:
    """Those of the vision tower, as far as the family has them."""
    tower = policy.family.vision_tower()
    convolutions = [module for module in tower.modules() if isinstance(module, torch.nn.Conv3d)]
    if convolutions:
        is_on = all(isinstance(module, PatchProjection) for module in convolutions)
        yield FastPath("patches as matrices", *(("yes",) if is_on else ("no", "the patches overlap or are padded")))
    if policy.family.packs_images:
        is_on = attends_by_segments(tower)
        yield FastPath("images in one call", *(("yes",) if is_on else ("no", "the tower takes no other attention")))


def _on_gpus(policy: Policy, dtype: torch.dtype) -> Iterator[FastPath]:
    """Those that only GPUs have."""
    device, size = policy.device.type, _head_size(policy)
    if device != fusing.GPUS:
        return
    if isinstance(kernel_for(torch.empty(size, device=policy.device, dtype=dtype)), FlashKernel):
        yield _unless("attention without padding", segments_fault(device, dtype, size))
    fault = fusing.fault_of(device)
    yield _unless("compiled elementwise functions", fault)
    with torch.autocast(device, dtype, enabled=dtype.itemsize == 2):
        yield _unless("steps of sampling as graphs", step_graphs.fault_of(policy))
    uncompiled = "functions are not compiled" if fault else ""
    if dtype.itemsize == 2:
        yield _unless("float32 gradients at once", uncompiled or wide_gradients.fault_of(device, dtype))
    if uncompiled:
        yield _unless("rotations at once", uncompiled)
    else:
        yield _rotations(policy)


def _unless(name: str, fault: str) -> FastPath:
    return FastPath(name, "no" if fault else "yes", fault)


def _rotations(policy: Policy) -> FastPath:
    found = policy.rotations
    why = f"no rotation of halves: {', '.join(found.others)}" if found.others else ""
    return FastPath("rotations at once", f"{found.on} of {found.of}", why)


def _head_size(policy: Policy) -> int:
    """Size of the largest heads of the language model's attention."""
    return max(size for _, size in keys_of_blocks(policy.model.config.get_text_config()))


def _kernel(policy: Policy, dtype: torch.dtype) -> FastPath:
    size = _head_size(policy)
    query = torch.empty(size, device=policy.device, dtype=dtype)
    kernel, device = kernel_for(query), policy.device.type
    if isinstance(kernel, FlashKernel):
        return FastPath("flash attention", "yes")
    if isinstance(kernel, CPUKernel):
        return FastPath("flash attention", "yes", "PyTorch's for CPUs")
    other = "matrix products" if isinstance(kernel, ExplicitKernel) else "PyTorch's memory-efficient attention"
    name = str(dtype).removeprefix("torch.")
    why = f"{other} instead, for {name} heads of {size} on {device}"
    fault = fault_of_fastest(query)
    return FastPath("flash attention", "no", f"{why}: {fault}" if fault else why)
