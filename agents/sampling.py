"""Sampling completions: each prompt runs through the model once, and what has ended takes no more time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmenv.agents.passes import Prefixes, Steps
from vlmenv.agents.policy import Policy, next_position
from vlmenv.agents.sending import send
from vlmenv.agents.step_graphs import Stepper, replays
from vlmenv.compat.transformers import keys_of_blocks
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
    """Limits of sampling. They bound its memory, and neither `rows` nor `tokens` changes the result."""

    rows: int | None = None
    """maximum number of prompts in a pass; None: no limit"""
    tokens: int | None = None
    """maximum number of tokens of prompts in a pass, which has at least one prompt; None: no limit"""
    cache: int | None = None
    """Maximum number of tokens whose keys and values are held at once, padding included, and states as the tokens that
    take as much; of one completion and its prompt in any case. Each completion then has random numbers of its own, so
    that the result is the same for any such number. None: no limit, and random numbers are drawn in the order of
    tokens"""

    @property
    def logits(self) -> int | None:
        """Maximum number of completions whose logits are computed at once; None: no limit."""
        return self.rows or self.tokens or (None if self.cache is None else _ROWS)

    def passes(self, lengths: Sequence[int]) -> list[slice]:
        """Divides prompts of some lengths into passes of neighbours."""
        most = self.tokens
        if self.cache is not None and self.rows is None and most is None:
            most = _PREFILL
        starts, used = [0], 0
        for i, length in enumerate(lengths):
            is_full = i - starts[-1] == self.rows or (most is not None and used + length > most)
            if is_full and i > starts[-1]:
                starts.append(i)
                used = 0
            used += length
        return [slice(*ends) for ends in pairwise([*starts, len(lengths)])]

    def fitting(self, index: NDArray[np.int64], lengths: NDArray[np.int64], each: int) -> int:
        """The number of completions, from the first, whose keys and values fit; at least 1.

        Args:
            index: int64 [n], the prompt of each completion.
            lengths: int64 [P], tokens of the prompts.
            each: Tokens of each completion.
        """
        if self.cache is None:
            return len(index)
        is_first = np.zeros(len(index), dtype=bool)
        is_first[np.unique(index, return_index=True)[1]] = True
        padded = np.cumsum(is_first) * np.maximum.accumulate(lengths[index])
        return max(1, int(np.sum(padded + each * np.arange(1, len(index) + 1) <= self.cache)))


def token_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of a token's keys and values in all blocks of a model's configuration. Those with a state have none."""
    return 2 * dtype.itemsize * sum(heads * size for heads, size in keys_of_blocks(config.get_text_config()))


def state_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of the states of a prompt or a completion, of any length, in all blocks of a model's configuration."""
    text = config.get_text_config()
    if not (blocks := _with_states(text)):
        return 0
    keys, values = (getattr(text, f"linear_num_{kind}_heads") for kind in ("key", "value"))
    sizes = text.linear_key_head_dim, text.linear_value_head_dim
    channels = 2 * keys * sizes[0] + values * sizes[1]
    rule = values * sizes[0] * sizes[1] * torch.float32.itemsize
    return int(blocks * ((text.linear_conv_kernel_dim - 1) * channels * dtype.itemsize + rule))


def state_tokens(config: Any, dtype: torch.dtype) -> int:
    """The number of tokens whose keys and values take as much as the states of one prompt or completion."""
    return -(-state_bytes(config, dtype) // max(1, token_bytes(config, dtype)))


def _with_states(text: Any) -> int:
    """The number of blocks that have a state in the place of keys and values."""
    return list(getattr(text, "layer_types", None) or ()).count("linear_attention")


NO_LIMITS = PassLimits()
_ROWS, _PREFILL = 64, 8192
"""Completions whose logits are computed at once, and tokens of prompts in a pass, where only the cache has a limit."""


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

    With a limit of the cache, as many completions begin as have room for their first tokens. Where those that go on
    outgrow the limit, the last of them make room, and begin anew once the others have ended.

    Args:
        policy: The policy.
        prompts: P prompts.
        index: int64 [N], the prompt of each completion.
        sampling: Sampling options.
        generator: Random generator on the policy's device.
        limits: Limits of passes and caches. Default: all run at once.

    Returns:
        [N].

    Raises:
        ModelError: The model's logits are not finite.
    """
    places = _Places(len(index), sampling, generator, ahead=limits.cache is not None)
    found: dict[int, Sampled] = {}
    while left := [i for i in range(len(index)) if i not in found]:
        found |= _wave(policy, prompts, index, np.array(left), sampling, places, limits)
    return [found[i] for i in range(len(index))]


def _wave(
    policy: Policy,
    prompts: Sequence[Prompt],
    index: NDArray[np.int64],
    left: NDArray[np.int64],
    sampling: Sampling,
    places: _Places,
    limits: PassLimits,
) -> dict[int, Sampled]:
    """Samples the first of the completions `left` that have room, and returns those that stayed until their end."""
    states, replayed = state_tokens(policy.model.config, policy.model.dtype), replays(policy)
    own_states = states * (2 if replayed else 1)  # those before and after a step that is replayed
    lengths = np.array([len(prompt.input_ids) for prompt in prompts]) + states
    begun = left[: limits.fitting(index[left], lengths, min(Steps.GROWTH, sampling.max_new_tokens) + own_states)]
    own, local = np.unique(index[begun], return_inverse=True)
    shown, rows = [prompts[i] for i in own], torch.from_numpy(local)
    growing = _Growing(torch.from_numpy(begun), sampling, policy)
    prefixes, firsts = prefilled(policy, shown, limits)
    attention = Steps(prefixes, rows, sampling.max_new_tokens)
    positions = torch.tensor([next_position(prompt) for prompt in shown])[rows].to(policy.device)
    stepper = Stepper(policy, attention, positions, replays=replayed)
    hidden = firsts[rows.to(policy.device)]
    while True:
        token, logprob = _next(policy, hidden, sampling, places.next(growing.rows, growing.step), limits.logits)
        growing.add(token, logprob)
        going = growing.still_going()
        if limits.cache is not None and attention.is_full and attention.length and len(going):
            lengths[:] = prefixes.packing.longest + states  # the prompts that are left keep their padding
            each = attention.next_capacity + own_states
            going = growing.within(functools.partial(_fitting, limits, index, lengths, each), going)
        if len(going) == 0:
            return growing.sampled()
        if len(going) < len(token):
            kept = going.to(policy.device)
            stepper.select(going, kept)
            token = token[kept]
        hidden = stepper.extend(token)


def prefilled(policy: Policy, prompts: Sequence[Prompt], limits: PassLimits) -> tuple[Prefixes, Tensor]:
    """Runs prompts through the model as `Policy.prefill` does, in passes within limits."""
    parts = [policy.prefill(prompts[own]) for own in limits.passes([len(prompt.input_ids) for prompt in prompts])]
    return Prefixes.joined([prefixes for prefixes, _ in parts]), torch.cat([firsts for _, firsts in parts])


def _next(
    policy: Policy, hidden: Tensor, sampling: Sampling, places: Tensor, most: int | None
) -> tuple[Tensor, Tensor]:
    """Draws a token [n] after each hidden state [n, H], and gives its log-probability [n]; logits of `most` rows."""
    rows = zip(torch.split(hidden, most or len(hidden)), torch.split(places, most or len(places)), strict=True)
    parts = [_draw(policy.logits(own), sampling, drawn) for own, drawn in rows]
    return torch.cat([token for token, _ in parts]), torch.cat([logprob for _, logprob in parts])


def _fitting(
    limits: PassLimits, index: NDArray[np.int64], lengths: NDArray[np.int64], each: int, which: NDArray[np.int64]
) -> int:
    """The number of completions `which`, from the first, that fit with some tokens each."""
    return limits.fitting(index[which], lengths, each)


class _Growing:
    """Completions during sampling, some of which have ended.

    Args:
        which: int64 [n] on the CPU, numbers of the completions.
        sampling: Sampling options.
        policy: The policy that samples them.

    Attributes:
        step: Number of tokens of each completion in the batch.
    """

    def __init__(self, which: Tensor, sampling: Sampling, policy: Policy) -> None:
        self._sampling, self._tokenizer, device = sampling, policy.family.processor.tokenizer, policy.device
        self._ends = torch.tensor(policy.family.end_tokens, device=device)
        self._which, self._given_up = which, set[int]()
        self._numbers = send(which, device)
        self._tokens = torch.zeros(len(which), sampling.max_new_tokens, dtype=torch.int64, device=device)
        self._logprobs = torch.zeros(self._tokens.shape, device=device)
        self._lengths = torch.zeros(len(which), dtype=torch.int64, device=device)  # 0 before the end
        self._rows = torch.arange(len(which), device=device)  # of the completions in the batch
        self.step = 0
        self._look_every = 1 if device.type == "cpu" or sampling.stop else _LOOK_EVERY

    @property
    def rows(self) -> Tensor:
        """Numbers [n] of the completions in the batch."""
        return self._numbers[self._rows]

    def add(self, token: Tensor, logprob: Tensor) -> None:
        """Appends the next token [n] of each completion in the batch."""
        self._tokens[self._rows, self.step], self._logprobs[self._rows, self.step] = token, logprob
        self.step += 1
        ends = torch.isin(token, self._ends) | self._stopped()
        lengths = self._lengths[self._rows]
        self._lengths[self._rows] = torch.where(ends & (lengths == 0), self.step, lengths)

    def still_going(self) -> Tensor:
        """Indices to continue, on the CPU. Ended completions leave once that makes the batch much smaller."""
        if self.step == self._sampling.max_new_tokens:
            return torch.empty(0, dtype=torch.int64)
        if self.step % self._look_every:
            return torch.arange(len(self._rows))
        going = torch.nonzero(self._lengths[self._rows] == 0)[:, 0]
        if len(going) > _CROWDED * len(self._rows):
            return torch.arange(len(self._rows))
        self._rows = self._rows[going]
        return going.cpu()

    def within(self, fitting: Callable[[NDArray[np.int64]], int], going: Tensor) -> Tensor:
        """The first of the indices `going` that fit; `fitting` tells how many of some completions do.

        All that have ended leave first. The others that do not fit are given up.
        """
        if fitting(self._which[self._rows.cpu()].numpy()) == len(self._rows):
            return going
        on = torch.nonzero(self._lengths[self._rows] == 0)[:, 0].cpu()
        rows = self._rows.cpu()[on]
        fit = fitting(self._which[rows].numpy()) if len(rows) else 0
        self._given_up |= set(rows[fit:].tolist())
        self._rows = rows[:fit].to(self._rows.device)
        return going[on[:fit]]

    def sampled(self) -> dict[int, Sampled]:
        """By number, without those given up.

        Raises ModelError for non-finite logits: an earlier check would make a GPU wait at every token.
        """
        tokens, logprobs = self._tokens.cpu().numpy(), self._logprobs.cpu().numpy()
        found = {
            which: Sampled(tokens[i, : n or None].copy(), logprobs[i, : n or None].copy(), "stop" if n else "length")
            for i, (which, n) in enumerate(zip(self._which.tolist(), self._lengths.tolist(), strict=True))
            if i not in self._given_up
        }
        if any(np.isnan(one.logprobs).any() for one in found.values()):
            raise ModelError(
                "the model's logits are not finite: its weights are not finite, or they overflow at this precision"
            )
        return found

    def _stopped(self) -> Tensor:
        """Bool [n], True for completions of the batch that end with a stop text now."""
        if not self._sampling.stop:
            return torch.zeros_like(self._rows, dtype=torch.bool)
        most = max(len(text.encode()) for text in self._sampling.stop)  # tokens that one may take
        lately = self._tokens[self._rows, max(0, self.step - most) : self.step].tolist()
        texts = self._tokenizer.batch_decode(lately, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        found = [any(stop in text for stop in self._sampling.stop) for text in texts]
        return torch.tensor(found, device=self._rows.device)


class _Places:
    """Random numbers from 0 to 1, float64, one for each token to draw. Greedy sampling draws none.

    Args:
        count: Number of completions, N.
        sampling: Sampling options.
        generator: Random generator on the policy's device.
        ahead: If true, those of all tokens are drawn now, so that they do not depend on which completions run together.
    """

    def __init__(self, count: int, sampling: Sampling, generator: torch.Generator, *, ahead: bool) -> None:
        self._generator, self._is_greedy = generator, sampling.temperature == 0
        self._all = self._drawn(count, sampling.max_new_tokens) if ahead and not self._is_greedy else None

    def next(self, rows: Tensor, step: int) -> Tensor:
        """[n, 1], of the tokens of completions `rows` [n] at a step."""
        if self._is_greedy:
            return torch.zeros(len(rows), 1, dtype=torch.float64, device=rows.device)
        drawn = self._drawn(len(rows), 1) if self._all is None else self._all[rows, step, None]
        return drawn.to(rows.device)

    def _drawn(self, *shape: int) -> Tensor:
        device = self._generator.device
        return torch.rand(*shape, dtype=torch.float64, device=device, generator=self._generator)


def _draw(logits: Tensor, sampling: Sampling, places: Tensor) -> tuple[Tensor, Tensor]:
    """Draws a token [n] from each row of logits [n, V] by `_Places`, and gives its log-probability [n]."""
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
