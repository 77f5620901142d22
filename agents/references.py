"""What the KL penalty compares a policy with."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from vlmenv.agents.base import Agent, LogProbs
from vlmenv.agents.lora import LoRA
from vlmenv.agents.policy import Policy
from vlmenv.core.rollout import Rollout


class FrozenPolicy:
    """A policy as it is now, whatever becomes of it.

    Args:
        policy: Is copied.
        prepare: What is done to rollouts first.

    Attributes:
        policy: A copy, without gradients and without a value head. It shares the vision tower where that is frozen,
            and with it the features that it found; but none that processes hold in shares, which only the policy's own
            passes gather.
    """

    def __init__(self, policy: Policy, prepare: Callable[[Rollout], Rollout]) -> None:
        family = policy.family
        parted = policy.divided or family.sees_by_trained_weights()
        shared = [] if parted else [family.vision_tower(), *family.projectors()]
        model = copy.deepcopy(family.model, {id(module): module for module in shared}).requires_grad_(False)
        self.policy = Policy(type(family)(model, family.processor))
        self.policy.share_prefixes, self.policy.divided = policy.share_prefixes, policy.divided
        self._prepare = prepare

    @torch.no_grad()
    def logprobs(self, rollout: Rollout) -> LogProbs:
        result = self.policy(self._prepare(rollout))
        assert isinstance(result, LogProbs)
        return result


class UnadaptedPolicy:
    """An agent's policy without its adapters: no weights are held twice."""

    def __init__(self, agent: Agent, lora: LoRA) -> None:
        self._agent, self._lora = agent, lora

    @torch.no_grad()
    def logprobs(self, rollout: Rollout) -> LogProbs:
        with self._lora.switched_off():
            return self._agent.logprobs(rollout)
