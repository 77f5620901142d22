"""What a step learns from: scored rollouts, and the tensors that are made of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vlmenv.core.rollout import Rollout, unbatch

Rows = slice | NDArray[np.int64]


@dataclass(slots=True)
class Rollouts:
    """N scored completions, the members of a group next to one another."""

    rollout: Rollout
    rewards: Tensor
    """float32 [N]"""
    records: list[dict[str, Any]]
    """[N], of each its sample's `id`, its `prompt`, `completion`, `finish_reason`, `reward` and `rewards`, the terms"""

    @classmethod
    def scored(cls, observations: Any, rollout: Rollout, rewards: NDArray[Any], infos: dict[str, Any]) -> Rollouts:
        """What became of a rollout when the environments scored it."""
        terms = infos.get("rewards", {})
        names = [name for name in terms if not name.startswith("_")]
        ids = infos.get("id", [""] * len(rollout))
        prompts = [observation["prompt"] for observation in unbatch(observations)]
        records = [
            {
                "id": str(ids[i]),
                "prompt": prompts[i],
                "completion": completion.text,
                "finish_reason": completion.finish_reason,
                "reward": float(rewards[i]),
                "rewards": {name: float(terms[name][i]) for name in names if terms[f"_{name}"][i]},
            }
            for i, completion in enumerate(rollout.completions)
        ]
        return cls(rollout, torch.as_tensor(np.asarray(rewards), dtype=torch.float32), records)

    @classmethod
    def most_informative(cls, rounds: Sequence[Rollouts], group_size: int) -> Rollouts:
        """As many groups as one round has, those whose rewards differ first, in the order in which they came."""
        if len(rounds) == 1:
            return rounds[0]
        informative = torch.cat([rollouts.informative_groups(group_size) for rollouts in rounds])
        wanted = len(rounds[0].rewards) // group_size
        first = torch.argsort((~informative).int(), stable=True)[:wanted].sort().values
        rows = (first[:, None] * group_size + torch.arange(group_size)).flatten().numpy()
        records = [record for rollouts in rounds for record in rollouts.records]
        rollout = Rollout.joined([rollouts.rollout for rollouts in rounds])[rows]
        rewards = torch.cat([rollouts.rewards for rollouts in rounds])
        return cls(rollout, rewards[torch.from_numpy(rows)], [records[i] for i in rows])

    def informative_groups(self, group_size: int) -> Tensor:
        """Which groups have rewards that differ, bool [N / G]."""
        groups = self.rewards.view(-1, group_size)
        return (groups != groups[:, :1]).any(dim=1)

    def metrics(self) -> dict[str, float]:
        """Means over the completions, by their logged names; of a term, over those that have it."""
        names = dict.fromkeys(name for record in self.records for name in record["rewards"])
        completions = self.rollout.completions
        return {
            "reward/mean": float(self.rewards.mean()),
            **{
                f"reward/{name}": float(np.mean([r["rewards"][name] for r in self.records if name in r["rewards"]]))
                for name in names
            },
            "completion/length": float(np.mean([len(completion.token_ids) for completion in completions])),
            "completion/truncated": float(np.mean([c.finish_reason == "length" for c in completions])),
        }


@dataclass(slots=True)
class Batch:
    """N completions of up to L tokens as tensors."""

    rollout: Rollout
    mask: Tensor
    """[N, L] bool, the tokens to learn from"""
    old_logprobs: Tensor
    """[N, L], at the time of sampling"""
    truncated: Tensor
    """[N] bool, whether the limit cut the completion off"""
    advantages: Tensor
    """[N, L] or [N, 1]"""
    ref_logprobs: Tensor | None = None
    """[N, L]"""
    values: Tensor | None = None
    """[N, L], of the critic at the time of sampling"""
    returns: Tensor | None = None
    """[N, L]"""

    @classmethod
    def of(cls, rollout: Rollout, device: torch.device, advantages: Tensor | None = None) -> Batch:
        """The tensors of a rollout, with advantages [N] of whole completions, 0 where left out."""
        completions = rollout.completions
        mask = _padded([torch.ones(len(c.token_ids), dtype=torch.bool) for c in completions])
        old = _padded([torch.from_numpy(c.logprobs) for c in completions])
        truncated = torch.tensor([c.finish_reason == "length" for c in completions])
        credit = torch.zeros(len(rollout)) if advantages is None else advantages
        return cls(rollout, mask.to(device), old.to(device), truncated.to(device), credit[:, None].to(device))

    def __len__(self) -> int:
        return len(self.rollout)

    def __getitem__(self, rows: Rows) -> Batch:
        """The completions of `rows`, padded to the longest of them."""
        rollout = self.rollout[rows]
        width = max(len(completion.token_ids) for completion in rollout.completions)
        index = rows if isinstance(rows, slice) else torch.from_numpy(rows).to(self.mask.device)
        tensors = {
            field.name: value[index, :width] if value.ndim == 2 else value[index]
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, rollout=rollout, **tensors)

    def put(self, name: str, rows: Rows, values: Tensor) -> None:
        """Writes the values [n, l] of some rows into the tensor of this name [N, L]."""
        if getattr(self, name) is None:
            setattr(self, name, torch.zeros_like(self.old_logprobs))
        getattr(self, name)[rows, : values.shape[1]] = values


def minibatches(size: int, group_size: int, count: int, rng: np.random.Generator) -> Iterator[Rows]:
    """Divides a batch into parts of nearly equal numbers of groups, drawn at random; one part is the batch itself."""
    if count == 1:
        yield slice(0, size)
        return
    order = rng.permutation(size // group_size)
    for groups in np.array_split(order, min(count, len(order))):
        yield (np.sort(groups)[:, None] * group_size + np.arange(group_size)).ravel()


def micro_batches(rollout: Rollout, size: int | None, tokens: int | None) -> list[slice]:
    """Cuts a rollout into passes of at most so many completions, and tokens with their padding.

    A pass holds each prompt once, and the completions padded to the longest. One that is too long by itself has a
    pass of its own.
    """
    prompts = [len(rollout.prompts[i].input_ids) for i in rollout.prompt_index]
    lengths = [len(completion.token_ids) for completion in rollout.completions]
    slices, start = [], 0
    for end in range(1, len(rollout) + 1):
        if end == len(rollout) or _is_too_large(rollout.prompt_index, prompts, lengths, start, end + 1, size, tokens):
            slices.append(slice(start, end))
            start = end
    return slices


def _is_too_large(
    index: NDArray[np.int64],
    prompts: list[int],
    lengths: list[int],
    start: int,
    end: int,
    size: int | None,
    tokens: int | None,
) -> bool:
    if size is not None and end - start > size:
        return True
    if tokens is None:
        return False
    distinct = {int(index[i]): prompts[i] for i in range(start, end)}
    return len(distinct) * max(distinct.values()) + (end - start) * max(lengths[start:end]) > tokens


def _padded(rows: list[Tensor]) -> Tensor:
    """Rows of unequal length as a tensor [N, L], zero where padded."""
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)
