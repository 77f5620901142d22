"""Reference policies of the KL penalty."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vlmenv.agents.base import Agent, LogProbs
from vlmenv.agents.lora import LoRA
from vlmenv.agents.policy import Policy
from vlmenv.agents.weights import narrow_copies, widen_embedding
from vlmenv.core.rollout import Rollout


class FrozenPolicy:
    """A frozen copy of a policy.

    Args:
        policy: The policy to copy.
        prepare: Function that is applied to rollouts first.
        narrow: If true, the copy holds in bfloat16 what autocast to bfloat16 casts to it in any case.
        empty: If true, the copy has shapes and data types alone, for ranks that give it shards of the policy.

    Attributes:
        policy: The copy, without gradients and value head. It shares a frozen vision tower and its cached features. A
            sharded tower is copied, because only passes of the original policy gather it.
    """

    def __init__(
        self, policy: Policy, prepare: Callable[[Rollout], Rollout], *, narrow: bool = False, empty: bool = False
    ) -> None:
        family = policy.family
        parted = policy.sharded or family.sees_by_trained_weights()
        shared = [] if parted else [family.vision_tower(), *family.projectors()]
        copies: dict[int, nn.Module | nn.Parameter] = {id(module): module for module in shared}
        if narrow:
            copies |= narrow_copies(family.model, empty=empty)
        if empty:
            copies |= {id(one): _emptied(copies.get(id(one), one)) for one in family.model.parameters()}
        model = copy.deepcopy(family.model, copies).requires_grad_(False)
        widen_embedding(model, like=family.model)
        self.policy = Policy(type(family)(model, family.processor))
        self.policy.share_prefixes, self.policy.sharded = policy.share_prefixes, policy.sharded
        self.policy.banned = policy.banned
        self._prepare = prepare

    @torch.no_grad()
    def logprobs(self, rollout: Rollout) -> LogProbs:
        result = self.policy(self._prepare(rollout))
        assert isinstance(result, LogProbs)
        return result


def _emptied(parameter: Any) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


class UnadaptedPolicy:
    """An agent's policy with its adapters as training began with them. It needs no copy of the model's weights."""

    def __init__(self, agent: Agent, lora: LoRA) -> None:
        self._agent, self._lora = agent, lora

    @torch.no_grad()
    def logprobs(self, rollout: Rollout) -> LogProbs:
        with self._lora.as_at_start():
            return self._agent.logprobs(rollout)
