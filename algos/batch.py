"""The data of a step: scored rollouts, and their tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vlmenv.algos.means import Mean
from vlmenv.core.errors import RewardError
from vlmenv.core.files import jsonable
from vlmenv.core.rollout import Completion, FinishReason, Observation, Prompt, Rollout, Rows, told_turns, unbatch
from vlmenv.core.spaces import Image
from vlmenv.core.video import Video

NO_TERMS: Final = ("reward/std", "reward/zero_std_groups")
"""Metrics with names like reward terms that are not means of rewards."""


@dataclass(slots=True)
class Rollouts:
    """N scored completions; the members of a group are neighbours."""

    rollout: Rollout
    rewards: Tensor
    """float32 [N]"""
    records: list[dict[str, Any]]
    """[N], one dictionary per completion: the `task` in a mix, the sample's `id` and `index`, earlier `turns` if any,
    `prompt`, `completion`, `finish_reason`, `reward`, `rewards` (terms by name), `traits` (the environment's other
    numbers), `prediction` and `target` as JSON can hold them, and `advantage` (the mean over the completion's tokens;
    None before the update, or if the update left the completion out)"""
    images: list[tuple[Image, ...]] = field(default_factory=list)
    """[N], the images of each conversation, by reference; empty if unknown"""
    turn_rewards: Tensor | None = None
    """float32 [N, T], the rewards of each turn's answer, 0 beyond the last; None if each episode has one turn"""
    weights: list[dict[str, float]] = field(default_factory=list)
    """[N], the weight of each reward term; empty if the environments do not tell"""
    videos: list[tuple[Video, ...]] = field(default_factory=list)
    """[N], the videos of each conversation, by reference; empty if unknown"""

    @classmethod
    def scored(
        cls,
        observations: Any,
        rollout: Rollout,
        rewards: NDArray[Any],
        infos: dict[str, Any],
        turn_rewards: NDArray[Any] | None = None,
    ) -> Rollouts:
        """Joins a rollout with its rewards.

        Args:
            observations: [N], those that were answered last, as the environments gave them.
            rollout: N completions.
            rewards: [N], of whole episodes.
            infos: The environments' infos of the last step, one array [N] per key.
            turn_rewards: [N, T], the parts of `rewards` by turn. Default: each episode has one.

        Raises:
            RewardError: A reward is not finite in float32.
        """
        shown = unbatch(observations)
        ids, indices = infos.get("id", [""] * len(rollout)), infos.get("index", [None] * len(rollout))
        records = [
            {
                **({"task": str(infos["mix_task"][i])} if "mix_task" in infos else {}),
                "id": str(ids[i]),
                "index": None if indices[i] is None else int(indices[i]),
                **told_turns(shown[i]),
                "prompt": shown[i]["prompt"],
                "completion": completion.text,
                "finish_reason": completion.finish_reason,
                "reward": float(rewards[i]),
                "rewards": _told(infos, "rewards", i),
                "traits": _told(infos, "traits", i),
                "prediction": jsonable(infos["prediction"][i]) if "prediction" in infos else None,
                "target": jsonable(infos["target"][i]) if "target" in infos else None,
                "advantage": None,
            }
            for i, completion in enumerate(rollout.completions)
        ]
        tensor = torch.as_tensor(np.asarray(rewards), dtype=torch.float32)
        for record in (records[i] for i in (~torch.isfinite(tensor)).nonzero()[:, 0].tolist()):
            raise RewardError(
                f"the reward of sample {record['id']} is {record['reward']}, with the terms {record['rewards']}; "
                "it must be finite in float32"
            )
        by_turn = None if turn_rewards is None else torch.as_tensor(turn_rewards, dtype=torch.float32)
        weights = [_told(infos, "weights", i) for i in range(len(rollout))] if "weights" in infos else []
        images, videos = [one["images"] for one in shown], [one.get("videos", ()) for one in shown]
        return cls(rollout, tensor, records, images, by_turn, weights, videos)

    @classmethod
    def joined(cls, parts: Sequence[Rollouts]) -> Rollouts:
        """Concatenates the completions of several batches."""
        return cls(
            Rollout.joined([part.rollout for part in parts]),
            torch.cat([part.rewards for part in parts]),
            [record for part in parts for record in part.records],
            [images for part in parts for images in part.images],
            _joined_turns(parts),
            [weights for part in parts for weights in part.weights],
            [videos for part in parts for videos in part.videos],
        )

    @classmethod
    def most_informative(cls, rounds: Sequence[Rollouts], group_size: int) -> Rollouts:
        """Selects as many groups as one round has: first those with differing rewards, in their order."""
        if len(rounds) == 1:
            return rounds[0]
        informative = torch.cat([rollouts.informative_groups(group_size) for rollouts in rounds])
        wanted = len(rounds[0].rewards) // group_size
        first = torch.argsort((~informative).int(), stable=True)[:wanted].sort().values
        return cls.joined(rounds)[(first[:, None] * group_size + torch.arange(group_size)).flatten().numpy()]

    def state_dict(self) -> dict[str, Any]:
        """Converts to plain containers and tensors for a checkpoint."""
        rollout, known = self.rollout, dict[int, Tensor]()
        for image in (image for images in self.images for image in images):
            known.setdefault(id(image), torch.tensor(image))
        clips = {id(video): video for videos in self.videos for video in videos}
        stored = {
            key: (torch.tensor(one.frames), torch.tensor(one.seconds), one.duration) for key, one in clips.items()
        }
        return {
            "prompts": [
                (torch.from_numpy(one.input_ids), torch.from_numpy(one.position_ids), dict(one.images))
                for one in rollout.prompts
            ],
            "completions": [_completion_state(one) for one in rollout.completions],
            "prompt_index": torch.from_numpy(rollout.prompt_index),
            "sampling": (rollout.temperature, rollout.full_distribution, rollout.from_trainer),
            "rewards": self.rewards,
            "records": self.records,
            "images": [tuple(known[id(image)] for image in images) for images in self.images],
            "turn_rewards": self.turn_rewards,
            "weights": self.weights,
            "videos": [tuple(stored[id(video)] for video in videos) for videos in self.videos],
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Rollouts:
        """Restores what `state_dict` returned."""
        prompts = [Prompt(ids.numpy(), places.numpy(), images) for ids, places, images in state["prompts"]]
        completions = [_restored(*one) for one in state["completions"]]
        rollout = Rollout(prompts, state["prompt_index"].numpy(), completions, *state["sampling"])
        images = [tuple(image.numpy() for image in images) for images in state["images"]]
        told = state.get("turn_rewards"), state.get("weights", [{}] * len(images))
        videos = [
            tuple(Video(frames.numpy(), seconds.numpy(), duration) for frames, seconds, duration in own)
            for own in state.get("videos", [()] * len(images))
        ]
        return cls(rollout, state["rewards"], state["records"], images, *told, videos)

    def __getitem__(self, rows: Rows) -> Rollouts:
        """Selects completions."""
        numbers = range(len(self.records))[rows] if isinstance(rows, slice) else rows
        images = [self.images[i] for i in numbers] if self.images else []
        videos = [self.videos[i] for i in numbers] if self.videos else []
        index = rows if isinstance(rows, slice) else torch.from_numpy(rows)
        turns = None if self.turn_rewards is None else self.turn_rewards[index]
        weights = [self.weights[i] for i in numbers] if self.weights else []
        records = [self.records[i] for i in numbers]
        return Rollouts(self.rollout[rows], self.rewards[index], records, images, turns, weights, videos)

    def observations(self) -> list[Observation]:
        """[N], what each completion answers. Only for episodes of one turn."""
        rows = zip(self.images, self.videos or [()] * len(self.images), self.records, strict=True)
        return [
            {"images": images, "videos": videos, "prompt": one["prompt"], "turns": tuple(one.get("turns", ()))}
            for images, videos, one in rows
        ]

    def sees(self) -> Tensor:
        """Bool [N], True for completions that follow images or videos. Only for episodes of one turn."""
        return torch.tensor([bool(one["images"] or one["videos"]) for one in self.observations()])

    def terms(self) -> tuple[Tensor, Tensor]:
        """The reward terms and their weights, both [N, K], so that they sum to the rewards.

        A term that a completion does not have is NaN, with weight 0. If the environments tell no weights, the only
        term is the reward itself.
        """
        if not any(self.weights):
            return self.rewards[:, None], torch.ones_like(self.rewards)[:, None]
        names = list(dict.fromkeys(name for record in self.records for name in record["rewards"]))
        values = [[record["rewards"].get(name, math.nan) for name in names] for record in self.records]
        return torch.tensor(values), torch.tensor([[own.get(name, 0.0) for name in names] for own in self.weights])

    def record_advantages(self, advantages: Tensor, mask: Tensor) -> None:
        """Sets the `advantage` of each record.

        Args:
            advantages: [N, L] or [N, 1].
            mask: bool [N, L], True at the tokens to learn from.
        """
        counts = mask.sum(dim=1)
        means = (advantages * mask).sum(dim=1) / counts.clamp(min=1)
        for record, mean, count in zip(self.records, means.tolist(), counts.tolist(), strict=True):
            record["advantage"] = mean if count and math.isfinite(mean) else None

    def informative_groups(self, group_size: int) -> Tensor:
        """Bool [N / G], True for groups with differing rewards."""
        groups = self.rewards.view(-1, group_size)
        return (groups != groups[:, :1]).any(dim=1)

    def metrics(self) -> dict[str, float]:
        """Means by their logged names. The mean of a term or trait is over the completions that have it."""
        completions, count = self.rollout.completions, len(self.records)
        lengths = [len(completion.written_ids) for completion in completions]
        return {
            "reward/mean": Mean(float(self.rewards.mean()), count),
            "reward/std": Mean(float(self.rewards.std(correction=0)), count),
            **{f"reward/{name}": mean for name, mean in self._means("rewards").items()},
            "completion/length": _mean(lengths),
            "completion/min_length": float(min(lengths)),
            "completion/max_length": float(max(lengths)),
            "completion/truncated": _mean([c.finish_reason == "length" for c in completions]),
            "completion/repetition": _mean([repetition(c.written_ids) for c in completions]),
            **{f"completion/{name}": mean for name, mean in self._means("traits").items()},
            **self._by_task(),
        }

    def _by_task(self) -> dict[str, float]:
        """The metrics of each task of a mix, as `task/NAME/METRIC`, and the share of its groups with equal rewards."""
        found: dict[str, float] = {}
        for name in dict.fromkeys(record["task"] for record in self.records if "task" in record):
            rows = np.array([i for i, record in enumerate(self.records) if record["task"] == name])
            own, samples = self[rows], np.array([self.records[i]["index"] for i in rows])
            own.records = [{key: value for key, value in record.items() if key != "task"} for record in own.records]
            uniform = [float(np.ptp(own.rewards.numpy()[samples == one]) == 0) for one in set(samples.tolist())]
            metrics = own.metrics() | {"reward/zero_std_groups": _mean(uniform)}
            found |= {f"task/{name}/{metric}": value for metric, value in metrics.items()}
        return found

    def _means(self, kind: str) -> dict[str, float]:
        names = dict.fromkeys(name for record in self.records for name in record[kind])
        return {name: _mean([r[kind][name] for r in self.records if name in r[kind]]) for name in names}


@dataclass(slots=True)
class Batch:
    """N completions of up to L tokens as tensors."""

    rollout: Rollout
    mask: Tensor
    """bool [N, L], True at the tokens to learn from"""
    old_logprobs: Tensor
    """[N, L], of the policy before the update"""
    truncated: Tensor
    """bool [N], True if the length limit cut the completion off"""
    advantages: Tensor
    """[N, L] or [N, 1]"""
    ref_logprobs: Tensor | None = None
    """[N, L]"""
    values: Tensor | None = None
    """[N, L], of the critic before the update"""
    returns: Tensor | None = None
    """[N, L]"""
    chosen: Tensor | None = None
    """bool [N, L], tokens that the loss treats in a way of their own"""
    masked_logprobs: Tensor | None = None
    """[N, L], of the policy before the update with masked images"""
    teacher_logprobs: Tensor | None = None
    """[N, L]"""
    masked: Rollout | None = None
    """the same completions after prompts with masked images"""
    correction: Tensor | None = None
    """[N, L], importance weights of the tokens' losses; None if the trainer's own policy sampled them"""
    is_fresh: bool = False
    """True if the first pass with gradients runs the policy before the update, so that it gives `old_logprobs` too"""

    @classmethod
    def of(cls, rollout: Rollout, device: torch.device, advantages: Tensor | None = None) -> Batch:
        """Makes the tensors of a rollout.

        Args:
            rollout: N completions.
            device: Device of the tensors.
            advantages: [N], one per completion. Default: 0.
        """
        completions = rollout.completions
        mask = _padded([torch.ones(len(c.token_ids), dtype=torch.bool) for c in completions])
        for row, written in ((i, c.written) for i, c in enumerate(completions) if c.written is not None):
            mask[row, : len(written)] = torch.from_numpy(written)
        old = _padded([torch.from_numpy(c.logprobs) for c in completions])
        truncated = torch.tensor([c.finish_reason == "length" for c in completions])
        credit = torch.zeros(len(rollout)) if advantages is None else advantages
        return cls(rollout, mask.to(device), old.to(device), truncated.to(device), credit[:, None].to(device))

    def __len__(self) -> int:
        return len(self.rollout)

    def __getitem__(self, rows: Rows) -> Batch:
        """Selects completions, padded to the longest of them."""
        rollout = self.rollout[rows]
        width = max(len(completion.token_ids) for completion in rollout.completions)
        index = rows if isinstance(rows, slice) else torch.from_numpy(rows).to(self.mask.device)
        tensors: dict[str, Any] = {
            field.name: value[index, :width] if value.ndim == 2 else value[index]
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, rollout=rollout, masked=self.masked and self.masked[rows], **tensors)

    def put(self, name: str, rows: Rows, values: Tensor) -> None:
        """Writes the values [n, l] of some rows into the tensor `name` [N, L]."""
        if getattr(self, name) is None:
            setattr(self, name, torch.zeros_like(self.old_logprobs))
        getattr(self, name)[rows, : values.shape[1]] = values


def repetition(token_ids: NDArray[np.int64], n: int = 4) -> float:
    """Share of a completion's n-grams of tokens that repeat an earlier one; 0 for completions shorter than n."""
    if len(token_ids) < n:
        return 0.0
    runs = np.lib.stride_tricks.sliding_window_view(token_ids, n)
    return 1 - len(np.unique(runs, axis=0)) / len(runs)


def minibatches(size: int, group_size: int, count: int, rng: np.random.Generator) -> Iterator[Rows]:
    """Divides a batch at random into `count` minibatches of nearly equal numbers of groups."""
    if count == 1:
        yield slice(0, size)
        return
    order = rng.permutation(size // group_size)
    for groups in np.array_split(order, min(count, len(order))):
        yield (np.sort(groups)[:, None] * group_size + np.arange(group_size)).ravel()


def micro_batches(rollout: Rollout, size: int | None, tokens: int | None) -> list[Rows]:
    """Divides a rollout into micro-batches.

    A micro-batch holds each of its prompts once, and completions of similar length. A completion beyond `tokens` has a
    micro-batch of its own.

    Args:
        rollout: N completions.
        size: Maximum number of completions. None: no limit.
        tokens: Maximum number of tokens, prompts included. None: no limit.
    """
    if size is None and tokens is None:
        return [slice(0, len(rollout))]
    index = rollout.prompt_index
    prompts = np.array([len(prompt.input_ids) for prompt in rollout.prompts])
    lengths = np.array([len(completion.token_ids) for completion in rollout.completions])
    longest = np.zeros_like(prompts)
    np.maximum.at(longest, index, lengths)
    passes: list[list[int]] = []
    used = 0
    for row in np.lexsort((lengths, index, longest[index])).tolist():  # siblings stay together
        is_new = not passes or index[passes[-1][-1]] != index[row]
        added = lengths[row] + is_new * prompts[index[row]]
        full = not passes or len(passes[-1]) == size or (tokens is not None and used + added > tokens)
        if full:
            passes.append([])
            used, added = 0, lengths[row] + prompts[index[row]]
        passes[-1].append(row)
        used += added
    return [np.array(rows) for rows in passes]


def padding_share(rollout: Rollout, passes: Sequence[Rows]) -> float:
    """Share of padding in the micro-batches' tensors of prompts and completions."""
    places = tokens = 0
    for rows in passes:
        own = rollout[rows]
        for lengths in ([len(p.input_ids) for p in own.prompts], [len(c.token_ids) for c in own.completions]):
            places += len(lengths) * max(lengths)
            tokens += sum(lengths)
    return 1 - tokens / places


def _joined_turns(parts: Sequence[Rollouts]) -> Tensor | None:
    """The rewards by turn of several batches, padded to the most turns."""
    if all(part.turn_rewards is None for part in parts):
        return None
    each = [part.rewards[:, None] if part.turn_rewards is None else part.turn_rewards for part in parts]
    most = max(one.shape[1] for one in each)
    return torch.cat([nn.functional.pad(one, (0, most - one.shape[1])) for one in each])


def _completion_state(one: Completion) -> tuple[Any, ...]:
    """A completion as plain containers and tensors: four parts, and three more after several turns."""
    state = one.text, torch.from_numpy(one.token_ids), torch.from_numpy(one.logprobs), one.finish_reason
    if one.written is None:
        return state
    assert one.position_ids is not None
    return *state, torch.from_numpy(one.written), torch.from_numpy(one.position_ids), dict(one.images)


def _restored(text: str, ids: Tensor, logprobs: Tensor, end: FinishReason, *later: Any) -> Completion:
    """The completion of a `_completion_state`."""
    one = Completion(text, ids.numpy(), logprobs.numpy(), end)
    if later:
        written, places, images = later
        one = replace(one, written=written.numpy(), position_ids=places.numpy(), images=images)
    return one


def _mean(values: Sequence[float]) -> Mean:
    return Mean(float(np.mean(values)), len(values))


def _padded(rows: list[Tensor]) -> Tensor:
    """Pads rows of unequal length with zeros to a tensor [N, L]."""
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _told(infos: dict[str, Any], kind: str, i: int) -> dict[str, float]:
    """Numbers of row i by name, from the environments' infos `rewards` or `traits`."""
    told = infos.get(kind, {})
    return {name: float(told[name][i]) for name in told if not name.startswith("_") and told[f"_{name}"][i]}
