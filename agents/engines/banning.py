"""A logits processor within vLLM, for tokens that are never sampled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmenv.compat.vllm import logits_processors


class BannedTokens(*logits_processors()):  # type: ignore[misc]
    """Sets the logits of the tokens in `additional_config["vlmenv_banned"]` to -inf, in every request.

    vLLM has two kinds of runners, and GPUs use the second. Each takes only processors of its own class.

    Args:
        vllm_config: The engine's configuration.
        where: The device; or, from the second kind of runner, the requests' states, which name the device.
        is_pin_memory: Argument of the first kind of runner, not used.
    """

    def __init__(self, vllm_config: Any, where: Any, is_pin_memory: bool = False) -> None:
        banned = vllm_config.additional_config["vlmenv_banned"]
        self._banned = torch.tensor(banned, dtype=torch.int64, device=getattr(where, "device", where))

    def apply(self, logits: Tensor, context: Any = None) -> Tensor:
        """Changes logits [N, vocabulary] in place. The second kind of runner also passes the batch's layout."""
        return logits.index_fill_(-1, self._banned, -torch.inf)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        pass
