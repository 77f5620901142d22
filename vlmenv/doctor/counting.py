"""Counts the bytes of a model's own passes without its weights, at full size.

The model has tensors with shapes and data types but without numbers (PyTorch's fake tensors). Its passes run through
the same code as in training, so that no formula stands for an activation. Tokens, positions and images are real,
because the passes depend on their numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from vlmenv.agents.families import Family, weightless_family
from vlmenv.agents.vlm import VLMAgent
from vlmenv.compat.torch import (
    FAKES,
    GROUPED_PRODUCT,
    FakeTensor,
    FakeTensorMode,
    StorageWeakRef,
    TorchDispatchMode,
    addresses_of_fakes,
    storage_place,
    tree_leaves,
    weights_stay_in_place,
)
from vlmenv.compat.transformers import tap_blocks, tapped_blocks
from vlmenv.core.errors import ConfigError

_aten = torch.ops.aten
_CLOSE = 1.002
"""Factor of the peak above which tensors that are gone are looked for, which takes time."""


class Counter(TorchDispatchMode):
    """Counts the bytes of the fake tensors that exist. Tensors with numbers are computed as ever, and not counted.

    Attributes:
        peak: The most bytes at a time since `restart`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sizes: dict[int, tuple[StorageWeakRef, int]] = {}
        self._live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        fakes = [one for one in tree_leaves((args, kwargs)) if isinstance(one, FakeTensor)]
        if fakes and func is _aten.equal.default:
            return True  # weights without numbers stand for those that no cast would round
        if fakes and func is _aten.index.Tensor:
            args = args[0], _places(args[1])
        out = _grouped(*args, **kwargs) if fakes and func is GROUPED_PRODUCT else func(*args, **kwargs)
        for one in tree_leaves(out):
            if isinstance(one, FakeTensor):
                self.add(one)
        return out

    def add(self, tensor: Tensor) -> None:
        """Counts a tensor from now on, as long as it exists."""
        storage = tensor.untyped_storage()
        place = storage_place(tensor)
        if (known := self._sizes.get(place)) is not None:
            if not known[0].expired():  # type: ignore[no-untyped-call]
                return
            self._live -= known[1]
        self._sizes[place] = StorageWeakRef(storage), storage.nbytes()  # type: ignore[no-untyped-call]
        self._live += storage.nbytes()
        if self._live > self.peak * _CLOSE:
            self.peak = max(self.peak, self.live())

    def live(self) -> int:
        """The bytes of the tensors that exist now."""
        for place, (reference, size) in list(self._sizes.items()):
            if reference.expired():  # type: ignore[no-untyped-call]
                del self._sizes[place]
                self._live -= size
        return self._live

    def restart(self) -> int:
        """Forgets the peak, and returns the bytes of the tensors that exist now."""
        self.peak = self.live()
        return self.peak


def _grouped(left: Tensor, right: Tensor, ends: Tensor, *_: Any, **__: Any) -> Tensor:
    """The shape of a product of experts. PyTorch's own rule for fake tensors takes bfloat16 alone.

    Args:
        left: [tokens, inputs], or [inputs, tokens] in the gradient of the experts.
        right: [experts, inputs, outputs], or [tokens, outputs].
        ends: [experts], where the tokens of each expert end.
    """
    shape = [left.shape[0], right.shape[-1]]
    return left.new_empty(shape if right.ndim == 3 else [ends.numel(), *shape])


def _places(indices: Iterable[Any]) -> list[Any]:
    """Indices with masks as places: how many elements a mask takes depends on its numbers."""
    found: list[Any] = []
    for one in indices:
        if isinstance(one, Tensor) and one.dtype == torch.bool and not isinstance(one, FakeTensor):
            found += one.nonzero(as_tuple=True)
        else:
            found.append(one)
    return found


@contextmanager
def counting() -> Iterator[Counter]:
    """Counts fake tensors within the context."""
    with addresses_of_fakes(), Counter() as counter:
        yield counter


def weightless_agent(
    folder: Path,
    prepare: Callable[[VLMAgent], object],
    dtype: torch.dtype,
    *,
    blocks: int | None = None,
    vision_blocks: int | None = None,
) -> VLMAgent:
    """An agent of a model's configuration, whose weights are fake tensors on the CPU.

    Args:
        folder: Folder with the configuration and the processor.
        prepare: Prepares it for training.
        dtype: Data type in which the weights are loaded.
        blocks: Number of blocks of the language model. Default: all.
        vision_blocks: Number of blocks of the vision tower. Default: all.

    Raises:
        ConfigError: This release of PyTorch counts no fake tensors.
        ModelError: As `weightless_family`.
    """
    if problem := FAKES.problem():
        raise ConfigError(f"this release of PyTorch does not let bytes be counted without weights: {problem}")
    family = weightless_family(folder)
    with weights_stay_in_place(), Counter(), FakeTensorMode(allow_non_fake_inputs=True):
        for held, most in zip(block_lists(family), (blocks, vision_blocks), strict=True):
            del held[len(held) if most is None else most :]
        if vision_blocks is not None:
            tap_blocks(family.vision_tower(), list(range(taps_of(family))))
        _faked(family.model, dtype)
        agent = VLMAgent(family, folder)
        prepare(agent)
    return agent


def taps_of(family: Family) -> int:
    """The number of the vision tower's blocks whose outputs the first blocks of the language model take too."""
    return len(tapped_blocks(family.vision_tower()))


def block_lists(family: Family) -> tuple[nn.ModuleList, nn.ModuleList]:
    """The blocks of a language model, and those of its vision tower."""
    return cast(nn.ModuleList, family.language_model().get_submodule("layers")), cast(
        nn.ModuleList, family.vision_blocks()
    )


def _faked(model: nn.Module, dtype: torch.dtype) -> None:
    """Puts fake tensors in the places of a model's meta tensors. Tied weights stay tied."""
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for module in model.modules():
        own = [*module.named_parameters(recurse=False, remove_duplicate=False)]
        for name, one in [*own, *module.named_buffers(recurse=False, remove_duplicate=False)]:
            if id(one) not in made:
                made[id(one)] = one, _without_numbers(one, dtype)
            setattr(module, name, made[id(one)][1])


def _without_numbers(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty tensor like another one; a parameter of floats has the data type `dtype`."""
    wraps = isinstance(tensor, nn.Parameter)
    kind = dtype if wraps and tensor.is_floating_point() else tensor.dtype
    empty = torch.empty(tensor.shape, dtype=kind, device="cpu")
    return nn.Parameter(empty, tensor.requires_grad) if wraps else empty
