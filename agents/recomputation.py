"""Gradient checkpointing of blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmenv.agents.families import Family
from vlmenv.agents.lean import keeping_all


def recompute_activations(family: Family) -> None:
    """Makes each block of the language model and of the vision tower keep only its inputs for the backward pass.

    What a block needs beyond them is computed anew, exactly as it was, dropout included. Nothing changes
    where there is no gradient.
    """
    for block in _blocks(family):
        # On the instance: names of weights stay as they are, and whatever wraps the block's call stays outside.
        block.__dict__["forward"] = functools.partial(_recomputing, block.forward)


@contextmanager
def holding_activations(family: Family) -> Iterator[None]:
    """Within, blocks keep all that they need; those that were made to recompute it, as much as while they do."""
    taken = [(block, block.__dict__.pop("forward")) for block in _blocks(family) if "forward" in block.__dict__]
    try:
        with keeping_all() if taken else nullcontext():
            yield
    finally:
        for block, forward in taken:
            block.__dict__["forward"] = forward


def _blocks(family: Family) -> list[nn.Module]:
    layers = family.language_model().get_submodule("layers")
    return [*layers.children(), *family.vision_blocks().children()]


def _recomputing(forward: Callable[..., Tensor], hidden: Tensor, *more: Any, **arguments: Any) -> Tensor:
    """A block's forward pass, which is run again in the backward pass."""
    return cast(Tensor, checkpoint(forward, hidden, *more, use_reentrant=False, **arguments))
