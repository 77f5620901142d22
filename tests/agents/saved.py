"""A record of what passes keep for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from vlmenv.agents import saved_activations


@contextmanager
def recording_saved(note: Callable[[Tensor], object]) -> Iterator[None]:
    """Calls `note` with each tensor that is kept as it is within the context."""
    pack = saved_activations._pack

    def noted(tensor: Tensor) -> Any:
        kept = pack(tensor)
        if kept is tensor:
            note(tensor)
        return kept

    with patch.object(saved_activations, "_pack", noted), saved_tensors_hooks(noted, saved_activations._unpack):
        yield
