"""Functions of tensors that a compiler makes into few kernels on GPUs.

There each elementwise operation of PyTorch is a kernel of its own, which reads and writes memory. `torch.compile` makes
one of many. On CPUs, where compiling takes longer than it saves, the functions run as they are written.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from vlmenv.agents.trials import Trial, kind_of, largest_difference
from vlmenv.compat.torch import without_modes

_log = logging.getLogger(__name__)
GPUS: Final = "cuda"
"""Type of the devices on which functions are compiled."""
ROWS: Final = 9
"""Tokens in the examples."""
_EMULATED: Final[dict[str, str | int | bool | Callable[..., Any]]] = {"emulate_precision_casts": True}
"""Rounds between operations as PyTorch does."""


class Fused:
    """A function without side effects on its arguments, which is compiled on CUDA.

    Args:
        function: The function, of tensors, numbers and data types. It has no gradient.
        example: Makes arguments for a trial, on the CPU.
        kernels: Number of kernels that the compiler makes of it.
        reads: Number of times that these read their inputs. Default: once.

    Attributes:
        every: All such functions.
    """

    every: ClassVar[list[Fused]] = []

    def __init__(
        self, function: Callable[..., Any], example: Callable[[], tuple[Any, ...]], kernels: int, reads: int
    ) -> None:
        self.function, self.example, self.kernels, self.reads = function, example, kernels, reads
        self.every.append(self)

    def __call__(self, *arguments: Any) -> Any:
        """Computes the function."""
        device = next(one.device for one in arguments if isinstance(one, Tensor))
        return (self.compiled if fuses(device) else self.function)(*arguments)

    @functools.cached_property
    def compiled(self) -> Callable[..., Any]:
        """The compiled function, for tensors of any length."""
        compiled: Callable[..., Any] = torch.compile(self.function, dynamic=True, fullgraph=True, options=_EMULATED)
        return compiled

    def attempt(self, device: torch.device) -> Trial:
        """Tries the compiled function against the function as it is written."""
        arguments = [one.to(device) if isinstance(one, Tensor) else one for one in self.example()]
        try:
            with without_modes(), torch.no_grad():
                results = self.function(*arguments), self.compiled(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler stumbles over
            return Trial(kind_of(error))
        expected, found = ((one,) if isinstance(one, Tensor) else one for one in results)
        alike = all(a.dtype == b.dtype and _is_close(a, b) for a, b in zip(expected, found, strict=True))
        fault = "" if alike else "its compiled form computes something else"
        return Trial(fault, largest_difference(found, expected))


def fused(
    example: Callable[[], tuple[Any, ...]], *, kernels: int = 1, reads: int = 1
) -> Callable[[Callable[..., Any]], Fused]:
    """Decorates a function that is compiled on CUDA; see `Fused`."""
    return lambda function: Fused(function, example, kernels, reads)


def fuses(device: torch.device) -> bool:
    """True if `Fused` functions are compiled on a device."""
    return device.type == GPUS and not fault_of(device.type)


@functools.cache
def fault_of(device: str) -> str:
    """Why functions are not compiled on a device, after a trial of all; empty if they are. A warning tells it once."""
    for one in Fused.every:
        fault = one.attempt(torch.device(device)).fault
        if fault:
            _log.warning(
                "functions of many elementwise operations are not compiled on %s, and are slower: %s: %s. Results stay "
                "right; PyTorch's own wheels for CUDA have what its compiler needs, beside a C compiler",
                *(device, getattr(one.function, "__name__", "a function"), fault),
            )
            return fault
    return ""


def _is_close(right: Tensor, other: Tensor) -> bool:
    """True if two results differ by rounding only."""
    digits = torch.finfo(right.dtype).eps if right.is_floating_point() else 0.0
    size = float(right.abs().max()) if right.is_floating_point() else 0.0
    wide, found = right.double(), other.double()
    return math.isfinite(float(found.sum())) and bool(((wide - found).abs() <= 2 * digits * (size + wide.abs())).all())


def numbers(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random numbers for an example."""
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), device="cpu").to(dtype)
