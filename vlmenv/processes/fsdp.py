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
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from vlmenv.agents.base import Agent, Reference
from vlmenv.agents.checkpoints import sent_from_main
from vlmenv.agents.references import FrozenPolicy
from vlmenv.agents.weights import WideEmbedding
from vlmenv.processes.base import Sharded, joined


class FSDP(Sharded):
    """Ranks with shards by FSDP2.

    Each block of the model is gathered for its pass and freed after it. The rest of the model is one unit. With bf16
    the blocks' weights are sent in bfloat16, and gradients in float32.

    Args:
        accelerator: Device, precision and ranks.
        reshard: If true, blocks are freed after the forward pass and gathered again for the backward pass.
        within: Number of neighbouring ranks that hold a copy of the model between them. Copies add up their gradients
            (hybrid sharding). Default: all ranks.
    """

    name: ClassVar[str] = "FSDP2"
    gives_shards: ClassVar[bool] = True

    def __init__(self, accelerator: Accelerator, reshard: bool, within: int | None = None) -> None:
        super().__init__(accelerator)
        self._reshard, self._within = reshard, within or accelerator.num_processes

    @property
    def shards(self) -> int:
        return self._within

    def configure(self, agent: Agent) -> None:
        super().configure(agent)
        agent.empty_reference = True

    def _prepare_shards(
        self, agent: Agent, reference: Reference | None, optimizer: Callable[[], torch.optim.Optimizer]
    ) -> torch.optim.Optimizer:
        mesh = self._mesh()
        named = {module: name for name, module in agent.policy.named_modules()}
        names = [named[block] for block in agent.blocks()]
        self._place(agent.policy)
        whole = dict(agent.policy.named_parameters()) if self.accelerator.is_main_process else {}
        lacks = any(self.collect([any(one.is_meta for one in agent.policy.parameters())]))
        self._shard(agent.policy, names, mesh)
        if lacks:
            self._fill(agent.policy, whole)
        del whole
        self._make_root(agent.policy, names)
        if isinstance(reference, FrozenPolicy):
            self._place(reference.policy)
            self._shard(reference.policy, names, mesh)
            _copy_shards(agent.policy, reference.policy)
            self._make_root(reference.policy, names)
            cast(FSDPModule, reference.policy).set_reshard_after_forward(True)
        self._optimizer: torch.optim.Optimizer = optimizer()
        return self._optimizer

    def _mesh(self) -> DeviceMesh:
        """The ranks; with several copies of the model a row for each."""
        kind, ranks = self.accelerator.device.type, self.accelerator.num_processes
        if self._within == ranks:
            return init_device_mesh(kind, (ranks,))
        return init_device_mesh(kind, (ranks // self._within, self._within), mesh_dim_names=("copy", "shard"))

    def _shard(self, policy: nn.Module, blocks: list[str], mesh: DeviceMesh) -> None:
        precision = MixedPrecisionPolicy()
        if self.accelerator.mixed_precision == "bf16":
            precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for name in blocks:
            part = policy.get_submodule(name)
            fully_shard(part, mesh=mesh, reshard_after_forward=self._reshard, mp_policy=precision)
        fully_shard(policy, mesh=mesh)

    def _make_root(self, policy: nn.Module, blocks: list[str]) -> None:
        """Makes the policy the root of its units, once they have their weights."""
        _make_root(policy)
        # By default a backward pass prefetches the modules that this rank ran before, also in rollouts. There another
        # rank may have run none. (The first part names itself, because no part is before it.)
        parts = [policy.get_submodule(name) for name in blocks]
        for before, part in itertools.pairwise([parts[0], *parts, policy]):
            cast(FSDPModule, part).set_modules_to_backward_prefetch([cast(FSDPModule, before)])

    def _place(self, policy: nn.Module) -> None:
        """Gives ranks that have a policy's shapes alone the main rank's data types, and tensors beside its weights."""
        told: list[Any] = [None]
        if self.accelerator.is_main_process:
            types = {name: (one.dtype, _is_wide(policy, name)) for name, one in _all(policy)}
            told = [(types, {place: tensor.cpu() for place, tensor in _beside(policy)})]
        types, beside = broadcast_object_list(told)[0]
        for name, parameter in _all(policy):
            if parameter.is_meta:
                dtype, is_wide = types[name]
                parameter.data = parameter.data.to(dtype)
                if is_wide:
                    _module_of(policy, name).__class__ = WideEmbedding
        for (module, name), tensor in _beside(policy):
            if tensor.is_meta:
                setattr(policy.get_submodule(module), name, beside[module, name].to(self.accelerator.device))

    def _fill(self, policy: nn.Module, whole: Mapping[str, Tensor]) -> None:
        """Gives ranks without weights their shards of the main rank's, a weight at a time."""
        shards: dict[str, DTensor] = {}
        for name, parameter in policy.named_parameters():
            like = cast(DTensor, parameter)
            weight = sent_from_main(whole.get(name), like, self.accelerator.device)
            if like.to_local().is_meta:
                shards[name] = _sharded(_cut(weight, like), like)
        if shards:
            _assign(policy, shards)

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
    dimension = parameter.device_mesh.ndim - 1
    size = -(-len(parameter) // parameter.device_mesh.size(dimension))
    start = size * parameter.device_mesh.get_local_rank(dimension)
    return whole[start : start + size].clone()


def _like(value: Any, parameter: DTensor) -> Any:
    """Lays out a shard of the optimizer's state as the parameter is."""
    if not isinstance(value, Tensor) or value.shape != parameter.to_local().shape:
        return value
    return _sharded(value.to(parameter.device), parameter)


def _sharded(local: Tensor, like: DTensor) -> DTensor:
    """This rank's shard as part of a tensor that is divided as another."""
    return DTensor.from_local(local, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def _copy_shards(policy: nn.Module, reference: nn.Module) -> None:
    """Gives the reference, which has no weights yet, copies of the policy's shards, in its own data types."""
    own = dict(policy.named_parameters())
    shards = {}
    for name, parameter in reference.named_parameters():
        local = cast(DTensor, own[name]).to_local().detach()
        shards[name] = _sharded(local.to(parameter.dtype, copy=True), cast(DTensor, parameter))
    _assign(reference, shards)


def _assign(policy: nn.Module, shards: Mapping[str, DTensor]) -> None:
    """Replaces parameters. Tied ones stay one."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for name, former in list(policy.named_parameters(remove_duplicate=False)):
        if name in shards:
            made[former] = nn.Parameter(shards[name], requires_grad=former.requires_grad)
        setattr(_module_of(policy, name), name.rpartition(".")[2], made[former])


def _all(policy: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(policy.named_parameters(remove_duplicate=False))


def _module_of(policy: nn.Module, name: str) -> nn.Module:
    return policy.get_submodule(name.rpartition(".")[0])


def _is_wide(policy: nn.Module, name: str) -> bool:
    return type(_module_of(policy, name)) is WideEmbedding


def _beside(policy: nn.Module) -> list[tuple[tuple[str, str], Tensor]]:
    """A policy's tensors other than parameters, by module and attribute."""
    return [
        ((name, attribute), value)
        for name, module in policy.named_modules()
        for attribute, value in [*module.named_buffers(recurse=False), *vars(module).items()]
        if isinstance(value, Tensor)
    ]
