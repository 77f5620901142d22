"""Private parts of PyTorch: attention operators, fake tensors, versions of tensors, process groups with own options."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Final

import torch
from torch import Tensor, distributed

from vlmenv.compat import Use

try:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
except ImportError:  # `FAKES` tells, and no memory is predicted

    class FakeTensor:  # type: ignore[no-redef]
        """Stands for a class that this PyTorch does not have."""

    FakeTensorMode = StorageWeakRef = TorchDispatchMode = FakeTensor  # type: ignore[assignment,misc]

__all__ = ["FAKES", "USES", "FakeTensor", "FakeTensorMode", "StorageWeakRef", "TorchDispatchMode", "tree_leaves"]

_OPERATORS: Final = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_backward",
    "_flash_attention_forward",
    "_flash_attention_backward",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_efficient_attention_backward",
)
_c10d: Any = distributed  # hands on names that it does not declare to be its own


GROUPED_PRODUCT: Final = getattr(getattr(torch.ops.aten, "_grouped_mm", None), "default", None)
"""the product of experts with groups of tokens; None if this PyTorch has none"""


def operator(name: str) -> Callable[..., Any]:
    """An operator of attention by its name without the leading underscore.

    `vlmenv.agents.kernels` tries each kernel against matrix products before it is used.

    Raises:
        AttributeError: This PyTorch does not have it.
    """
    assert f"_{name}" in _OPERATORS, "the self-test looks at these alone"
    found: Callable[..., Any] = getattr(torch.ops.aten, f"_{name}")
    return found


def _check_operators() -> str | None:
    missing = [name for name in _OPERATORS if not hasattr(torch.ops.aten, name)]
    return f"PyTorch has no {', '.join(missing)}" if missing else None


def version_of(tensor: Tensor) -> int:
    """The number of changes of a tensor in place; 0 if this PyTorch does not tell (`tells_versions`)."""
    return int(getattr(tensor, "_version", 0))


def tells_versions() -> bool:
    """True if `version_of` counts changes."""
    return hasattr(torch.empty(0), "_version")


def _check_versions() -> str | None:
    tensor = torch.zeros(1)
    before = version_of(tensor)
    tensor.add_(1)
    return None if tells_versions() and version_of(tensor) > before else "PyTorch does not count changes of tensors"


def without_modes() -> AbstractContextManager[Any]:
    """Switches modes such as fake tensors off within the context, so that numbers are computed."""
    from torch.utils import _python_dispatch

    off: Callable[[], AbstractContextManager[Any]] = getattr(_python_dispatch, "_disable_current_modes", nullcontext)
    return off()


def _check_modes() -> str | None:
    with FakeTensorMode(), without_modes():
        return "modes stay on" if isinstance(torch.zeros(1), FakeTensor) else None


def storage_place(tensor: Tensor) -> int:
    """A number that identifies the memory of a tensor with or without numbers, while it exists."""
    return int(tensor.untyped_storage()._cdata)


def _address(tensor: Tensor) -> int:
    """A number in place of the address of a fake tensor, by which tensors of the same memory are known."""
    return storage_place(tensor) * 4096 + int(tensor.storage_offset()) * tensor.element_size()


@contextmanager
def addresses_of_fakes() -> Iterator[None]:
    """Gives fake tensors a `data_ptr` within the context."""
    had = FakeTensor.__dict__.get("data_ptr")
    FakeTensor.data_ptr = _address  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        if had is None:
            del FakeTensor.data_ptr
        else:
            FakeTensor.data_ptr = had  # type: ignore[method-assign]


@contextmanager
def weights_stay_in_place() -> Iterator[None]:
    """Leaves weights on their device and in their type within the context: fake ones cannot be moved in place."""
    swap, torch.utils.swap_tensors = torch.utils.swap_tensors, lambda *_: None
    try:
        yield
    finally:
        torch.utils.swap_tensors = swap


def _check_fakes() -> str | None:
    with FakeTensorMode(), addresses_of_fakes():
        first = torch.zeros(4)
        second = first[1:]
        held = StorageWeakRef(first.untyped_storage())  # type: ignore[no-untyped-call]
        found = isinstance(first, FakeTensor), second.data_ptr() - first.data_ptr(), tree_leaves([first]) == [first]
        if found != (True, 4, True) or storage_place(first) != storage_place(second) or held.expired():  # type: ignore[no-untyped-call]
            return "fake tensors have no memory that can be told apart"
        del first, second
        return None if held.expired() else "fake tensors stay after their end"  # type: ignore[no-untyped-call]


def gloo_group(store: Any, rank: int, size: int, limit: timedelta, address: str) -> Any:
    """Makes a gloo group that listens only at `address`, instead of the address of this machine's name.

    Raises:
        RuntimeError: This PyTorch has no such options.
    """
    with _as_runtime_errors():
        gloo = _c10d.ProcessGroupGloo
        options = gloo._Options()
        options._timeout, options._devices = limit, [gloo.create_device(hostname=address)]
    return gloo(store, rank, size, options)


def nccl_group(store: Any, rank: int, size: int, limit: timedelta) -> Any:
    """Makes an NCCL group with blocking waits and without a watchdog.

    By default torch's watchdog ends the process when another end dies or hangs (TORCH_NCCL_ASYNC_ERROR_HANDLING). Then
    a dead server would end the trainer. With blocking waits, `Work.wait` finds errors and timeouts, aborts NCCL's
    communicator and raises. Each group reads the variable when it is made. Its device is that of the first message.

    Raises:
        RuntimeError: This PyTorch has no such options.
    """
    with _as_runtime_errors():
        nccl = _c10d.ProcessGroupNCCL
        options = nccl.Options()
        options._timeout = limit
    with _variable("TORCH_NCCL_BLOCKING_WAIT", "1"):
        return nccl(store, rank, size, options)


_ENVIRONMENT: Final = threading.Lock()


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Sets an environment variable within the context, for one thread at a time."""
    with _ENVIRONMENT:
        former = os.environ.get(name)
        os.environ[name] = value
        try:
            yield
        finally:
            del os.environ[name]
            if former is not None:
                os.environ[name] = former


@contextmanager
def _as_runtime_errors() -> Iterator[None]:
    try:
        yield
    except (AttributeError, TypeError) as error:
        raise RuntimeError(f"this PyTorch makes process groups in another way: {error}") from error


def _check_groups() -> str | None:
    options = _c10d.ProcessGroupGloo._Options()
    limit = timedelta(seconds=7)
    options._timeout, options._devices = limit, []
    return None if options._timeout == limit else "options of process groups take no time limit"


FAKES: Final = Use("fake tensors", _check_fakes, "no memory is predicted")
USES: Final = (
    Use("attention operators", _check_operators, "attention by matrix products, which is slower"),
    Use("versions of tensors", _check_versions, "activations are kept that could be recomputed"),
    Use("switched modes", _check_modes, "lean layers are not tried in predictions of memory"),
    FAKES,
    Use("process groups", _check_groups, "weight_transfer direct fails; take file"),
)
