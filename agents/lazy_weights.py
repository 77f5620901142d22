"""Weights that are made when they are asked for, one at a time, such as those of merged adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor


class LazyWeights(Mapping[str, Tensor]):
    """Weights by name, some of which are made anew each time that they are asked for, without gradient.

    Args:
        tensors: All weights. Of those that are made it has outlines: tensors on the device "meta".
        makers: Functions that make weights, by name.

    Attributes:
        outlines: All weights, those that are made as outlines of the same shape and dtype.
    """

    def __init__(self, tensors: Mapping[str, Tensor], makers: Mapping[str, Callable[[], Tensor]]) -> None:
        self.outlines, self.makers = tensors, makers

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        return self.makers[name]() if name in self.makers else self.outlines[name]

    def __contains__(self, name: object) -> bool:
        return name in self.outlines  # the class beneath would make the weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.outlines)

    def __len__(self) -> int:
        return len(self.outlines)


def outlines(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Weights whose shapes and dtypes alone are asked for; none is made."""
    return weights.outlines if isinstance(weights, LazyWeights) else weights
