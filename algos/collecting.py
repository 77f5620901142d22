"""Rounds of rollouts: batches of scored completions, collected now or during the update before.

A round shows the environments' next samples, lets the agent answer, and scores the answers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate import Accelerator
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from torch import distributed

from vlmenv.agents.base import Agent
from vlmenv.algos.advantages import zero_variance_share
from vlmenv.algos.background import Background
from vlmenv.algos.base import Algorithm
from vlmenv.algos.batch import Rollouts
from vlmenv.core.errors import DataError, PromptError
from vlmenv.core.rollout import Rollout, Turns, next_turns
from vlmenv.processes import Processes
from vlmenv.processes.failures import on_any_rank, shared_failure


@dataclass(slots=True)
class Collected:
    """A batch of completions on this rank, ready for an update."""

    rollouts: Rollouts
    metrics: dict[str, float]
    """metrics of the collection"""

    def state_dict(self) -> dict[str, Any]:
        """Converts to plain containers and tensors for a checkpoint."""
        return {"rollouts": self.rollouts.state_dict(), "metrics": self.metrics}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Collected:
        """Restores what `state_dict` returned."""
        return cls(Rollouts.from_state(state["rollouts"]), state["metrics"])


class Collector:
    """Lets an agent answer the environments' samples, batch after batch.

    Args:
        agent: The agent.
        envs: Environments in groups of `algorithm.config.group_size` neighbours with the same observation.
        algorithm: The algorithm. It decides how many rounds fill a batch, and if answers are sampled or imitated.
        processes: The strategy of the accelerator's ranks.
        accelerator: Device and ranks.
        is_ahead: If true, batches are collected with `ahead`.

    Attributes:
        shown: Number of batches of samples so far, also of those that dynamic sampling did not use.
        shown_ahead: Those of them that the batch collected ahead has used.
    """

    def __init__(
        self,
        agent: Agent,
        envs: VectorEnv[Any, Any, Any],
        algorithm: Algorithm,
        processes: Processes,
        accelerator: Accelerator,
        *,
        is_ahead: bool = False,
    ) -> None:
        self.agent, self.envs, self.algorithm = agent, envs, algorithm
        self.processes, self.accelerator = processes, accelerator
        self.shown, self.shown_ahead = 0, 0
        self._group: Any = None  # the update has collectives in the main thread, at the same time
        if is_ahead and accelerator.num_processes > 1:
            given = accelerator.init_handler
            self._group = distributed.new_group(backend="gloo", timeout=given and given.timeout)
        self._reset_with: dict[str, Any] = {}  # the arguments of the next reset
        self._seen: dict[str, Any] | None = None  # the environments' state of their samples, as of `shown`
        self._ahead: Collected | Exception | None = None  # the next step's batch, once it is collected

    def begin(self, seed: int) -> None:
        """Sets the seed of the order of samples. A restored collector goes on where it was."""
        seen = {"skip": self.shown} if self._seen is None else {"state": self._seen}
        self._reset_with = {"seed": seed, "options": seen if self.shown else None}

    def next(self, clock: dict[str, float]) -> Collected:
        """The next batch, collected now or during the update before.

        Args:
            clock: Gets the seconds of "rollout" and "score".

        Raises:
            DataError: A sample cannot be read, or its prompt does not fit the model.
            RewardError: A reward term failed, or a reward is not finite.
            TrainingError: Another rank failed.
            EngineError: The engine failed.
        """
        ahead, self._ahead, self.shown_ahead = self._ahead, None, 0
        if ahead is None:
            return self._collect(clock)
        clock |= {"rollout": 0.0, "score": 0.0}
        if isinstance(ahead, Exception):
            raise ahead
        return ahead

    @contextmanager
    def ahead(self, clock: dict[str, float]) -> Iterator[None]:
        """Collects the next batch while the block runs, with the weights of its beginning.

        The time that the block then still waits counts as rollout time. An error is raised by `next`.
        """
        shown, seen, random = self.shown, self._seen, self.agent.rng_state()
        ahead = Background(lambda: self._collect({}))
        try:
            yield
        except Exception:
            ahead.wait()
            raise
        with timed(clock, "rollout"):
            self._ahead = ahead.wait()
        if isinstance(self._ahead, Exception):  # a checkpoint must not count this batch
            self.shown, self._seen = shown, seen
            self.agent.set_rng_state(random)
        self.shown_ahead = self.shown - shown

    def snapshot(self) -> dict[str, Any]:
        """What is known of samples now, and the batch that was collected ahead. Nothing is copied."""
        ahead = {"ahead": self._ahead} if isinstance(self._ahead, Collected) else {}
        return ahead if self._seen is None else ahead | {"seen": self._seen}

    @staticmethod
    def state_dict(snapshot: dict[str, Any]) -> dict[str, Any]:
        """Converts a snapshot to plain containers and tensors."""
        ahead = {"ahead": snapshot["ahead"].state_dict()} if "ahead" in snapshot else {}
        return snapshot | ahead

    def load_state_dict(self, shown: int, shown_ahead: int, state: Mapping[str, Any]) -> None:
        """Restores what `shown` and `shown_ahead` were and what `state_dict` returned."""
        self.shown, self.shown_ahead, self._seen = shown, shown_ahead, state.get("seen")
        self._ahead = Collected.from_state(state["ahead"]) if "ahead" in state else None
        if self._ahead is None:
            self._show_again()

    def forget_samples(self) -> None:
        """Drops what is known of samples by their index, for a data set that has changed since the checkpoint."""
        self._seen, self._ahead = None, None
        self._show_again()

    def _show_again(self) -> None:
        """Lets the samples of a batch that was collected ahead, and is dropped, be shown again."""
        self.shown, self.shown_ahead = self.shown - self.shown_ahead, 0

    def _collect(self, clock: dict[str, float]) -> Collected:
        """Collects a batch, in several rounds with dynamic sampling, and the share of groups with equal rewards."""
        size = self.algorithm.config.group_size
        rounds: list[Rollouts] = []
        uniform: list[float] = []
        while not rounds or (len(rounds) < self.algorithm.most_rounds and self._lacks_groups(rounds)):
            rounds.append(self._round(clock))
            uniform.append(zero_variance_share(rounds[-1].rewards, size))
        if hasattr(self.envs.unwrapped, "state_dict"):
            self._seen = self.envs.unwrapped.state_dict()
        metrics = {"reward/zero_std_groups": float(np.mean(uniform))}
        if self.algorithm.most_rounds > 1:
            metrics["rounds"] = float(len(rounds))
        return Collected(Rollouts.most_informative(rounds, size), metrics)

    def _lacks_groups(self, rounds: list[Rollouts]) -> bool:
        """True if any rank has too few informative groups to fill a batch."""
        size = self.algorithm.config.group_size
        found = sum(rollouts.informative_groups(size).sum() for rollouts in rounds)
        return on_any_rank(bool(found < len(rounds[0].rewards) // size), self.accelerator, self._group)

    def _round(self, clock: dict[str, float]) -> Rollouts:
        """Generates and scores completions of the next batch of samples."""
        how, self._reset_with = self._reset_with, {}
        with self._shared_failure():
            observations, infos = self.envs.reset(**how)
        self.shown += 1
        turns = getattr(self.envs.unwrapped, "max_turns", 1)
        with self._weights_for_rollout(), self._shared_failure(), self.agent.generating(turns):
            with timed(clock, "rollout"), self.processes.autocast():
                observations, rollout = self._answered(observations, infos)
            rewards: list[NDArray[Any]] = []
            while True:
                with timed(clock, "score"):
                    shown, reward, terminated, truncated, infos = self.envs.step(rollout.texts)
                rewards.append(reward)
                if (ended := terminated | truncated).all():
                    break
                with timed(clock, "rollout"), self.processes.autocast():
                    rollout = self._proceeded(rollout, next_turns(shown, ended), infos)
            if len(rewards) == 1:
                return Rollouts.scored(observations, rollout, reward, infos)
            by_turn = np.stack(rewards, axis=1)
            return Rollouts.scored(shown, rollout, by_turn.sum(axis=1), infos, by_turn)

    def _proceeded(self, rollout: Rollout, turns: Turns, infos: dict[str, Any]) -> Rollout:
        """Generates the next turn of each episode that goes on."""
        texts = list(infos["answer"]) if self.algorithm.imitates else None
        try:
            return self.agent.proceed(rollout, turns, texts=texts)
        except PromptError as error:
            raise DataError(f"sample {infos['id'][error.index]}: {error.reason}") from error

    def _shared_failure(self) -> AbstractContextManager[None]:
        return shared_failure(self.accelerator, self._group)

    def _answered(self, observations: Any, infos: dict[str, Any]) -> tuple[Any, Rollout]:
        """Generates completions. A sample that the agent cannot take is replaced by the next, or refused."""
        while True:
            try:
                if self.algorithm.imitates:
                    return observations, self.agent.imitate(observations, list(infos["answer"]))
                return observations, self.agent.rollout(observations)
            except PromptError as error:
                if not hasattr(self.envs.unwrapped, "skips_broken"):  # environments of another kind
                    raise DataError(f"sample {infos['id'][error.index]}: {error.reason}") from error
                observations, infos = self.envs.reset(options={"replace": {error.index: error.reason}})

    def skipped(self) -> dict[int, str] | None:
        """Samples of all ranks that were skipped so far, by index, with place and reason. A collective.

        None: such samples are refused.
        """
        if not getattr(self.envs.unwrapped, "skips_broken", False):
            return None
        return dict(sorted(self.processes.collect(list(self.envs.unwrapped.skipped.items()))))  # type: ignore[attr-defined]

    def _weights_for_rollout(self) -> AbstractContextManager[None]:
        needed = self.agent.generates_itself and not self.algorithm.imitates
        return self.processes.gathered() if needed else nullcontext()


@contextmanager
def timed(clock: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds of the block to `clock[name]`."""
    started = time.perf_counter()
    yield
    clock[name] = clock.get(name, 0.0) + time.perf_counter() - started
