"""The training loop, once for all algorithms: roll out, score, update.

It uses only what any other program can: `VectorEnv`, `Agent` and `Algorithm`.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from accelerate import Accelerator
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from vlmenv.agents.base import Agent
from vlmenv.algos.base import Algorithm, LossInputs, Scored, Teacher
from vlmenv.algos.batch import Batch, Rollouts, micro_batches, minibatches, padding_share
from vlmenv.algos.collecting import Collector, timed
from vlmenv.algos.correction import Correction, importance_weights, mismatch
from vlmenv.algos.faults import NonFiniteError, nonfinite_gradients, nonfinite_weights
from vlmenv.algos.losses import BOUND, is_dependence_bounded, token_weights
from vlmenv.algos.means import Mean, over_ranks, told_mean
from vlmenv.algos.optimizers import OptimizerName, make_optimizer
from vlmenv.algos.replay import Replay
from vlmenv.core.errors import ConfigError, DataError, PromptError, require, require_at_least, require_weight
from vlmenv.core.masking import masked
from vlmenv.core.rollout import Observation, Rollout, Rows
from vlmenv.processes import processes_of
from vlmenv.processes.failures import shared_failure


@dataclass(frozen=True)
class TrainerConfig:
    """Options of the trainer."""

    steps: int = 300
    """Training steps. Each learns from one batch of completions."""
    lr: float = 3e-4
    """Peak learning rate. 3e-4 suits the built-in model; models with billions of parameters need about 1e-6."""
    vision_lr: float | None = None
    """Peak learning rate of the vision tower and its projector. Default: lr."""
    warmup_steps: int = 10
    """Steps over which the learning rate rises to its peak."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning-rate schedule after the warm-up."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    optimizer: OptimizerName = "adamw"
    """Optimizer: adamw, adamw_8bit (8 bits per number of its state, by bitsandbytes), or adamw_offload (state and
    updates on the CPU, for weights on a GPU)."""
    max_grad_norm: float = 1.0
    """Maximum gradient norm. Larger gradients are scaled down to it."""
    micro_batch_size: int | None = None
    """Completions per micro-batch, and prompts per prefill without an engine. It does not change the result.
    Default: all."""
    micro_batch_tokens: int | None = None
    """Tokens per micro-batch, which has at least one completion, and per prefill without an engine. A prompt counts
    once. Default: no limit."""
    router_loss: float = 0.0
    """Weight of the routers' load-balancing loss (arXiv 2101.03961), for mixtures of experts. It is logged anyway."""
    max_skipped: int = 3
    """Maximum optimizer steps in a row that may be skipped because gradient or loss is not finite."""
    correction: Correction = "token"
    """Importance-sampling correction for the mismatch between engine and trainer, per token or per sequence. Weights
    beyond the cap are truncated, or set to 0 (mask)."""
    correction_cap: float = 2.0
    """Largest importance weight. A mask leaves out weights below its inverse too."""
    shard_within: int | None = None
    """Neighbouring ranks that hold a copy of the model between them with FSDP2, such as those of a machine. None: all
    ranks."""
    visual_dependence_every: int | None = None
    """Steps between two measurements of visual dependence: by how many nats per token log-probabilities fall when
    images are masked. None: none."""
    mask_share: float = 0.6
    """Share of an image's patches that are masked, drawn anew in each step, for visual_dependence_every and for
    algorithms with masked images, such as papo_g."""
    max_staleness: int = 0
    """Maximum staleness in steps, 0 or 1. With 1, a server generates the next step's completions during the update."""

    def __post_init__(self) -> None:
        sizes = {"micro_batch_size": self.micro_batch_size, "micro_batch_tokens": self.micro_batch_tokens}
        sizes |= {"shard_within": self.shard_within, "visual_dependence_every": self.visual_dependence_every}
        require(0 < self.mask_share <= 1, f"mask_share must be a share above 0, not {self.mask_share}")
        require_at_least(1, steps=self.steps, **sizes)
        require_at_least(0, warmup_steps=self.warmup_steps, max_skipped=self.max_skipped)
        require_weight("weight_decay", self.weight_decay)
        require_weight("router_loss", self.router_loss)
        require(0 < self.lr < math.inf, f"lr must be finite and above 0, not {self.lr}")
        require(self.max_grad_norm > 0, f"max_grad_norm must be above 0, not {self.max_grad_norm}")
        vision_lr, cap = self.vision_lr, self.correction_cap
        require(
            vision_lr is None or 0 < vision_lr < math.inf,
            f"vision_lr must be finite and above 0, not {vision_lr}; use freeze_vision to train no vision weights",
        )
        require(1 < cap < math.inf, f"correction_cap must be finite and above 1, not {cap}")
        unused = self.correction == "none" and cap != type(self).correction_cap
        require(not unused, "correction_cap has no effect with correction=none")
        require(self.max_staleness in (0, 1), f"max_staleness must be 0 or 1, not {self.max_staleness}")

    def lr_factor(self, step: int) -> float:
        """Factor of the peak learning rate in a step, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        left = 1 - (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        shapes = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}
        return shapes[self.lr_schedule]


@dataclass(slots=True)
class StepResult:
    """The result of one step on this rank."""

    step: int
    """counted from 1"""
    metrics: dict[str, float]
    """means over all ranks by their logged names; minima and maxima are those over all ranks"""
    rollouts: Rollouts
    """the completions that were sampled; under `replay` the update replaced some of their groups"""


class Trainer:
    """Trains an agent on vectorised environments.

    Args:
        agent: The agent. Its policy gets wrapped for the accelerator's ranks and precision.
        envs: Environments in groups of `algorithm.config.group_size` neighbours with the same observation.
        algorithm: The algorithm.
        config: Options.
        accelerator: Device, precision and ranks.
        teacher: The teacher, for an algorithm that wants one: an agent, which is not trained, or one elsewhere.
            Default: none.

    Attributes:
        step: Number of finished steps.

    Raises:
        ConfigError: The environments have another group size than the algorithm, `vision_lr` is given for a frozen
            vision tower, or a teacher is missing.
    """

    def __init__(
        self,
        agent: Agent,
        envs: VectorEnv[Any, Any, Any],
        algorithm: Algorithm,
        config: TrainerConfig,
        accelerator: Accelerator,
        teacher: Agent | Teacher | None = None,
    ) -> None:
        self.max_turns = int(getattr(envs.unwrapped, "max_turns", 1))
        _check(agent, envs, algorithm, config, self.max_turns)
        require(
            teacher is not None or not algorithm.wants_teacher,
            f"{algorithm.name} needs a teacher: name its model by the option teacher",
        )
        self.agent, self.envs, self.algorithm, self.teacher = agent, envs, algorithm, teacher
        self.config, self.accelerator = config, accelerator
        self.step = 0
        self._skipped = 0  # optimizer steps in a row
        self._seed = 0
        self._is_synced = False
        self._unseeded = False  # a rank that the checkpoint had no state of
        self.replay = Replay(algorithm.replay, algorithm.config.group_size) if algorithm.replay else None
        self.is_between_steps = True
        """False during an update: then the weights belong to no finished step."""
        self.processes = processes_of(accelerator, config.shard_within)
        require(
            not config.max_staleness or self.processes.samples_ahead,
            f"max_staleness 1 has not been tested with {self.processes.name}: leave it out, or use FSDP2 or DDP",
        )
        self.processes.configure(agent)
        self.collector = Collector(
            agent, envs, algorithm, self.processes, accelerator, is_ahead=config.max_staleness > 0
        )
        self.reference = agent.reference() if algorithm.wants_reference else None
        self.optimizer = self.processes.prepare(agent, self.reference, self._new_optimizer)
        self.scheduler = LambdaLR(self.optimizer, config.lr_factor)
        self._remember()

    def _new_optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        return make_optimizer(
            config.optimizer,
            self._parameter_groups(),
            lr=config.lr,
            weight_decay=config.weight_decay,
            device=self.agent.device,
        )

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """The trained parameters, with the learning rate of each part of the model."""
        groups, lr, vision_lr = self.agent.parameter_groups(), self.config.lr, self.config.vision_lr
        if vision_lr is not None and "vision" not in groups:
            raise ConfigError("vision_lr has no effect, because the vision tower is frozen")
        rates = {name: vision_lr if name == "vision" and vision_lr is not None else lr for name in groups}
        return [{"params": own, "lr": rates[name]} for name, own in groups.items()]

    def train(self, seed: int) -> Iterator[StepResult]:
        """Trains until `config.steps`, from the steps already taken.

        Args:
            seed: Seed of the order of samples and of sampling. Ranks sample differently.

        Yields:
            The result of each step.

        Raises:
            DataError: A sample cannot be read, or its prompt does not fit the model or the teacher.
            RewardError: A reward term failed, or a reward is not finite.
            NonFiniteError: Gradients or losses were not finite in more than `max_skipped` optimizer steps in a row.
            TrainingError: Another rank failed.
            EngineError: The engine failed, or cannot take the weights.
        """
        self._seed = seed
        if self.step == 0:
            self.agent.seed(seed + self.accelerator.process_index)
        elif self._unseeded:
            drawn = np.random.SeedSequence([seed, self.step, self.accelerator.process_index]).generate_state(1)[0]
            self.agent.seed(int(drawn))
            torch.manual_seed(int(drawn))
        self.collector.begin(seed)
        while self.step < self.config.steps:
            yield self._step()

    def sync(self) -> None:
        """Sends the present weights to the engine, unless it has them.

        Raises:
            EngineError: The engine failed, or cannot take them.
        """
        if not self._is_synced:
            self.agent.wake()
            with nullcontext() if self.agent.generates_itself else self.processes.gathered():
                self.agent.sync()
            self._is_synced = True

    def forget_images(self) -> None:
        """Drops features of images that were computed in batches of no step, and may differ in their last bits."""
        self.agent.forget_images()
        self._is_synced = self.agent.generates_itself

    def _step(self) -> StepResult:
        clock: dict[str, float] = {}
        started = time.perf_counter()
        with timed(clock, "sync"):
            if not self.algorithm.imitates:  # imitation uses no engine
                self.sync()
        collected = self.collector.next(clock, self.step / self.config.steps)
        if not self.config.max_staleness:
            self.agent.sleep()
        later = (self.step + 1) / self.config.steps
        ahead = self.collector.ahead(clock, later) if self._samples_ahead else nullcontext()
        with ahead, timed(clock, "update"):
            metrics = self._learn(collected.rollouts)
        metrics |= collected.rollouts.metrics() | collected.metrics
        metrics |= {f"time/{name}": seconds for name, seconds in clock.items()}
        metrics = over_ranks(self.processes.collect([metrics]))
        if (skipped := self.collector.skipped()) is not None:
            metrics["data/skipped"] = float(len(skipped))
        tokens = metrics["completion/length"] * len(collected.rollouts.rollout) * self.accelerator.num_processes
        metrics["tokens_per_second"] = tokens / (time.perf_counter() - started)
        self.step += 1
        self._remember()
        return StepResult(self.step, metrics, collected.rollouts)

    @property
    def _samples_ahead(self) -> bool:
        """True if the next step's completions are sampled during this step's update."""
        return self.config.max_staleness > 0 and self.step + 1 < self.config.steps

    def _remember(self) -> None:
        """Stores the state that a checkpoint of this moment needs."""
        shown = {"shown": self.collector.shown, "shown_ahead": self.collector.shown_ahead}
        self._finished = {"step": self.step, "skipped": self._skipped} | shown
        self._own: dict[str, Any] = {"agent": self.agent.rng_state(), "torch": torch.get_rng_state()}
        if self.agent.device.type == "cuda":
            self._own["cuda"] = torch.cuda.get_rng_state()
        self._own_samples = self.collector.snapshot()
        self._own_replay = None if self.replay is None else self.replay.snapshot()
        self.is_between_steps = True

    def state_dict(self) -> dict[str, Any]:
        """State that all ranks share after the last finished step, without the weights."""
        return self._finished | self.processes.shared_state() | self._kind

    @property
    def _kind(self) -> dict[str, Any]:
        """What a checkpoint was saved with."""
        processes = self.processes
        return {"processes": processes.name, "shards": processes.shards, "optimizer_name": self.config.optimizer}

    def process_state(self) -> dict[str, Any]:
        """State of this rank after the last finished step.

        Random states, its shard of the optimizer, and a batch that was collected ahead.
        """
        made = Collector.state_dict(self._own_samples)
        if self._own_replay is not None:
            made["replay"] = Replay.state_dict(self._own_replay)
        return self._own | made | self.processes.rank_state()

    def load(self, folder: Path, state: dict[str, Any], own: dict[str, Any] | None, *, same_ranks: bool = True) -> None:
        """Restores a checkpoint.

        Args:
            folder: Folder with the weights.
            state: Result of `state_dict`.
            own: Result of this rank's `process_state`. None: a rank that the checkpoint does not know; it seeds itself
                when training goes on.
            same_ranks: If false, another number of ranks saved it. What ranks know of samples and keep for replay is
                then dropped.
        """
        self.step, self._skipped = state["step"], state["skipped"]
        given = [
            {name: group[name] for name in ("initial_lr", "weight_decay")} for group in self.optimizer.param_groups
        ]
        self.processes.load(folder, state, own or {})
        for group, options in zip(self.optimizer.param_groups, given, strict=True):
            group |= options  # options may have changed since the checkpoint
        self.scheduler = LambdaLR(self.optimizer, self.config.lr_factor, self.step - 1)
        self._unseeded = own is None
        if own is not None:
            self._restore_random(own)
        kept = own if own is not None and same_ranks else {}
        self.collector.load_state_dict(state["shown"], state.get("shown_ahead", 0), kept)
        if self.replay is not None and "replay" in kept:  # replay may have been switched on since the checkpoint
            self.replay.load_state_dict(kept["replay"])
        self._is_synced = False
        self._remember()

    def _restore_random(self, own: dict[str, Any]) -> None:
        self.agent.set_rng_state(own["agent"])
        torch.set_rng_state(own["torch"])
        if "cuda" in own:
            torch.cuda.set_rng_state(own["cuda"])

    def forget_samples(self) -> None:
        """Drops what is known of samples by their index, for a data set that has changed since the checkpoint."""
        self.collector.forget_samples()
        self._remember()

    def _learn(self, rollouts: Rollouts) -> dict[str, float]:
        """Runs the algorithm's optimizer steps on scored rollouts, and gives the means of their metrics."""
        rng = np.random.default_rng([self._seed, self.accelerator.process_index, self.step])
        told: dict[str, float] = {}
        replayed = np.zeros(len(rollouts.rewards) // self.algorithm.config.group_size, np.bool_)
        if self.replay is None:
            batch = self._credited(rollouts, rng)
        else:
            rollouts, replayed = self.replay.fill(rollouts, rng)
            batch = self._credited(rollouts, rng)
            self.replay.keep(rollouts, batch.advantages, batch.mask, replayed)
            told["replayed"] = float(replayed.mean())
        rollouts.record_advantages(batch.advantages, batch.mask)
        told |= self._correct(batch, rollouts.rollout)
        told |= self._distances(batch, replayed)
        if self._measures_dependence:
            told |= self._dependence(batch, rollouts, replayed)
        if not self.algorithm.learns_masked:
            batch.masked = None
        config, logged = self.algorithm.config, []
        for _ in range(config.mu):
            for rows in minibatches(len(batch), config.group_size, config.minibatches, rng):
                logged.append(self._update(batch[rows], rollouts[rows]))
        self.is_between_steps = self._is_synced = False
        with warnings.catch_warnings():  # torch warns if the first optimizer step was skipped
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.scheduler.step()
        means = {name: float(np.mean([metrics[name] for metrics in logged])) for name in logged[-1]}
        return means | told | {"padding": padding_share(batch.rollout, self._passes(batch.rollout))}

    def _distances(self, batch: Batch, replayed: NDArray[np.bool_]) -> dict[str, float]:
        """Metrics of the policies that advantages compare; of the teacher over the groups that were sampled now."""
        told: dict[str, float] = {}
        if batch.masked_logprobs is not None:
            capped = is_dependence_bounded(batch.old_logprobs, batch.masked_logprobs)[batch.mask]
            told |= told_mean("policy/perception_bounded", capped.float())
        if batch.teacher_logprobs is None:
            return told
        gaps = (batch.old_logprobs - batch.teacher_logprobs)[batch.mask & self._fresh(replayed)[:, None]]
        far = (gaps.abs() > BOUND).float()
        return told | told_mean("policy/teacher_kl", gaps) | told_mean("policy/teacher_bounded", far)

    def _fresh(self, replayed: NDArray[np.bool_]) -> Tensor:
        """Bool [N], True for the completions of groups [P] that are not replayed."""
        return ~torch.from_numpy(replayed).to(self.agent.device).repeat_interleave(self.algorithm.config.group_size)

    @torch.no_grad()
    def _credited(self, rollouts: Rollouts, rng: np.random.Generator) -> Batch:
        """The batch with advantages, before any update."""
        batch = Batch.of(rollouts.rollout, self.agent.device)
        if self._masks_now:
            batch.masked = self.agent.reprompted(batch.rollout, self._masked(rollouts.observations()))
        can_wait = self._updates_once and not self._samples_exactly and not self._compares
        batch.is_fresh = can_wait and _is_the_learners(rollouts.rollout)
        wanted = self.reference is not None or self.algorithm.wants_values or self.algorithm.wants_masked
        if wanted or self._lacks_old(batch):
            self._add_estimates(batch)
        if self.algorithm.wants_teacher:
            self._add_teacher(batch, rollouts)
        terms, weights = rollouts.terms()
        credit = self.algorithm.credit(
            Scored(
                rollouts.rewards.to(self.agent.device),
                batch.mask,
                batch.old_logprobs,
                batch.ref_logprobs,
                batch.values,
                batch.truncated,
                self._most_tokens,
                self.accelerator.gather,
                lambda tensor: cast(Tensor, self.accelerator.reduce(tensor)),
                terms.to(self.agent.device),
                weights.to(self.agent.device),
                rng,
                None if rollouts.turn_rewards is None else rollouts.turn_rewards.to(self.agent.device),
                batch.masked_logprobs,
                batch.teacher_logprobs,
                rollouts.sees().to(self.agent.device) if self.algorithm.wants_masked else None,
            )
        )
        batch.advantages, batch.mask, batch.returns = credit.advantages, credit.mask, credit.returns
        batch.chosen = credit.chosen
        return batch

    def _add_estimates(self, batch: Batch) -> None:
        """Adds the reference's log-probabilities and the critic's values.

        Also recomputes the policy's log-probabilities if the sampler's are of another distribution.
        """
        lacks_old = self._lacks_old(batch)
        for rows in self._passes(batch.rollout):
            with self.processes.autocast():
                if self.reference is not None:
                    batch.put("ref_logprobs", rows, self.reference.logprobs(batch.rollout[rows]).values)
                if self.algorithm.wants_masked:
                    assert batch.masked is not None
                    batch.put("masked_logprobs", rows, self.agent.logprobs(batch.masked[rows]).values)
                if not self.algorithm.wants_values and not lacks_old:
                    continue
                now = self.agent.logprobs(batch.rollout[rows])
                if lacks_old:
                    batch.put("old_logprobs", rows, now.values)
                if now.state_values is not None:
                    batch.put("values", rows, now.state_values)

    def _add_teacher(self, batch: Batch, rollouts: Rollouts) -> None:
        """Adds the teacher's log-probabilities of the completions, after prompts that it encodes itself."""
        teacher, shown = self.teacher, rollouts.observations()
        assert teacher is not None
        if not isinstance(teacher, Agent):
            with shared_failure(self.accelerator):
                told = teacher.logprobs(batch.rollout, shown)
            batch.put("teacher_logprobs", slice(None), told.to(self.agent.device))
            return
        with shared_failure(self.accelerator):
            try:
                taught = teacher.reprompted(batch.rollout, shown)
            except PromptError as error:
                raise DataError(
                    f"sample {rollouts.records[error.index]['id']}, for the teacher: {error.reason}"
                ) from error
        for rows in self._passes(taught):
            with self.processes.autocast():
                batch.put("teacher_logprobs", rows, teacher.logprobs(taught[rows]).values)

    @property
    def _masks_now(self) -> bool:
        """True if this step needs the completions after prompts with masked images."""
        return self.algorithm.wants_masked or self.algorithm.learns_masked or self._measures_dependence

    @property
    def _measures_dependence(self) -> bool:
        """True if visual dependence is measured in this step."""
        every = self.config.visual_dependence_every
        return every is not None and (self.step + 1) % every == 0

    def _masked(self, observations: list[Observation]) -> list[Observation]:
        """Observations with images masked as in this step."""
        return masked(observations, self.config.mask_share, seed=self._seed + self.step)

    @torch.no_grad()
    def _dependence(self, batch: Batch, rollouts: Rollouts, replayed: NDArray[np.bool_]) -> dict[str, float]:
        """By how many nats per token log-probabilities fall with masked images.

        Measured over the completions of this step's policy that follow images.
        """
        assert batch.masked is not None
        shown = rollouts.sees().to(self.agent.device) & self._fresh(replayed)
        lost, tokens = 0.0, 0
        for rows in self._passes(batch.rollout):
            with self.processes.autocast():
                seen, blind = self.agent.logprobs(batch.rollout[rows]), self.agent.logprobs(batch.masked[rows])
            own = seen.mask & shown[rows if isinstance(rows, slice) else torch.from_numpy(rows)][:, None]
            lost += float((seen.values - blind.values)[own].sum())
            tokens += int(own.sum())
        return {"vision/dependence": Mean(lost / tokens, tokens)} if tokens else {}

    def _lacks_old(self, batch: Batch) -> bool:
        """True if the trainer must recompute `old_logprobs`."""
        return not (_is_the_learners(batch.rollout) and (self._samples_exactly or batch.is_fresh))

    @property
    def _samples_exactly(self) -> bool:
        """True if sampling and training compute the same log-probabilities.

        In half precision they differ by some hundredths, because sums run in another order. Replayed groups keep the
        log-probabilities of their sampling; imitation needs none.
        """
        return self.accelerator.mixed_precision == "no" or self.replay is not None or self.algorithm.imitates

    @property
    def _compares(self) -> bool:
        """True if advantages compare `old_logprobs` with others, so that both must be of passes of one kind.

        In half precision the sampler's differ from those of a pass by more than two policies may.
        """
        algorithm = self.algorithm
        return algorithm.wants_masked or algorithm.wants_teacher or algorithm.credits_reference

    @property
    def _updates_once(self) -> bool:
        """True if a step has a single optimizer step."""
        return self.algorithm.config.mu * self.algorithm.config.minibatches == 1

    def _correct(self, batch: Batch, rollout: Rollout) -> dict[str, float]:
        """Sets importance weights of a batch that an engine sampled, and gives metrics of the mismatch."""
        if rollout.from_trainer:
            return {}
        sampled = Batch.of(rollout, self.agent.device)
        logratio = batch.old_logprobs - sampled.old_logprobs
        how, cap = self.config.correction, self.config.correction_cap
        batch.correction = importance_weights(logratio, sampled.mask, how, cap)
        return mismatch(logratio, sampled.mask, how, cap)

    def _update(self, batch: Batch, rollouts: Rollouts) -> dict[str, float]:
        """Runs one optimizer step, in micro-batches. It is skipped if gradient or loss is not finite."""
        sums = self.backward(batch)
        loss = float(cast(Tensor, self.accelerator.reduce(sums["loss"], "mean")))
        lr = self.config.lr * self.config.lr_factor(self.step)
        were_between, self.is_between_steps = self.is_between_steps, False
        norm = self.processes.step(self.config.max_grad_norm, learn=math.isfinite(loss))
        finite = math.isfinite(norm) and math.isfinite(loss)
        self._skipped = 0 if finite else self._skipped + 1
        if not finite:  # nothing has changed
            self.is_between_steps = were_between
        if self._skipped > self.config.max_skipped:
            what = f"the gradient's norm was {norm} and the loss {loss}"
            raise self._nonfinite(f"{what} in {self._skipped} optimizer steps in a row", batch, rollouts)
        metrics = {name: value.item() for name, value in sums.items()}
        return metrics | {"policy/grad_norm": norm, "policy/skipped": float(not finite), "lr": lr}

    def _nonfinite(self, message: str, batch: Batch, rollouts: Rollouts) -> NonFiniteError:
        """The error with the batch, and the names of the parameters that are not finite."""
        self.optimizer.zero_grad()  # clipping has spread non-finite numbers over all gradients
        self.backward(batch)
        gradients, weights = nonfinite_gradients(self.agent.policy), nonfinite_weights(self.agent.policy)
        self.optimizer.zero_grad()
        logprobs = torch.zeros_like(batch.old_logprobs)
        for rows in self._passes(batch.rollout):
            with torch.no_grad(), self.processes.autocast():
                values = self.agent.logprobs(batch.rollout[rows]).values
            logprobs[rows, : values.shape[1]] = values
        return NonFiniteError(message, self.step + 1, rollouts, batch, logprobs, gradients, weights)

    def backward(self, batch: Batch) -> dict[str, Tensor]:
        """Accumulates the gradient of the algorithm's loss over a batch, without an optimizer step.

        Returns:
            The algorithm's metrics: this rank's part of the means over the tokens of all ranks, times their number.
        """
        processes = self.accelerator.num_processes
        counts = torch.tensor([float(batch.mask.sum()), float(len(batch))], device=self.agent.device)
        num_tokens, num_sequences = (int(n) for n in cast(Tensor, self.accelerator.reduce(counts)).tolist())
        parts = self._passes(batch.rollout)
        sums: dict[str, Tensor] = {}
        for rows in parts:
            with self.processes.accumulating(last=rows is parts[-1]):
                logged = self._backward_part(batch[rows], num_tokens, num_sequences)
            for name, value in logged.items():
                sums[name] = sums.get(name, 0) + value * processes / max(1, num_tokens)
        return sums

    @property
    def _most_tokens(self) -> int:
        """Length limit of an episode's answers together, in tokens."""
        return self.agent.max_new_tokens * self.max_turns

    def _passes(self, rollout: Rollout) -> list[Rows]:
        """The micro-batches of a rollout."""
        size, tokens = self.config.micro_batch_size, self.config.micro_batch_tokens
        if self.algorithm.learns_masked:  # each completion passes twice at a time
            size, tokens = size and max(1, size // 2), tokens and max(1, tokens // 2)
        parts = micro_batches(rollout, size, tokens)
        return self.processes.split_evenly(parts)

    def _backward_part(self, batch: Batch, num_tokens: int, num_sequences: int) -> dict[str, Tensor]:
        """Runs forward and backward pass of a micro-batch, and gives sums over its tokens of the metrics."""
        both = batch.rollout if batch.masked is None else Rollout.joined([batch.rollout, batch.masked])
        with self.processes.autocast():
            now = self.agent.logprobs(both)
        logprobs, blind = now.values[: len(batch)], now.values[len(batch) :]
        entropy = now.entropy[: len(batch)]
        mask = batch.mask
        weights = token_weights(
            mask,
            self.algorithm.aggregation,
            num_tokens=num_tokens,
            num_sequences=num_sequences,
            max_tokens=self._most_tokens,
        )
        if batch.correction is not None:
            weights = weights * batch.correction
        inputs = LossInputs(
            logprobs,
            logprobs.detach() if batch.is_fresh else batch.old_logprobs,
            batch.advantages,
            mask,
            weights,
            batch.ref_logprobs,
            now.state_values,
            batch.values,
            batch.returns,
            batch.chosen,
            entropy,
            None if batch.masked is None else blind,
        )
        output, tokens = self.algorithm.loss(inputs), mask.sum()
        loss, sums = output.loss, output.sums | {"policy/entropy": entropy.detach()[mask].sum()}
        if now.router_loss is not None:
            sums["policy/router_loss"] = now.router_loss.detach() * tokens
            if self.config.router_loss:
                loss = loss + self.config.router_loss * now.router_loss * tokens / max(1, num_tokens)
        self.processes.backward(loss)
        return sums | {"loss": loss.detach() * num_tokens}


def _check(
    agent: Agent, envs: VectorEnv[Any, Any, Any], algorithm: Algorithm, config: TrainerConfig, max_turns: int
) -> None:
    """Raises ConfigError if an agent, environments, an algorithm and options do not go together."""
    group_size = getattr(envs.unwrapped, "group_size", 1)
    if group_size != algorithm.config.group_size:
        raise ConfigError(
            f"the environments have group_size={group_size}, "
            f"but {algorithm.name} has group_size={algorithm.config.group_size}"
        )
    require(
        not config.router_loss or agent.routes,
        "router_loss is for mixtures of experts with shared prompts, which this model is not: leave it out",
    )
    if not algorithm.imitates:
        images, videos = (getattr(envs.unwrapped, name, 0) for name in ("max_images", "takes_videos"))
        agent.check_episodes(max_turns, int(images), videos=bool(videos))
    masks = algorithm.wants_masked or algorithm.learns_masked or config.visual_dependence_every is not None
    by_term = getattr(algorithm.config, "per_term", False)
    require(
        max_turns == 1 or not (masks or algorithm.wants_teacher or by_term),
        "masked images, a teacher and per_term are for episodes of one turn: set max_turns to 1",
    )


def _is_the_learners(rollout: Rollout) -> bool:
    """True if a rollout's log-probabilities are of the trainer's distribution."""
    return rollout.full_distribution and rollout.from_trainer
