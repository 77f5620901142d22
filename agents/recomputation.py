"""Gradient checkpointing that goes together with cached keys and values.

The one in transformers turns the cache off, from which completions continue here.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from vlmenv.agents.families import Family


def recompute_activations(family: Family) -> None:
    """Makes each block of the language model and of the vision tower keep only its inputs for the backward pass.

    What a block needs beyond them is computed anew, exactly as it was, dropout included. Nothing changes
    where there is no gradient.
    """
    blocks = [*enumerate(family.language_model().get_submodule("layers").children())]
    blocks += enumerate(family.vision_blocks().children())
    for index, block in blocks:
        # On the instance: names of weights stay as they are, and whatever wraps the block's call stays outside.
        block.__dict__["forward"] = functools.partial(_recomputing, block.forward, index)


def _recomputing(
    forward: Callable[..., Tensor],
    index: int,
    hidden: Tensor,
    *positional: Any,
    past_key_values: DynamicCache | None = None,
    **arguments: Any,
) -> Tensor:
    """A block's forward pass, which is run again in the backward pass.

    Args:
        forward: The block's own.
        index: Of the block among its like.
        hidden: [batch, tokens, H]; in some vision towers [patches, H].
        positional: Whatever else a vision tower's block takes, by place.
        past_key_values: To be appended to.
        arguments: Whatever else the block takes, by name.

    Returns:
        Shaped like `hidden`.
    """
    if past_key_values is None:
        return cast(Tensor, checkpoint(forward, hidden, *positional, use_reentrant=False, **arguments))
    if not torch.is_grad_enabled():
        return forward(hidden, past_key_values=past_key_values, **arguments)
    before = past_key_values.layers[index]

    def run(hidden: Tensor) -> tuple[Tensor, Any]:
        # Both runs append to the same keys and values. No other block's are kept for the second.
        cache = DynamicCache()
        cache.layers = [before] * index + [copy.copy(before)]
        return forward(hidden, past_key_values=cache, **arguments), cache.layers[index]

    output, past_key_values.layers[index] = checkpoint(run, hidden, use_reentrant=False)
    return cast(Tensor, output)
