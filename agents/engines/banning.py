"""Run within vLLM: tokens that are never sampled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor


class BannedTokens(LogitsProcessor):  # type: ignore[misc]
    """Sets the logits of the tokens in `additional_config["vlmenv_banned"]` to -inf, in every request."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._banned = torch.tensor(vllm_config.additional_config["vlmenv_banned"], device=device)

    def apply(self, logits: Tensor) -> Tensor:
        return logits.index_fill_(-1, self._banned, -torch.inf)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        pass
