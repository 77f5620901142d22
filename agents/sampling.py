"""Sampling completions: each prompt runs through the model once, and what has ended takes no more time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmenv.agents.attention import Steps
from vlmenv.agents.policy import Policy, next_position
from vlmenv.core.errors import ModelError
from vlmenv.core.rollout import FinishReason, Prompt
from vlmenv.core.sampling import Sampling

_CROWDED = 0.75
"""Completions that have ended leave the batch once no more than this share of it goes on."""
_LOOK_EVERY = 8
"""Tokens between two looks at which have ended, on devices that would have to wait for each look."""


@dataclass(slots=True)
class Sampled:
    """A completion as tokens."""

    token_ids: NDArray[np.int64]
    """[L], with the end token if one was sampled"""
    logprobs: NDArray[np.float32]
    """[L], of the sampling distribution"""
    finish_reason: FinishReason


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: Sequence[Prompt],
    index: NDArray[np.int64],
    sampling: Sampling,
    generator: torch.Generator,
) -> list[Sampled]:
    """Samples completions.

    Args:
        policy: The policy.
        prompts: P prompts.
        index: int64 [N], the prompt of each completion.
        sampling: Sampling options.
        generator: Random generator on the policy's device.

    Returns:
        [N].

    Raises:
        ModelError: The model's logits are not finite.
    """
    rows = torch.from_numpy(index)
    growing = _Growing(len(rows), sampling, policy)
    prefixes, firsts = policy.prefill(prompts)
    attention = Steps(prefixes, rows, sampling.max_new_tokens)
    positions = torch.tensor([next_position(prompt) for prompt in prompts])[rows].to(policy.device)
    hidden = firsts[rows.to(policy.device)]
    while True:
        token, logprob = _draw(policy.logits(hidden), sampling, generator)
        growing.add(token, logprob)
        going = growing.still_going()
        if len(going) == 0:
            return growing.sampled()
        if len(going) < len(token):
            attention.select(going)
            kept = going.to(policy.device)
            token, positions = token[kept], positions[kept]
        hidden = policy.extend(token, positions + attention.length, attention)
        attention.length += 1


class _Growing:
    """Completions during sampling, some of which have ended.

    Args:
        count: N.
        sampling: Sampling options.
        policy: The policy that samples them.
    """

    def __init__(self, count: int, sampling: Sampling, policy: Policy) -> None:
        self._sampling, self._tokenizer, device = sampling, policy.family.processor.tokenizer, policy.device
        self._ends = torch.tensor(policy.family.end_tokens, device=device)
        self._tokens = torch.zeros(count, sampling.max_new_tokens, dtype=torch.int64, device=device)
        self._logprobs = torch.zeros(self._tokens.shape, device=device)
        self._lengths = torch.zeros(count, dtype=torch.int64, device=device)  # 0 before the end
        self._rows = torch.arange(count, device=device)  # of the completions in the batch
        self._step = 0
        self._look_every = 1 if device.type == "cpu" or sampling.stop else _LOOK_EVERY

    def add(self, token: Tensor, logprob: Tensor) -> None:
        """Appends the next token [n] of each completion in the batch."""
        self._tokens[self._rows, self._step], self._logprobs[self._rows, self._step] = token, logprob
        self._step += 1
        ends = torch.isin(token, self._ends) | self._stopped()
        lengths = self._lengths[self._rows]
        self._lengths[self._rows] = torch.where(ends & (lengths == 0), self._step, lengths)

    def still_going(self) -> Tensor:
        """Indices to continue, on the CPU. Ended completions leave once that makes the batch much smaller."""
        if self._step == self._sampling.max_new_tokens:
            return torch.empty(0, dtype=torch.int64)
        if self._step % self._look_every:
            return torch.arange(len(self._rows))
        going = torch.nonzero(self._lengths[self._rows] == 0)[:, 0]
        if len(going) > _CROWDED * len(self._rows):
            return torch.arange(len(self._rows))
        self._rows = self._rows[going]
        return going.cpu()

    def sampled(self) -> list[Sampled]:
        """[N]. Raises ModelError for non-finite logits: an earlier check would make a GPU wait at every token."""
        tokens, logprobs = self._tokens.cpu().numpy(), self._logprobs.cpu().numpy()
        found = [
            Sampled(tokens[i, : n or None].copy(), logprobs[i, : n or None].copy(), "stop" if n else "length")
            for i, n in enumerate(self._lengths.tolist())
        ]
        if any(np.isnan(one.logprobs).any() for one in found):
            raise ModelError(
                "the model's logits are not finite: its weights are not finite, or they overflow at this precision"
            )
        return found

    def _stopped(self) -> Tensor:
        """Bool [n], True for completions of the batch that end with a stop text now."""
        if not self._sampling.stop:
            return torch.zeros_like(self._rows, dtype=torch.bool)
        most = max(len(text.encode()) for text in self._sampling.stop)  # tokens that one may take
        lately = self._tokens[self._rows, max(0, self._step - most) : self._step].tolist()
        texts = self._tokenizer.batch_decode(lately, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        found = [any(stop in text for stop in self._sampling.stop) for text in texts]
        return torch.tensor(found, device=self._rows.device)


def _draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws a token [n] from each row of logits [n, V], and gives its log-probability [n]."""
    if sampling.temperature not in (0, 1):
        logits = logits / sampling.temperature
    logprobs = torch.log_softmax(logits, dim=-1)
    if sampling.cuts_tail:
        logprobs = _without_tail(logprobs, sampling)
    token = logprobs.argmax(dim=-1, keepdim=True) if sampling.temperature == 0 else _choose(logprobs.exp(), generator)
    return token[:, 0], logprobs.gather(-1, token)[:, 0]


def _choose(probs: Tensor, generator: torch.Generator) -> Tensor:
    """Draws a token [n, 1] from each row of probabilities [n, V] by a single random number.

    `torch.multinomial` draws one number per token of the vocabulary. The sums are float64: in float32 the least likely
    tokens would add nothing to them, and would never be drawn.
    """
    sums = probs.double().cumsum(dim=-1)
    places = torch.rand(len(probs), 1, dtype=sums.dtype, device=sums.device, generator=generator)
    found = torch.searchsorted(sums, places * sums[:, -1:], right=True)  # right: none of probability 0
    return found.clamp_(max=probs.shape[-1] - 1)  # NaN has no place; see `_Growing.sampled`


def _without_tail(logprobs: Tensor, sampling: Sampling) -> Tensor:
    """Log-probabilities [n, V] after top-k, then top-p."""
    ordered, order = logprobs.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        ordered[:, sampling.top_k :] = -torch.inf
    probs = torch.softmax(ordered, dim=-1)
    ordered[probs.cumsum(dim=-1) - probs >= sampling.top_p] = -torch.inf
    return torch.empty_like(logprobs).scatter(-1, order, torch.log_softmax(ordered, dim=-1))
