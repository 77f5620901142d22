"""A device that is not the CPU, where there is none: that nothing is left behind can be tested without a GPU.

Its tensors hold those of the CPU, on which everything is computed, and say that they are elsewhere. As on a GPU, an
operation on tensors of both places fails. What makes the CPU wait for a GPU is noted.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from vlmenv.agents.vlm import VLMAgent

NAME = "elsewhere"
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero")
_TAKE_BOTH = (
    "aten::copy_",
    "aten::_to_copy",
    "aten::index",
    "aten::index_put",
    "aten::index_put_",
    "aten::_index_put_impl_",
)
"""Indices may be on the CPU."""


class _Module:
    """What PyTorch asks of a device."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Random numbers are the CPU's."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


if torch._C._get_privateuse1_backend_name() != NAME:
    _setup_privateuseone_for_python_backend(NAME, _Module())  # as devices are that come in other packages


class Elsewhere(Tensor):
    """A tensor that is elsewhere."""

    here: Tensor

    @staticmethod
    def __new__(cls: Any, here: Tensor) -> Elsewhere:
        places = {"strides": here.stride(), "storage_offset": here.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, here.shape, dtype=here.dtype, device=f"{NAME}:0", **places)
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"Elsewhere({self.here})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = Elsewhere(self.here.detach().clone())
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    def tolist(self) -> Any:
        _note("tolist")
        return self.here.tolist()

    def new_tensor(self, data: Any, **rest: Any) -> Elsewhere:
        return Elsewhere(self.here.new_tensor(data, **rest))

    def data_ptr(self) -> int:
        return self.here.data_ptr()


class _Everywhere(TorchDispatchMode):
    """Has tensors made elsewhere that are asked for there."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class _Tensors(TorchFunctionMode):
    """Has `torch.tensor` make its tensors on the CPU first, as it does for a device that PyTorch knows.

    A patch in its place would outlast the context: PyTorch looks up once which functions a default device is for.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is not torch.tensor or kwargs.get("device") is None:
            return function(*args, **kwargs)
        device = kwargs.pop("device")
        return function(*args, **kwargs).to(device)


_waits: list[str] = []
_mixed: list[str] = []


@contextmanager
def elsewhere() -> Iterator[list[str]]:
    """Lets tensors be elsewhere; gives what has waited for them since, each with where it was asked for."""
    generator = torch.Generator
    _waits.clear()
    _mixed.clear()
    with (
        _Everywhere(),
        _Tensors(),
        mock.patch("torch.Generator", side_effect=lambda device="cpu": generator()),
    ):
        yield _waits
    if _mixed:  # not at once: where a backward pass raises on another device than the CPU, the process ends
        raise RuntimeError("; ".join(_mixed))


def bring(agent: VLMAgent) -> VLMAgent:
    """Another agent with the same model, brought elsewhere. Parameters become other ones there, and are tied anew."""
    model = agent.family.model.to(NAME)
    model.tie_weights()
    return VLMAgent(type(agent.family)(model, agent.family.processor), agent.folder)


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, leaves = function._schema.name, tree_leaves((args, kwargs))
    there = {id(one.here): one for one in leaves if isinstance(one, Elsewhere)}
    left = [one for one in leaves if isinstance(one, Tensor) and not isinstance(one, Elsewhere) and one.ndim]
    if there and left and name not in _TAKE_BOTH:
        _mixed.append(f"{name}: {[tuple(one.shape) for one in left]} are on the CPU and others {NAME}, {_where()}")
    goes_there = bool(there)
    if kwargs.get("device") is not None:
        goes_there = torch.device(kwargs["device"]).type == NAME
        kwargs = kwargs | ({"device": torch.device("cpu")} if goes_there else {})  # another one may be meta
    if there and ((left and "index" in name) or not goes_there or name.removeprefix("aten::") in _WAITS):
        _note(name)
    out = function(*tree_map(_here, args), **tree_map(_here, kwargs))
    if not goes_there:
        return out
    # What is changed in place stays the tensor that it was.
    return tree_map(lambda one: there[id(one)] if id(one) in there else _there(one), out)


def _there(one: Any) -> Any:
    return Elsewhere(one) if isinstance(one, Tensor) else one


def _here(one: Any) -> Any:
    return one.here if isinstance(one, Elsewhere) else one


def _note(name: str) -> None:
    _waits.append(f"{name}, {_where()}")


def _where() -> str:
    """The line of a model or of the package from which an operation came."""
    frames = [one for one in traceback.extract_stack() if "/vlmenv/" in one.filename or "/models/" in one.filename]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "from elsewhere"
