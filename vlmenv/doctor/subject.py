"""The subject of the checks: a model with its samples and its engine, as far as they can be loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmenv.agents.engines.checksums import checksums, clear
from vlmenv.agents.published import PublishedProcessor
from vlmenv.agents.vlm import Sampling, VLMAgent
from vlmenv.building import DTYPES, adapt, check_engine, check_videos, limits_of, load_for_training, task_arguments
from vlmenv.core.console import open_console
from vlmenv.core.errors import ConfigError, PromptError, ReadingError
from vlmenv.core.rollout import IMAGE_MARK, Observation, Prompt, Rollout, unbatch
from vlmenv.envs.base import VisualTaskEnv
from vlmenv.envs.data.source import Sample
from vlmenv.envs.making import make_envs
from vlmenv.envs.vector import VisualTaskVectorEnv
from vlmenv.evaluation import play
from vlmenv.options.doctor import DoctorConfig
from vlmenv.options.task import EngineOptions
from vlmenv.runs.fitting import Room, leave_out_longer
from vlmenv.runs.lengths import Lengths, can_be_counted, count_tokens
from vlmenv.runs.models import model_folder

SAMPLES, GROUP = 8, 2
"""number of samples, and of completions per sample"""
_TOKENS = 32
"""length limit of the completions whose log-probabilities are compared"""
_LONG = 300
"""Approximate tokens of their prompts: vLLM caches only full blocks of tokens, of 128 on CPUs."""

Seen = tuple[str, str]
"""The figure of a check, and its advice; empty if it passed."""
Numbers = NDArray[np.float32]


class Unchecked(Exception):
    """There is nothing to check; the message tells why."""


class Subject:
    """A model, its samples and its engine, after they are loaded.

    Args:
        config: Options.
        device: Device of the model.

    Attributes:
        ids: Ids of the samples.
        samples: The samples of the task's source.
        blocked: Reason why the model cannot generate; empty if it can.
        engine_fault: Reason why the engine cannot generate; empty if it can.
        engine_reading: The engine's different encoding of a prompt; None if it has none.
        baseline: Completions before the weights are changed.
        took_update: True if the engine took an update.
    """

    def __init__(self, config: DoctorConfig[Any], device: torch.device) -> None:
        self.config, self.device = config, device
        self.blocked = ""
        self.engine_fault = ""
        self.engine_reading: ReadingError | None = None
        self.baseline: Rollout | None = None
        self.took_update = False
        self.ids: list[str] = []
        self.samples: list[Sample] = []
        self._agent: VLMAgent | None = None
        self._envs: VisualTaskVectorEnv | None = None
        self._shown: list[Observation] = []
        self._lengths: Lengths | None = None

    def close(self) -> None:
        """Closes engine and environments."""
        if self._agent is not None:
            self._agent.close()
        if self._envs is not None:
            self._envs.close()

    @property
    def agent(self) -> VLMAgent:
        """The agent. Raises Unchecked if it was not loaded."""
        if self._agent is None:
            raise Unchecked("there is no model")
        return self._agent

    @property
    def able(self) -> VLMAgent:
        """The agent. Raises Unchecked if it cannot generate."""
        if self.blocked:
            raise Unchecked(self.blocked)
        return self.agent

    @property
    def shown(self) -> list[Observation]:
        """The environments' observations, `GROUP` copies per sample. Raises Unchecked if there are none."""
        if not self._shown:
            raise Unchecked("there are no samples")
        return self._shown

    @property
    def task(self) -> VisualTaskEnv:
        """The environment. Raises Unchecked if there is none."""
        if self._envs is None:
            raise Unchecked("there are no samples")
        return self._envs.task

    def load_model(self) -> None:
        """Loads the model, with its engine if that starts, and prepares it for training."""
        agent = self._loaded()
        torch.manual_seed(self.config.seed)  # initialises new adapters
        adapt(agent, self.config.adaptation, self.config.batches.precision)
        agent.limits = limits_of(self.config)
        agent.seed(self.config.seed)
        self._agent = agent

    def load_samples(self) -> None:
        """Loads the first samples, in the order of the seed."""
        config = self.config
        data = config.data.arguments() | task_arguments(config)
        envs = self._envs = make_envs(config.env, SAMPLES * GROUP, group_size=GROUP, **data)
        check_videos(config, envs.task)
        if self._agent is not None and can_be_counted(envs.task):
            counted = count_tokens(envs.task, self._agent.family, open_console(quiet=True))
            self._lengths = leave_out_longer(envs.task, counted, config.data.max_prompt_tokens)
        batch, infos = envs.reset(seed=config.seed)
        self.ids = [str(one) for one in infos["id"][::GROUP]]
        self.samples = [envs.task.source.get(int(index)) for index in infos["index"][::GROUP]]
        self._shown = unbatch(batch)

    @cached_property
    def lengths(self) -> Lengths:
        """The lengths of the prompts of the data set, or of these samples if there is none."""
        if self._lengths is not None:
            return self._lengths
        return Lengths(np.array([len(prompt.input_ids) for prompt in self.prompts], np.int32))

    @property
    def room(self) -> Room:
        """The tokens that prompt and completion may have together."""
        return Room.of_agent(self.agent)

    def try_engine(self) -> None:
        """Asks the engine for one token per prompt. Records a different encoding of a prompt."""
        try:
            self.ask(self.shown[::GROUP], Sampling(0.0, 1))
        except ReadingError as error:
            self.engine_reading = error

    def need_engine(self) -> None:
        """Raises Unchecked if the engine cannot generate."""
        if self.engine_fault:
            raise Unchecked("the engine cannot be asked")

    def autocast(self) -> AbstractContextManager[None]:
        """The precision of forward passes, as a context."""
        precision = self.config.batches.precision
        return torch.autocast(self.device.type, DTYPES[precision], enabled=precision != "fp32")

    def ask(self, observations: Sequence[Observation], sampling: Sampling) -> Rollout:
        """Generates completions with the engine; with the model itself if the engine cannot generate."""
        agent, former = self.able, self.able.sampling
        agent.sampling = sampling
        try:
            with self.autocast(), self._giving_up():
                return agent.rollout(observations)
        finally:
            agent.sampling = former

    def sync(self) -> None:
        """Sends the present weights to the engine."""
        with self._giving_up():
            self.agent.sync()

    def checksums(self) -> dict[str, str]:
        """Checksums of the engine's weights; empty without an engine."""
        with self._giving_up():
            return {} if self.agent.engine is None else checksums(self.agent.engine)

    def clear_engine(self) -> None:
        """Sets all weights of the engine to 0, until the next `sync`."""
        with self._giving_up():
            if self.agent.engine is not None:
                clear(self.agent.engine)

    def ask_at_length(self, *, greedy: bool = False) -> Rollout:
        """Short completions of long prompts, always the same: `GROUP` sampled ones per prompt, or a greedy one."""
        tokens = min(_TOKENS, self.config.sampling.max_new_tokens)
        if greedy:
            return self.ask(self._long_prompts[::GROUP], Sampling(0.0, tokens))
        return self.ask(self._long_prompts, Sampling(self.config.sampling.temperature, tokens))

    @torch.no_grad()
    def scores(self, rollout: Rollout) -> Numbers:
        """The trainer's log-probabilities of a rollout's tokens, completions concatenated."""
        with self.autocast():
            found = self.agent.logprobs(rollout)
        return np.asarray(found.values[found.mask].float().cpu())

    @cached_property
    def answers(self) -> tuple[Rollout, Rollout]:
        """A greedy completion per sample, and `GROUP` sampled ones per sample, as in training."""
        sampling = self.config.sampling
        greedy = replace(sampling, temperature=0.0, top_k=None, top_p=1.0)
        return self.ask(self.shown[::GROUP], greedy), self.ask(self.shown, sampling)

    @cached_property
    def scored(self) -> tuple[NDArray[np.float64], dict[str, Any]]:
        """Rewards of the sampled completions, and the environments' infos."""
        assert self._envs is not None
        with self.autocast(), self._giving_up():
            played = play(self.able, self._envs, self.shown, self.answers[1])
        return played.rewards, played.infos

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The samples' prompts as the trainer encodes them."""
        return [self.able.family.encode(one) for one in self.shown[::GROUP]]

    @cached_property
    def published(self) -> list[tuple[NDArray[np.int64], dict[str, Tensor]]]:
        """The samples' prompts as the published processor encodes them: tokens and vision inputs."""
        if any(one.get("videos") for one in self.shown):
            raise Unchecked("published processors are compared on images alone, and these samples have videos")
        folder = self.agent.folder if self.config.published is None else model_folder(self.config.published)
        try:
            processor = PublishedProcessor(folder, self.config.prompts.template_switches())
        except ConfigError as error:
            raise Unchecked(str(error)) from error
        return [processor.read(one) for one in self.shown[::GROUP]]

    def give_up(self, reason: str) -> None:
        """Stops using the engine, if there is one. The model itself generates from then on."""
        engine, self.agent.engine = self.agent.engine, None
        if engine is not None:
            self.engine_fault = reason
            with suppress(Exception):  # the engine may be gone
                engine.close()

    @contextmanager
    def _giving_up(self) -> Iterator[None]:
        """Stops using the engine after an error, which may have ended it."""
        try:
            yield
        except PromptError:
            raise
        except Exception as error:
            self.give_up(f"it has failed: {error}")
            raise

    @cached_property
    def _long_prompts(self) -> list[Observation]:
        """The samples, with prompts repeated until they fill blocks of an engine's cache."""
        agent, found = self.agent, []
        most = agent.max_length if agent.engine is None else min(agent.max_length, agent.engine.max_length)
        room = min(_LONG, most - min(_TOKENS, self.config.sampling.max_new_tokens))
        for one, prompt in zip(self.shown[::GROUP], self.prompts, strict=True):
            own = len(agent.family.processor.tokenizer.encode(one["prompt"], add_special_tokens=False)) + 1
            times = 1 + max(0, room - len(prompt.input_ids)) // own
            longer: Observation = {**one, "prompt": _repeated(one["prompt"], times)}
            found += [longer] * GROUP
        return found

    def _loaded(self) -> VLMAgent:
        """The agent, without its engine if that does not start."""
        config = self.config
        try:
            check_engine(config, self.device)
            return load_for_training(config, self.device)
        except Exception as error:
            if config.generation.engine == "hf":
                raise
            self.engine_fault = str(error)
            return load_for_training(_without_engine(config), self.device)


def _repeated(prompt: str, times: int) -> str:
    """A prompt with its text repeated, and its images once."""
    return "\n".join([prompt, *[prompt.replace(IMAGE_MARK, "")] * (times - 1)])


def _without_engine(config: DoctorConfig[Any]) -> DoctorConfig[Any]:
    return replace(config, generation=EngineOptions())
