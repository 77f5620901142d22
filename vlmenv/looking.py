"""Measuring how much an agent looks: its answers and their log-probabilities with other images than those shown."""

from __future__ import annotations

import functools
import json
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from rich.console import Console

from vlmenv.agents.base import Agent
from vlmenv.agents.vlm import VLMAgent
from vlmenv.core.console import say, warn
from vlmenv.core.errors import DataError, PromptError, require
from vlmenv.core.files import write_atomic
from vlmenv.core.masking import Change, Shuffle, masked
from vlmenv.core.rollout import Observation, Observations, Rollout, group_neighbours, unbatch
from vlmenv.envs.base import VisualTaskEnv
from vlmenv.envs.metrics.intervals import Interval, metric_interval, paired_interval
from vlmenv.envs.vector import VisualTaskVectorEnv
from vlmenv.evaluation import Evaluation, as_json, differences, evaluate, metrics_table, write_evaluation, written
from vlmenv.processes import Processes

SHOWN: Final = "as shown"
"""The measurement with the images that belong to the samples."""


@dataclass
class Sight:
    """Measurements of the same samples with the images as shown, masked, shuffled and blank."""

    evaluations: dict[str, Evaluation]
    """by what was done to the images, with the metrics `reward` and `logprob` besides"""
    changes: dict[str, dict[str, Interval]]
    """by what was done: paired differences from the images as shown"""

    @property
    def looks(self) -> bool:
        """True if blank images make the first metric worse, beyond its 95 % interval."""
        metric = next(iter(self.evaluations[SHOWN].metrics))
        return self.changes["blank"][metric].high < 0

    def write(self, folder: Path) -> None:
        """Writes visual_dependence.json, and the answers of each measurement in a folder of its own."""
        for name in self.changes:
            write_evaluation(self.evaluations[name], folder / name)
        told = {name: {"metrics": one.as_json()} for name, one in self.evaluations.items()}
        for name, changes in self.changes.items():
            told[name]["change"] = as_json(changes)
        write_atomic(folder / "visual_dependence.json", json.dumps({"looks": self.looks} | told, indent=2) + "\n")

    def show(self, title: str, console: Console) -> None:
        """Prints a table, and a warning if the agent answers without looking."""
        console.print(metrics_table(title, self.evaluations, width=console.width))
        name = next(iter(self.evaluations[SHOWN].metrics))
        changes = self.changes["blank"]
        told = " and ".join(f"{one} by {written(changes[one], '+.3f')}" for one in (name, "logprob"))
        told = f"blank images change {told}"
        if self.looks:
            say(f"the model looks at its images: {told}", console)
        elif changes["logprob"].high < 0:
            warn(f"the answers depend on the images, but are not seen to be worse without them: {told}", console)
        else:
            warn(f"nothing shows that the model looks at its images: {told}", console)


def measure_sight(
    agent: VLMAgent,
    envs: VisualTaskVectorEnv,
    count: int,
    *,
    greedy: bool,
    mask_share: float,
    seed: int,
    console: Console,
    processes: Processes,
) -> Sight:
    """Measures an agent with the images as shown, and with each change of them.

    Args:
        agent: The agent.
        envs: Environments whose groups are filled with the answers to one sample each.
        count: Number of samples.
        greedy: If true, takes the likeliest tokens.
        mask_share: Share of the patches that are masked.
        seed: Seed of masks and sampling. Each measurement samples alike.
        console: Where progress is shown.
        processes: Ranks that divide the samples.

    Raises:
        SampleError: A sample cannot be shown, and is not to be left out.
        ConfigError: Episodes have several turns.
        DataError: No sample has an image, or none can be shown.
    """
    require(envs.max_turns == 1, "visual_dependence is for episodes of one turn: set max_turns to 1")
    mask, blank = functools.partial(masked, share=mask_share, seed=seed), functools.partial(masked, share=1.0)
    fits = functools.partial(_fits, agent)
    shuffle = Shuffle(seed, fits)
    changes: dict[str, Change] = {"masked": mask, "shuffled": shuffle, "blank": blank}
    watched = _Watched(agent, changes | {"shuffled": Shuffle(seed, fits)})
    agents = {SHOWN: watched} | {name: _Changed(agent, change) for name, change in changes.items()}
    found: dict[str, Evaluation] = {}
    shared: dict[str, Any] = {"greedy": greedy, "console": console, "processes": processes}
    for name, one in agents.items():
        agent.seed(seed + processes.accelerator.process_index)
        found[name] = evaluate(cast(Agent, one), envs, count, title=f"images {name}", **shared)
        if not any(processes.collect([watched.saw_images])):
            raise DataError("none of the samples has an image: visual_dependence has nothing to mask")
    if alone := sum(processes.collect([shuffle.alone])):
        warn(f"{alone} answers had no other images that fit in their batch: shuffled, their images are black", console)
    drops = _with_logprobs(found, watched, processes)
    return Sight(found, {name: _changes(envs.task, found, name) | {"logprob": drops[name]} for name in changes})


def _fits(agent: VLMAgent, observations: list[Observation]) -> bool:
    """True if all prompts leave room for an answer. Images of another sample may take more tokens."""
    try:
        agent.encode(observations)
    except PromptError:
        return False
    return True


def _changes(task: VisualTaskEnv, found: dict[str, Evaluation], name: str) -> dict[str, Interval]:
    before, after = found[SHOWN].answers, found[name].answers
    rewards = [([one["reward"] for one in answers], [1.0] * len(answers)) for answers in (before, after)]
    paired = paired_interval(*rewards, clusters=[one["index"] for one in before])
    return differences(task, before, after) | {"reward": paired}


def _with_logprobs(found: dict[str, Evaluation], watched: _Watched, processes: Processes) -> dict[str, Interval]:
    """Adds the metrics `reward` and `logprob` to the evaluations, and gives the paired falls of the latter."""
    rank = processes.accelerator.process_index
    samples: list[Hashable] = processes.collect([(rank, sample) for sample in watched.samples])
    logprobs = {name: np.array(processes.collect(values)) for name, values in watched.logprobs.items()}
    for name, evaluation in found.items():
        clusters = [one["index"] for one in evaluation.answers]
        rewards = metric_interval([one["reward"] for one in evaluation.answers], clusters=clusters)
        own = metric_interval(logprobs[name], clusters=samples)
        evaluation.metrics |= {"reward": rewards, "logprob": own}
    return {name: metric_interval(one - logprobs[SHOWN], clusters=samples) for name, one in logprobs.items()}


class _Changed:
    """An agent that answers by other images than those shown."""

    def __init__(self, agent: VLMAgent, change: Change) -> None:
        self._agent, self._change = agent, change

    def act(self, observations: Observations) -> list[str]:
        return self._agent.act(self._change(unbatch(observations)))

    def rollout(self, observations: Observations) -> Rollout:
        return self._agent.rollout(self._change(unbatch(observations)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._agent, name)


@dataclass
class _Watched:
    """An agent whose answers' log-probabilities are computed again with other images."""

    agent: VLMAgent
    changes: dict[str, Change]
    saw_images: bool = False
    samples: list[int] = field(default_factory=list)
    """the sample of each answer, numbered as they came"""
    logprobs: dict[str, list[float]] = field(default_factory=dict)
    """by what was done to the images, the mean over each answer's tokens"""

    def act(self, observations: Observations) -> list[str]:
        return self._watch(observations, self.agent.rollout(observations, greedy=True)).texts

    def rollout(self, observations: Observations) -> Rollout:
        return self._watch(observations, self.agent.rollout(observations))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.agent, name)

    def _watch(self, observations: Observations, rollout: Rollout) -> Rollout:
        shown = unbatch(observations)
        self.saw_images |= any(one["images"] or one.get("videos") for one in shown)
        first = self.samples[-1] + 1 if self.samples else 0
        self.samples += (first + group_neighbours(shown)[1]).tolist()
        self._note(SHOWN, rollout)
        for name, change in self.changes.items():
            self._note(name, self.agent.reprompted(rollout, change(shown)))
        return rollout

    @torch.no_grad()
    def _note(self, name: str, rollout: Rollout) -> None:
        found = self.agent.logprobs(rollout)
        means = found.values.sum(dim=1) / found.mask.sum(dim=1).clamp(min=1)
        self.logprobs.setdefault(name, []).extend(means.tolist())
