"""Sampling completions: each prompt runs through the model once, and what has ended takes no more time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmenv.agents.attention import Prefixes, Steps
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


@dataclass(frozen=True)
class PassLimits:
    """Limits of a forward pass of sampling. They bound its memory and do not change the result."""

    rows: int | None = None
    """maximum number of prompts in a pass; None: no limit"""
    tokens: int | None = None
    """maximum number of tokens of prompts in a pass, which has at least one prompt; None: no limit"""

    @property
    def logits(self) -> int | None:
        """Maximum number of completions whose logits are computed at once; None: no limit."""
        return self.rows or self.tokens

    def passes(self, lengths: Sequence[int]) -> list[slice]:
        """Divides prompts of some lengths into passes of neighbours."""
        starts, used = [0], 0
        for i, length in enumerate(lengths):
            is_full = i - starts[-1] == self.rows or (self.tokens is not None and used + length > self.tokens)
            if is_full and i > starts[-1]:
                starts.append(i)
                used = 0
            used += length
        return [slice(*ends) for ends in pairwise([*starts, len(lengths)])]


NO_LIMITS = PassLimits()


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: Sequence[Prompt],
    index: NDArray[np.int64],
    sampling: Sampling,
    generator: torch.Generator,
    limits: PassLimits = NO_LIMITS,
) -> list[Sampled]:
    """Samples completions.

    Args:
        policy: The policy.
        prompts: P prompts.
        index: int64 [N], the prompt of each completion.
        sampling: Sampling options.
        generator: Random generator on the policy's device.
        limits: Limits of a pass. Default: all prompts run in one pass.

    Returns:
        [N].

    Raises:
        ModelError: The model's logits are not finite.
    """
    rows = torch.from_numpy(index)
    growing = _Growing(len(rows), sampling, policy)
    prefixes, firsts = prefilled(policy, prompts, limits)
    attention = Steps(prefixes, rows, sampling.max_new_tokens)
    positions = torch.tensor([next_position(prompt) for prompt in prompts])[rows].to(policy.device)
    hidden = firsts[rows.to(policy.device)]
    while True:
        token, logprob = _next(policy, hidden, sampling, generator, limits.logits)
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


def prefilled(policy: Policy, prompts: Sequence[Prompt], limits: PassLimits) -> tuple[Prefixes, Tensor]:
    """Runs prompts through the model as `Policy.prefill` does, in passes within limits."""
    parts = [policy.prefill(prompts[own]) for own in limits.passes([len(prompt.input_ids) for prompt in prompts])]
    return Prefixes.joined([prefixes for prefixes, _ in parts]), torch.cat([firsts for _, firsts in parts])


def _next(
    policy: Policy, hidden: Tensor, sampling: Sampling, generator: torch.Generator, most: int | None
) -> tuple[Tensor, Tensor]:
    """Draws a token [n] after each hidden state [n, H], and gives its log-probability [n]; logits of `most` rows."""
    places = _places(len(hidden), sampling, generator, hidden.device)
    rows = zip(hidden.split(most or len(hidden)), places.split(most or len(hidden)), strict=True)
    parts = [_draw(policy.logits(own), sampling, drawn) for own, drawn in rows]
    return torch.cat([token for token, _ in parts]), torch.cat([logprob for _, logprob in parts])


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


def _places(count: int, sampling: Sampling, generator: torch.Generator, device: torch.device) -> Tensor:
    """Random numbers from 0 to 1, float64 [n, 1], one for each token to draw. Greedy sampling draws none."""
    if sampling.temperature == 0:
        return torch.zeros(count, 1, dtype=torch.float64, device=device)
    return torch.rand(count, 1, dtype=torch.float64, device=device, generator=generator)


def _draw(logits: Tensor, sampling: Sampling, places: Tensor) -> tuple[Tensor, Tensor]:
    """Draws a token [n] from each row of logits [n, V] by `_places`, and gives its log-probability [n]."""
    if sampling.temperature not in (0, 1):
        logits = logits / sampling.temperature
    logprobs = torch.log_softmax(logits, dim=-1)
    if sampling.cuts_tail:
        logprobs = _without_tail(logprobs, sampling)
    token = logprobs.argmax(dim=-1, keepdim=True) if sampling.temperature == 0 else _choose(logprobs.exp(), places)
    return token[:, 0], logprobs.gather(-1, token)[:, 0]


def _choose(probs: Tensor, places: Tensor) -> Tensor:
    """Draws a token [n, 1] from each row of probabilities [n, V] by a single random number.

    `torch.multinomial` draws one number per token of the vocabulary. The sums are float64: in float32 the least likely
    tokens would add nothing to them, and would never be drawn.
    """
    sums = probs.double().cumsum(dim=-1)
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
