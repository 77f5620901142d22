"""Routers of mixtures of experts: how evenly they send tokens to experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_ROUTER = "topkrouter"
"""End of the names of transformers' classes of routers whose first output is logits, in lower case."""
_WITH_PROJECTION = "gemma4textrouter"
"""The name of a class of routers that give probabilities, of the logits that their `proj` gives."""


def routers_of(language_model: nn.Module) -> list[nn.Module]:
    """The routers of a language model."""
    ends = _ROUTER, _WITH_PROJECTION
    return [module for module in language_model.modules() if type(module).__name__.lower().endswith(ends)]


@contextmanager
def recorded_logits(routers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Records the logits [M, E] of each router within the context.

    Args:
        routers: From `routers_of`.
    """
    found: list[Tensor] = []

    def note(module: nn.Module, inputs: Any, outputs: Any) -> None:
        found.append(outputs if isinstance(outputs, Tensor) else outputs[0])

    handles = [_giver(router).register_forward_hook(note) for router in routers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _giver(router: nn.Module) -> nn.Module:
    """The module whose first or only output is a router's logits; adapters and quantisation put others in its place."""
    return router.get_submodule("proj") if type(router).__name__.lower() == _WITH_PROJECTION else router


def balancing_loss(logits: Sequence[Tensor], top_k: int) -> Tensor:
    """The load-balancing loss of routers (Switch Transformer, arXiv 2101.03961, equations 4 to 6), over all of them.

    It is `top_k` where all experts get as many tokens, and more where they do not.

    Args:
        logits: [M, E] of each router.
        top_k: Number of experts that a token is sent to.
    """
    probs = torch.cat([one.float().softmax(dim=-1) for one in logits])
    experts = probs.shape[-1]
    sent = torch.zeros_like(probs).scatter_(1, probs.topk(top_k, dim=-1).indices, 1.0)
    return experts * (sent.mean(dim=0) * probs.mean(dim=0)).sum()
