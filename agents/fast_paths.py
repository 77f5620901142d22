"""Reports which faster or leaner ways to compute the same are on, and why others are not.

Beside the policy's own ways, these are the private parts of other libraries (`vlmenv.compat`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from vlmenv import compat
from vlmenv.agents import wide_gradients
from vlmenv.agents.fusing import fault_of
from vlmenv.agents.kernels import CPUKernel, ExplicitKernel, FlashKernel, attends_in_segments, kernel_for
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
    if policy.device.type != "cuda":
        return
    query = torch.empty(_head_size(policy), device=policy.device, dtype=dtype)
    kernel = kernel_for(query)
    if isinstance(kernel, FlashKernel):
        yield FastPath("attention without padding", "yes" if attends_in_segments(kernel, query) else "no")
    fault = fault_of(policy.device.type)
    yield FastPath("compiled elementwise functions", "no" if fault else "yes", fault)
    if dtype.itemsize == 2 and not fault:
        unsummed = wide_gradients.fault_of(policy.device.type, dtype)
        yield FastPath("float32 gradients at once", "no" if unsummed else "yes", unsummed)
    rotations = policy.rotations
    yield FastPath("rotations at once", "no" if fault else f"{rotations.on} of {rotations.of}")


def _head_size(policy: Policy) -> int:
    """Size of the largest heads of the language model's attention."""
    return max(size for _, size in keys_of_blocks(policy.model.config.get_text_config()))


def _kernel(policy: Policy, dtype: torch.dtype) -> FastPath:
    size = _head_size(policy)
    kernel, device = kernel_for(torch.empty(size, device=policy.device, dtype=dtype)), policy.device.type
    if isinstance(kernel, FlashKernel):
        return FastPath("flash attention", "yes")
    if isinstance(kernel, CPUKernel):
        return FastPath("flash attention", "yes", "PyTorch's for CPUs")
    other = "matrix products" if isinstance(kernel, ExplicitKernel) else "PyTorch's memory-efficient attention"
    name = str(dtype).removeprefix("torch.")
    return FastPath("flash attention", "no", f"{other} instead, for {name} heads of {size} on {device}")
