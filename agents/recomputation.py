"""Gradient checkpointing of a model's blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmenv.agents.families import Family
from vlmenv.agents.saved_activations import keeping_activations


def recompute_activations(family: Family, blocks: int | None = None) -> None:
    """Makes blocks of language model and vision tower keep only their inputs for the backward pass.

    The backward pass recomputes the other activations exactly, dropout included. Without gradient nothing changes.

    Args:
        family: The model.
        blocks: Number of blocks of the language model that do so, the first ones, besides all of the vision tower.
            Default: all.
    """
    for block in _blocks(family, blocks):
        # On the instance, so that names of weights and wrappers around the block's call stay unchanged.
        block.__dict__["forward"] = functools.partial(_recomputing, block.forward)


def _blocks(family: Family, first: int | None = None) -> list[nn.Module]:
    layers = list(family.language_model().get_submodule("layers").children())
    return [*layers[:first], *family.vision_blocks().children()]


def _recomputing(forward: Callable[..., Tensor], hidden: Tensor, *more: Any, **arguments: Any) -> Tensor:
    """A block's forward pass, which the backward pass runs again if there is one."""
    if not torch.is_grad_enabled():
        return forward(hidden, *more, **arguments)  # `checkpoint` would look at the random state for nothing
    with keeping_activations():  # checkpoint keeps none, and lean layers need not provide for any
        return cast(Tensor, checkpoint(forward, hidden, *more, use_reentrant=False, **arguments))
