"""Records kernels, waits of the host and memory of passes on a CUDA device without numbers.

Weights and activations have shapes and data types only. Integers, and a few small floats, keep their numbers beside
them, so that steps that depend on numbers go on. What is on the host alone is computed as ever.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter as Tally
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from paper_gpu.card import Kernel
from paper_gpu.operators import fused_kernel, is_view, kernel_of
from vlmenv.agents.fusing import Fused
from vlmenv.doctor.counting import Counter

_aten = torch.ops.aten
_MOST_NUMBERS: Final = 1 << 22
"""Most elements of integers that keep their numbers."""
_MOST_FLOATS: Final = 1 << 12
_ASKS: Final = {
    "_local_scalar_dense": ".item()",
    "nonzero": "nonzero",
    "masked_select": "masked_select",
    "equal": "equal",
    "is_nonzero": "is_nonzero",
    "bincount": "bincount",
    "_unique2": "unique",
    "unique_consecutive": "unique_consecutive",
    "unique_dim": "unique",
    "repeat_interleave": "repeat_interleave",
}
"""Operators whose result's size or number the host asks for."""


class Recorder(Counter):
    """Records what happens on the card within the context.

    Args:
        mode: The mode that the fake tensors are of.

    Attributes:
        kernels: What the card computes, by call.
        waits: Where the host waits for the card, by kind and place, with numbers.
        replays: Number of times that the host starts a graph.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self._mode = mode
        self._numbers: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}
        self._pinned = WeakIdKeyDictionary()
        self._is_within = False
        self.kernels: list[Kernel] = []
        self.waits: Tally[tuple[str, str]] = Tally()
        self.replays = 0

    def __enter__(self) -> Recorder:
        self._lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # or torch.tensor(..., device="cuda") copies where no mode looks
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._lifts)

    def clear(self) -> None:
        """Forgets kernels, waits and replays."""
        self.kernels, self.waits, self.replays = [], Tally(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # asks for the device alone
            return func(*args, **kwargs)
        inputs = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        target = kwargs.get("device")
        if func is _aten._pin_memory.default:
            return self._pin(args[0])
        if func is _aten.is_pinned.default:
            return args[0] in self._pinned
        if not any(map(_is_on_card, inputs)) and (target is None or torch.device(target).type != "cuda"):
            return func(*args, **kwargs)
        out = self._on_card(func, args, kwargs, inputs)
        self._keep(out)
        return out

    def compute(self, fused: Fused, arguments: tuple[Any, ...]) -> Any:
        """Computes a compiled function: its inputs are read and its results written by few kernels."""
        if not any(_is_on_card(one) for one in arguments if isinstance(one, Tensor)):
            return fused.function(*arguments)
        self._is_within, known = True, self._is_within
        try:
            out = fused.function(*arguments)
        finally:
            self._is_within = known
        self.kernels.append(fused_kernel(fused, arguments, out, self._place()))
        self._keep(out)
        return out

    def capture(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Captures the kernels of a function as a graph, which nothing may wait in."""
        before, waits = self.kernels, self.waits.copy()
        self.kernels = []
        out = run()
        graph, self.kernels = [replace(one, replayed=True) for one in self.kernels], before
        if self.waits != waits:
            raise RuntimeError(f"a graph cannot wait: {', '.join(map(str, self.waits - waits))}")

        def replay() -> Tensor:
            self.kernels += graph
            self.replays += 1
            return out

        return replay

    def _keep(self, made: Any) -> None:
        """Counts the memory of what is made; what is within a compiled function takes none."""
        if self._is_within:
            return
        for one in tree_leaves(made):
            if isinstance(one, FakeTensor) and _is_on_card(one):
                self.add(one)

    def _on_card(self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor]) -> Any:
        name = func._schema.name.removeprefix("aten::")
        numbers = self._numbers_of(func, args, kwargs, inputs)
        self._note_waits(name, args, kwargs, inputs)
        if name == "_local_scalar_dense":
            return self._known(name, numbers)
        if name in _ASKS and not (name == "repeat_interleave" and kwargs.get("output_size") is not None):
            out = self._placed(self._known(name, numbers))
        elif not inputs or not any(map(_is_on_card, inputs)):
            out = self._made(func, args, kwargs, inputs)
        else:
            out = func(*self._without_masks(name, args), **kwargs)
        self._remember(func, args, out, numbers)
        if not is_view(name) and not self._is_within:
            self.kernels.append(kernel_of(name, args, kwargs, out, self.number, self._place()))
        return out

    def _made(self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor]) -> Any:
        """What is made on the card, or copied there."""
        if inputs:
            dtype = kwargs.get("dtype") or inputs[0].dtype
            with self._mode:
                return torch.empty(inputs[0].shape, dtype=dtype, device="cuda")
        with self._mode:
            return func(*args, **kwargs)

    def _pin(self, tensor: Tensor) -> Tensor:
        """Page-locked memory, which the host has only for a real card."""
        pinned = tensor.clone()
        self._pinned[pinned] = True
        return pinned

    # waits

    def _note_waits(self, name: str, args: Any, kwargs: Any, inputs: list[Tensor]) -> None:
        for kind in self._waits_of(name, args, kwargs, inputs):
            self.waits[kind, self._place()] += 1

    def _waits_of(self, name: str, args: Any, kwargs: Any, inputs: list[Tensor]) -> Iterable[str]:
        if name in _ASKS and not (name == "repeat_interleave" and kwargs.get("output_size") is not None):
            yield _ASKS[name]
        if name == "_to_copy":
            to_card, waits = not _is_on_card(inputs[0]), not kwargs.get("non_blocking")
            if to_card and (waits or inputs[0] not in self._pinned):
                yield "copy to the card" if waits else "copy to the card from pageable memory"
            if not to_card and torch.device(kwargs.get("device") or "cuda").type == "cpu":
                yield "copy to the host"
        if name == "copy_" and _is_on_card(args[0]) != _is_on_card(args[1]) and args[1].ndim:
            yield "copy between host and card"
        if name.startswith(("index", "_index")) and len(args) > 1 and isinstance(args[1], (list, tuple)):
            places = [one for one in args[1] if isinstance(one, Tensor)]
            if any(one.dtype in (torch.bool, torch.uint8) for one in places):
                yield "index by a mask"
            if not all(map(_is_on_card, places)):
                yield "index from the host"

    def _place(self) -> str:
        """File, line and function of the code nearest to the call that is the model's or the product's."""
        frame = sys._getframe(1)
        while frame is not None:
            name = frame.f_code.co_filename
            if short := _short(name):
                return f"{short}:{frame.f_lineno} {frame.f_code.co_name}"
            frame = frame.f_back  # type: ignore[assignment]
        return "autograd"

    # numbers

    def number(self, tensor: Any) -> Tensor | None:
        """The numbers of a tensor, on the host; None if they are not known."""
        if not isinstance(tensor, Tensor):
            return None
        if not isinstance(tensor, FakeTensor):
            return tensor
        kept = self._numbers.get(id(tensor))
        return kept[1] if kept is not None and kept[0]() is tensor else None

    def give(self, tensor: Tensor, numbers: Tensor) -> None:
        """Gives numbers to a tensor on the card."""
        key = id(tensor)
        self._numbers[key] = weakref.ref(tensor, lambda _: self._numbers.pop(key, None)), numbers

    def forget(self, tensor: Tensor) -> None:
        """Lets the numbers of a tensor be unknown."""
        self._numbers.pop(id(tensor), None)

    def _numbers_of(self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor]) -> Any:
        """The result in numbers, if those of all inputs are known; else None."""
        if not all(self.number(one) is not None and _keeps_numbers(one) for one in inputs):
            return None
        if not inputs and _elements(args) > _MOST_FLOATS and not func._schema.name.startswith("aten::arange"):
            return None
        real = {name: torch.device("cpu") if name == "device" else value for name, value in kwargs.items()}
        real.pop("pin_memory", None)
        known: Callable[[Any], Any] = lambda one: self.number(one) if isinstance(one, Tensor) else one  # noqa: E731
        with _disable_current_modes():
            try:
                return func(*tree_map(known, args), **tree_map(known, real))
            except (RuntimeError, NotImplementedError):  # it computes on the card only
                return None

    def _known(self, name: str, numbers: Any) -> Any:
        if numbers is None:
            raise RuntimeError(f"{name} at {self._place()} asks for numbers that are not known on paper")
        return numbers

    def _placed(self, numbers: Any) -> Any:
        """Tensors on the card with the numbers' shapes."""

        def place(one: Any) -> Any:
            if not isinstance(one, Tensor):
                return one
            with self._mode:
                return torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device="cuda")

        return tree_map(place, numbers)

    def _remember(self, func: Any, args: Any, out: Any, numbers: Any) -> None:
        if func._schema.is_mutable and numbers is None:
            self._numbers.pop(id(args[0]), None)
        if numbers is None:
            return
        for fake, real in zip(tree_leaves(out), tree_leaves(numbers), strict=False):
            if isinstance(fake, FakeTensor) and isinstance(real, Tensor) and fake.shape == real.shape:
                self.give(fake, real)

    def _without_masks(self, name: str, args: Any) -> Any:
        """Arguments with masks as places: how many elements a mask takes depends on its numbers."""
        if not name.startswith(("index", "_index")) or len(args) < 2 or not isinstance(args[1], (list, tuple)):
            return args
        places: list[Any] = []
        for one in args[1]:
            if isinstance(one, Tensor) and one.dtype == torch.bool:
                with _disable_current_modes():
                    found = self._known(name, self.number(one)).nonzero(as_tuple=True)
                places += self._placed(list(found))
            else:
                places.append(one)
        return args[0], places, *args[2:]


def _is_on_card(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


def _keeps_numbers(tensor: Tensor) -> bool:
    return tensor.numel() <= (_MOST_FLOATS if tensor.is_floating_point() else _MOST_NUMBERS)


def _elements(sizes: Any) -> int:
    count = 1
    for one in tree_leaves(sizes):
        count *= max(1, abs(one)) if isinstance(one, int) and not isinstance(one, bool) else 1
    return count


_ROOT: Final = Path(__file__).parents[2]
_shorts: dict[str, str] = {}


def _short(name: str) -> str:
    """A file's name from its package on, if it is the model's or the product's; else empty."""
    if name not in _shorts:
        parts = Path(name).parts
        known = ("vlmenv", "agents", "algos")
        is_own = any(Path(name).is_relative_to(_ROOT / one) for one in known)
        start = parts.index("transformers") if "transformers" in parts else None
        _shorts[name] = "/".join(parts[-2:]) if is_own or start is not None else ""
    return _shorts[name]
