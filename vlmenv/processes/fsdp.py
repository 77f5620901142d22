"""Ranks with shards of weights, gradients and optimizer state, by torch's FSDP2 (`fully_shard`)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any, ClassVar, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from vlmenv.agents.base import Agent, Reference
from vlmenv.agents.references import FrozenPolicy
from vlmenv.processes.base import Sharded, joined


class FSDP(Sharded):
    """Ranks with shards by FSDP2.

    Each block of the model is gathered for its pass and freed after it. The rest of the model is one unit. With bf16
    the blocks' weights are sent in bfloat16, and gradients in float32.

    Args:
        accelerator: Device, precision and ranks.
        reshard: If true, blocks are freed after the forward pass and gathered again for the backward pass.
    """

    name: ClassVar[str] = "FSDP2"

    def __init__(self, accelerator: Accelerator, reshard: bool) -> None:
        super().__init__(accelerator)
        self._reshard = reshard

    def _prepare_shards(
        self, agent: Agent, reference: Reference | None, optimizer: Callable[[], torch.optim.Optimizer]
    ) -> torch.optim.Optimizer:
        mesh = init_device_mesh(self.accelerator.device.type, (self.accelerator.num_processes,))
        named = {module: name for name, module in agent.policy.named_modules()}
        names = [named[block] for block in agent.blocks()]
        self._shard(agent.policy, names, mesh)
        if isinstance(reference, FrozenPolicy):
            self._shard(reference.policy, names, mesh)
            cast(FSDPModule, reference.policy).set_reshard_after_forward(True)
        self._optimizer: torch.optim.Optimizer = optimizer()
        return self._optimizer

    def _shard(self, policy: nn.Module, blocks: list[str], mesh: DeviceMesh) -> None:
        precision = MixedPrecisionPolicy()
        if self.accelerator.mixed_precision == "bf16":
            precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        parts = [policy.get_submodule(name) for name in blocks]
        for part in parts:
            fully_shard(part, mesh=mesh, reshard_after_forward=self._reshard, mp_policy=precision)
        fully_shard(policy, mesh=mesh)
        _make_root(policy)
        # By default a backward pass prefetches the modules that this rank ran before, also in rollouts. There another
        # rank may have run none. (The first part names itself, because no part is before it.)
        for before, part in itertools.pairwise([parts[0], *parts, policy]):
            cast(FSDPModule, part).set_modules_to_backward_prefetch([cast(FSDPModule, before)])

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Gathers all weights for the block. All modules then run in the precision of the gathered blocks."""
        modules = [module for module in self.agent.policy.modules() if isinstance(module, FSDPModule)]
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            with self.autocast():
                yield
        finally:
            for module in modules:
                inner = module is not self.agent.policy
                module.set_reshard_after_forward(inner and self._reshard, recurse=False)
                module.reshard()

    def _clip(self, max_norm: float) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.agent.parameters(), max_norm)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def weights(self) -> Mapping[str, Tensor]:
        """The gathered state on the main rank, on the CPU; empty on other ranks."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = cast(dict[str, Tensor], get_model_state_dict(self.agent.policy, options=options))
        first: dict[nn.Parameter, str] = {}
        for name, parameter in self.agent.policy.named_parameters(remove_duplicate=False):
            if name in state:  # tied weights become one tensor again, and are written once
                state[name] = state[first.setdefault(parameter, name)]
        return state

    def shared_state(self) -> dict[str, Any]:
        return {}

    def rank_state(self) -> dict[str, Any]:
        state = self._optimizer.state_dict()
        own = {i: {name: _local(value) for name, value in kept.items()} for i, kept in state["state"].items()}
        return {"optimizer": state | {"state": own}}

    def load(self, folder: Path, shared: dict[str, Any], own: dict[str, Any]) -> None:
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        if "undivided" in shared:
            state = joined(shared["undivided"], lambda index, whole: _cut(whole, parameters[index]))
        else:
            state = own["optimizer"]
        whole = {
            i: {name: _like(value, parameters[i]) for name, value in kept.items()} for i, kept in state["state"].items()
        }
        super().load(folder, {}, {"optimizer": state | {"state": whole}})


def _make_root(policy: nn.Module) -> None:
    """Makes the policy the root of its FSDP modules by an empty pass: the first module to run becomes the root."""
    policy.__dict__["pass_through"] = MethodType(lambda _: None, policy)
    register_fsdp_forward_method(policy, "pass_through")
    policy.__dict__.pop("pass_through")()
    cast(FSDPModule, policy).reshard()


def _local(value: Any) -> Any:
    return value.to_local() if isinstance(value, DTensor) else value


def _cut(whole: Tensor, parameter: DTensor) -> Tensor:
    """This rank's shard of a whole tensor, divided as the parameter is."""
    size = -(-len(parameter) // parameter.device_mesh.size())
    start = size * parameter.device_mesh.get_local_rank()
    return whole[start : start + size].clone()


def _like(value: Any, parameter: DTensor) -> Any:
    """Lays out a shard of the optimizer's state as the parameter is."""
    if not isinstance(value, Tensor) or value.shape != parameter.to_local().shape:
        return value
    return DTensor.from_local(
        value.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
