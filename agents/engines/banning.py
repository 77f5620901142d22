"""Run within vLLM: tokens that are never sampled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SecondLogitsProcessor


class BannedTokens(LogitsProcessor, SecondLogitsProcessor):  # type: ignore[misc]
    """Sets the logits of the tokens in `additional_config["vlmenv_banned"]` to -inf, in every request.

    vLLM has two kinds of runner, of which GPUs use the second, and each takes processors of its own class alone.

    Args:
        vllm_config: Of the engine.
        where: The device, or the states of requests, which the second kind of runner hands over and which name it.
        is_pin_memory: Given by the first kind alone, and of no use here.
    """

    def __init__(self, vllm_config: Any, where: Any, is_pin_memory: bool = False) -> None:
        banned = vllm_config.additional_config["vlmenv_banned"]
        self._banned = torch.tensor(banned, dtype=torch.int64, device=getattr(where, "device", where))

    def apply(self, logits: Tensor, context: Any = None) -> Tensor:
        """Changes logits [N, vocabulary] in place; the second kind of runner also tells of the batch's layout."""
        return logits.index_fill_(-1, self._banned, -torch.inf)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        pass
