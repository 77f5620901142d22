"""The training loop, once for all algorithms: roll out, score, update.

It uses only what any other program can: `VectorEnv`, `Agent` and `Algorithm`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from gymnasium.vector import VectorEnv
from torch import Tensor, nn

from vlmenv.agents.base import Agent, LogProbs
from vlmenv.algos.advantages import zero_variance_share
from vlmenv.algos.base import Algorithm, LossInputs, LossOutput
from vlmenv.core.errors import ConfigError, DataError, PromptError
from vlmenv.core.rollout import Observations, Rollout


@dataclass(frozen=True)
class TrainerConfig:
    """How long and how fast to learn."""

    steps: int = 300
    """Batches of completions to learn from."""
    lr: float = 3e-4
    """Peak learning rate. 3e-4 suits the built-in model; models of billions of parameters want about 1e-6."""
    warmup_steps: int = 10
    """Steps over which the learning rate rises to its peak."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """What the learning rate does after the warm-up."""
    weight_decay: float = 0.0
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    micro_batch_size: int | None = None
    """Completions in one forward and backward pass; all of them where left out. Does not change the result."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1, not {self.steps}")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ConfigError(f"micro_batch_size must be at least 1, not {self.micro_batch_size}")
        if not (0 < self.lr < math.inf and self.max_grad_norm > 0):
            raise ConfigError("lr and max_grad_norm must be above 0")
        if not (0 <= self.weight_decay < math.inf and self.warmup_steps >= 0):
            raise ConfigError("weight_decay and warmup_steps must not be negative")

    def lr_factor(self, step: int) -> float:
        """What the peak learning rate is multiplied by in a step, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        left = 1 - (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        shapes = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}
        return shapes[self.lr_schedule]


@dataclass(slots=True)
class StepResult:
    """What one step saw and did, in this process."""

    step: int
    """counted from 1"""
    metrics: dict[str, float]
    """means over all processes, by their logged names"""
    observations: Observations
    rollout: Rollout
    infos: dict[str, Any]
    """of the scored answers"""


class Trainer:
    """Trains an agent on vectorised environments.

    Args:
        agent: Its policy is wrapped for the accelerator's processes and precision.
        envs: Groups of `algorithm.group_size` neighbours that show the same observation.
        algorithm: What to learn by.
        config: How long and how fast.
        accelerator: Device, precision and processes.

    Raises:
        ConfigError: The environments do not come in groups of the algorithm's size.
    """

    def __init__(
        self,
        agent: Agent,
        envs: VectorEnv[Any, Any, Any],
        algorithm: Algorithm,
        config: TrainerConfig,
        accelerator: Accelerator,
    ) -> None:
        group_size = getattr(envs.unwrapped, "group_size", 1)
        if group_size != algorithm.group_size:
            raise ConfigError(
                f"the environments come in groups of {group_size}, "
                f"but {algorithm.name} compares groups of {algorithm.group_size}"
            )
        self.agent, self.envs, self.algorithm = agent, envs, algorithm
        self.config, self.accelerator = config, accelerator
        self.reference = agent.frozen_copy() if algorithm.wants_reference else None
        optimizer = torch.optim.AdamW(agent.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        agent.policy, self.optimizer = accelerator.prepare(agent.policy, optimizer)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, config.lr_factor)

    def train(self, seed: int) -> Iterator[StepResult]:
        """Trains, handing over each step's result as it is done.

        Args:
            seed: Fixes the order of samples and the sampling; processes sample differently.

        Raises:
            DataError: A sample's prompt does not fit the model.
        """
        self.agent.seed(seed + self.accelerator.process_index)
        observations, infos = self.envs.reset(seed=seed)
        for step in range(1, self.config.steps + 1):
            yield self._step(step, observations, infos)
            if step < self.config.steps:
                observations, infos = self.envs.reset()

    def _step(self, step: int, observations: Observations, infos: dict[str, Any]) -> StepResult:
        clock: dict[str, float] = {}
        with timed(clock, "rollout"), self.accelerator.autocast(), names_sample(infos):
            rollout = self.agent.rollout(observations)
        with timed(clock, "score"):
            _, rewards, _, _, infos = self.envs.step(rollout.texts)
        with timed(clock, "update"):
            metrics = self._learn(rollout, torch.as_tensor(rewards, dtype=torch.float32))
        clock["sync"] = 0.0  # the policy itself generates: there is no engine to hand new weights to
        metrics |= self._reward_metrics(np.asarray(rewards), infos) | _completion_metrics(rollout)
        metrics |= {f"time/{name}": seconds for name, seconds in clock.items()}
        metrics = self._over_processes(metrics)
        tokens = sum(len(completion.token_ids) for completion in rollout.completions)
        metrics["tokens_per_second"] = tokens * self.accelerator.num_processes / sum(clock.values())
        return StepResult(step, metrics, observations, rollout, infos)

    def _learn(self, rollout: Rollout, rewards: Tensor) -> dict[str, float]:
        """Takes the algorithm's optimiser steps on a scored rollout; metrics of the last one."""
        advantages = self.algorithm.advantages(rewards).to(self.agent.device)
        metrics: dict[str, float] = {}
        for _ in range(self.algorithm.updates_per_rollout):
            metrics = self._update(rollout, advantages)
        self.scheduler.step()
        return metrics

    def _update(self, rollout: Rollout, advantages: Tensor) -> dict[str, float]:
        """One optimiser step, in micro-batches."""
        sums = self.backward(rollout, advantages)
        norm = self.accelerator.clip_grad_norm_(self.agent.parameters(), self.config.max_grad_norm)
        lr = float(self.scheduler.get_last_lr()[0])
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {name: value.item() for name, value in sums.items()} | {"policy/grad_norm": float(norm), "lr": lr}

    def backward(self, rollout: Rollout, advantages: Tensor) -> dict[str, Tensor]:
        """Adds up the gradient of the algorithm's loss over a rollout, without an optimiser step.

        Args:
            rollout: N completions.
            advantages: [N].

        Returns:
            What the algorithm logs, as means over the tokens of all processes times their number.
        """
        device, processes = self.agent.device, self.accelerator.num_processes
        lengths = torch.tensor([len(completion.token_ids) for completion in rollout.completions], device=device)
        num_tokens = int(cast(Tensor, self.accelerator.reduce(lengths.sum())).item())
        size = self.config.micro_batch_size or len(rollout)
        sums: dict[str, Tensor] = {}
        for start in range(0, len(rollout), size):
            rows = slice(start, start + size)
            with self._synced(last=start + size >= len(rollout)):
                output, entropy = self._loss(rollout[rows], advantages[rows], num_tokens)
                self.accelerator.backward(output.loss * processes)  # which are averaged over
            for name, value in (
                output.sums | {"policy/entropy": entropy, "loss": output.loss.detach() * num_tokens}
            ).items():
                sums[name] = sums.get(name, 0) + value * processes / num_tokens
        return sums

    def _loss(self, rollout: Rollout, advantages: Tensor, num_tokens: int) -> tuple[LossOutput, Tensor]:
        """The loss of a micro-batch, and the sum of its tokens' entropies."""
        with self.accelerator.autocast():
            now = self.agent.logprobs(rollout)
            reference = self._reference_logprobs(rollout)
        old = _padded([completion.logprobs for completion in rollout.completions], now)
        inputs = LossInputs(now.values, old, reference, advantages, now.mask)
        return self.algorithm.loss(inputs, num_tokens), now.entropy.sum()

    @torch.no_grad()
    def _reference_logprobs(self, rollout: Rollout) -> Tensor | None:
        return None if self.reference is None else self.reference.logprobs(rollout).values

    @contextmanager
    def _synced(self, last: bool) -> Iterator[None]:
        """Lets processes exchange gradients in the last micro-batch only."""
        if last:
            yield
        else:
            with self.accelerator.no_sync(self.agent.policy):
                yield

    def _reward_metrics(self, rewards: np.ndarray, infos: dict[str, Any]) -> dict[str, float]:
        scored = infos.get("rewards", {})
        terms = {
            f"reward/{name}": float(np.mean(values[scored[f"_{name}"]]))  # of the rows that have the term
            for name, values in scored.items()
            if name[0] != "_"
        }
        share = zero_variance_share(torch.as_tensor(rewards), self.algorithm.group_size)
        return {"reward/mean": float(rewards.mean()), **terms, "reward/zero_std_groups": share}

    def _over_processes(self, metrics: dict[str, float]) -> dict[str, float]:
        """Means over all processes."""
        if self.accelerator.num_processes == 1:
            return metrics
        gathered = gather_object([metrics])
        names = dict.fromkeys(name for own in gathered for name in own)  # a term may be in one process's rows alone
        return {name: float(np.mean([own[name] for own in gathered if name in own])) for name in names}


def _completion_metrics(rollout: Rollout) -> dict[str, float]:
    return {
        "completion/length": float(np.mean([len(completion.token_ids) for completion in rollout.completions])),
        "completion/truncated": float(np.mean([c.finish_reason == "length" for c in rollout.completions])),
    }


def _padded(rows: list[np.ndarray], like: LogProbs) -> Tensor:
    """Rows of unequal length as a tensor [N, L], zero where padded."""
    stacked = nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True)
    return stacked.to(like.values.device)


@contextmanager
def timed(clock: dict[str, float], name: str) -> Iterator[None]:
    """Writes the seconds that the block took to `clock[name]`."""
    started = time.perf_counter()
    yield
    clock[name] = time.perf_counter() - started


@contextmanager
def names_sample(infos: dict[str, Any]) -> Iterator[None]:
    """Says which sample it was when a prompt cannot be taken.

    Raises:
        DataError: In place of `PromptError`, with the sample's id.
    """
    try:
        yield
    except PromptError as error:
        raise DataError(f"sample {infos['id'][error.index]}: {error.reason}") from error
