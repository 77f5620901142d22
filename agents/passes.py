"""Passes of the language model over packed sequences that share prompts.

A pass computes prompts once and goes on from them with all completions. What a layer's completions go on from, its
`Past`, depends on the layer: keys and values, those of a window, or a recurrent state. Each kind of layer is a `Mixer`.
A new architecture adds a mixer with its past, and none of the passes changes.

Shapes: P prompts; N completions; M packed tokens of either or both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor

from vlmenv.agents.packing import Packing
from vlmenv.agents.sending import send


class Past(ABC):
    """What the completions of P prompts go on from in one layer, or what they have come to themselves."""

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that it holds."""
        return [one for one in vars(self).values() if isinstance(one, Tensor)]

    @abstractmethod
    def select(self, rows: Tensor) -> Self:
        """The past of some rows [n], indices on the device, which may repeat."""

    @classmethod
    @abstractmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Joins prompts that ran in several passes."""


class Mixer(ABC):
    """How a token of one layer depends on earlier tokens, and on nothing else."""

    @abstractmethod
    def prompts(self, prefixes: Prefixes, *packed: Tensor) -> tuple[Tensor, Past]:
        """Computes prompts.

        Args:
            prefixes: The pass.
            packed: The layer's own tensors [M, ...].

        Returns:
            Outputs [M, ...], and what completions go on from.
        """

    @abstractmethod
    def groups(self, groups: Groups, *packed: Tensor) -> Tensor:
        """Computes prompts and, behind them, complete completions, with gradients: [M, ...]."""

    @abstractmethod
    def step(self, steps: Steps, block: int, *packed: Tensor) -> Tensor:
        """Computes the next token of each completion, without gradients: [N, ...]. It updates `steps.own[block]`."""


class Pass(ABC):
    """One pass of the language model, whose layers call `mix` in place of their own code.

    Attributes:
        ran: Indices of the layers that have done so.
    """

    def __init__(self) -> None:
        self.ran: set[int] = set()

    def mix(self, block: int, mixer: Mixer, *packed: Tensor, source: int | None = None) -> Tensor:
        """Computes a layer for all packed tokens.

        Args:
            block: Index of the layer.
            mixer: The kind of the layer.
            packed: The layer's own tensors [M, ...].
            source: Index of the earlier layer whose past is also this layer's. Default: it has its own.
        """
        self.ran.add(block)
        return self._mix(block if source is None else source, mixer, *packed)

    @abstractmethod
    def _mix(self, block: int, mixer: Mixer, *packed: Tensor) -> Tensor: ...


class Prefixes(Pass):
    """A pass over prompts (prefill), which keeps what their completions go on from.

    Args:
        packing: Packing of the prompts.
        images: By kind of layer, int64 [M]: the image of each token whose features attend to each other in both
            directions, and -1 for other tokens. Default: none do.
    """

    def __init__(self, packing: Packing, images: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.packing, self.images = packing, images or {}
        self.past: dict[int, Past] = {}
        """by layer"""

    @classmethod
    def joined(cls, parts: Sequence[Prefixes]) -> Prefixes:
        """Joins prompts that ran in several passes. It empties the parts, so that only one layer is held twice."""
        if len(parts) == 1:
            return parts[0]
        packing = parts[0].packing
        whole = cls(Packing(torch.cat([part.packing.lengths for part in parts]), packing.device))
        for block in list(parts[0].past):
            own = [part.past.pop(block) for part in parts]
            whole.past[block] = type(own[0]).joined(own)
        return whole

    def _mix(self, block: int, mixer: Mixer, *packed: Tensor) -> Tensor:
        out, past = mixer.prompts(self, *packed)
        self.past.setdefault(block, past)  # of a source there is one already
        return out

    @property
    def padding(self) -> Packing | None:
        """The packing that tells which keys are tokens; None if all are."""
        return None if self.packing.is_even else self.packing

    def select(self, rows: Tensor) -> None:
        """Keeps only some prompts [p], indices on the CPU."""
        if len(rows) == len(self.packing.lengths):
            return
        self.packing = self.packing.select(rows)
        select_each(rows.to(self.packing.device), self.past)


class Groups(Pass):
    """A pass over packed prompts and, behind them, their complete completions.

    Args:
        prompts: Packing of the prompts.
        completions: Packing of the completions.
        index: int64 [N] on the CPU, the prompt of each completion.
        images: See `Prefixes`, of the prompts.
        later_images: The same of the completions.
    """

    def __init__(
        self,
        prompts: Packing,
        completions: Packing,
        index: Tensor,
        images: Mapping[str, Tensor] | None = None,
        later_images: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.prompts, self.completions = prompts, completions
        self.images, self.later_images = images or {}, later_images or {}
        self.kept: dict[object, object] = {}
        """what mixers compute once for all layers of their kind"""
        self.siblings = Siblings(index, len(prompts.lengths), prompts.device)
        self._index = index
        tokens = torch.zeros(len(prompts.lengths), dtype=torch.int64).index_add(0, index, completions.lengths)
        self.families = Packing(tokens, prompts.device) if _are_in_order(index, tokens, completions) else None
        """packing of the completions by prompt; None if they are not in the order of their prompts, or if a prompt or a
        segment is too small for flash attention in segments"""

    @cached_property
    def index(self) -> Tensor:
        """int64 [N] on the device, the prompt of each completion"""
        return send(self._index, self.prompts.device)

    def _mix(self, block: int, mixer: Mixer, *packed: Tensor) -> Tensor:
        return mixer.groups(self, *packed)

    def split(self, *packed: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Cuts tensors [M, ...] to those of the prompts and those of the completions."""
        halves = [torch.split(one, [self.prompts.total, self.completions.total]) for one in packed]
        return [one for one, _ in halves], [one for _, one in halves]


def _are_in_order(index: Tensor, tokens: Tensor, completions: Packing) -> bool:
    """True if completions are in the order of their prompts, each prompt has some, and the longest has two tokens."""
    return bool((index.diff() >= 0).all()) and int(tokens.min()) > 0 and completions.longest > 1


class Steps(Pass):
    """Completions that grow by one token per pass, without gradients.

    Args:
        prefixes: What the prompts' completions go on from.
        index: int64 [N] on the CPU, the prompt of each completion.
        most: Length limit of completions in tokens.
    """

    GROWTH: ClassVar[int] = 128
    """Tokens that caches have room for at first, and for as many more each time that they are full."""

    def __init__(self, prefixes: Prefixes, index: Tensor, most: int) -> None:
        super().__init__()
        self.prefixes, self._most = prefixes, most
        self._index, self._device = index, prefixes.packing.device
        self.siblings = Siblings(index, len(prefixes.packing.lengths), self._device)
        self.own: dict[int, Past] = {}
        """by layer, the completions' own"""
        self.length = 0
        """tokens so far"""
        self.place: Tensor | None = None
        """int64 [1] on the device, as `length`, for passes of fixed shapes; None: passes compute what there is"""
        self.filled: Packing | None = None
        """what the caches hold after a pass of fixed shapes; None if it has others"""

    def _mix(self, block: int, mixer: Mixer, *packed: Tensor) -> Tensor:
        return mixer.step(self, block, *packed)

    @property
    def index(self) -> Tensor:
        """int64 [N] on the device, the prompt of each completion."""
        return self._index.to(self._device)

    def select(self, rows: Tensor) -> None:
        """Keeps only some completions [n], indices on the CPU, and their prompts."""
        used, self._index = torch.unique(self._index[rows], return_inverse=True)
        self.prefixes.select(used)
        self.siblings = Siblings(self._index, len(used), self._device)
        select_each(rows.to(self._device), self.own)

    @property
    def is_full(self) -> bool:
        """True if the next token makes the caches grow."""
        return self.length % self.GROWTH == 0

    @property
    def next_capacity(self) -> int:
        """Tokens per completion that the caches have room for with the next token."""
        return min((self.length // self.GROWTH + 1) * self.GROWTH, self._most)


def select_each(rows: Tensor, past: dict[int, Past]) -> None:
    """Keeps only some rows of each layer. Only one layer is held twice."""
    for block in past:
        past[block] = past[block].select(rows)


class Siblings:
    """The completions of each prompt.

    Args:
        index: int64 [N] on the CPU, the prompt of each completion.
        prompts: P.
        device: Device of the tensors to fold.
    """

    def __init__(self, index: Tensor, prompts: int, device: torch.device) -> None:
        self._prompts = prompts
        counts = torch.bincount(index, minlength=prompts)
        self.most = int(counts.max())
        """number of completions of the largest group"""
        order = torch.argsort(index, stable=True)
        slots = torch.empty_like(index)
        slots[order] = torch.arange(len(index)) - (counts.cumsum(0) - counts)[index[order]]
        places = index * self.most + slots
        self._is_even = torch.equal(places, torch.arange(prompts * self.most))
        self._slots, self._device = places, device

    @cached_property
    def _places(self) -> Tensor:
        """int64 [N], the place of each completion among those of all prompts, each with the largest group"""
        return send(self._slots, self._device)

    def fold(self, rows: Tensor, key_heads: int) -> Tensor:
        """Converts [N, H, L, D] to [P, K, H / K * largest group * L, D]: the queries of each prompt's key heads."""
        if not self._is_even:
            spread = rows.new_zeros(self._prompts * self.most, *rows.shape[1:])
            rows = spread.index_copy(0, self._places, rows)
        _, heads, length, size = rows.shape
        split = rows.view(self._prompts, self.most, key_heads, heads // key_heads, length, size)
        return split.permute(0, 2, 3, 1, 4, 5).reshape(self._prompts, key_heads, -1, size)

    def unfold(self, folded: Tensor, heads: int) -> Tensor:
        """The inverse of `fold`."""
        key_heads, size = folded.shape[1], folded.shape[-1]
        split = folded.view(self._prompts, key_heads, heads // key_heads, self.most, -1, size)
        rows = split.permute(0, 3, 1, 2, 4, 5).reshape(self._prompts * self.most, heads, -1, size)
        return rows if self._is_even else rows[self._places]
