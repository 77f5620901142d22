"""Leaves out or refuses rows of a data set whose prompts are too long, before anything is generated."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from rich.console import Console

from vlmenv.agents.base import Agent
from vlmenv.agents.families import Family, weightless_family
from vlmenv.agents.pixels import prepared_folder
from vlmenv.agents.vlm import VLMAgent, answer_fault, answer_ids, check_length
from vlmenv.building import check_videos
from vlmenv.core.console import say
from vlmenv.core.errors import ConfigError, DataError, SampleError
from vlmenv.envs.base import VisualTaskEnv
from vlmenv.envs.vector import VisualTaskVectorEnv
from vlmenv.evaluation import progress
from vlmenv.options.task import TaskConfig
from vlmenv.processes.failures import shared_failure
from vlmenv.runs.lengths import Lengths, can_be_counted, count_tokens


@dataclass(frozen=True)
class Room:
    """The tokens that a prompt and its completion may have together."""

    whole: int
    holder: str
    """what has the limit: the model or the engine"""
    answer: int
    """max_new_tokens"""

    @classmethod
    def of(cls, config: TaskConfig, family: Family) -> Room:
        """The room of a model under the options, as far as it is known before an engine starts."""
        engine = config.generation.engine_length if config.generation.engine == "vllm" else None
        return cls.of_model(family, config.sampling.max_new_tokens, engine)

    @classmethod
    def of_agent(cls, agent: VLMAgent) -> Room:
        """The room of an agent, whose engine has started."""
        return cls.of_model(
            agent.family, agent.max_new_tokens, None if agent.engine is None else agent.engine.max_length
        )

    @classmethod
    def of_model(cls, family: Family, answer: int, engine: int | None) -> Room:
        """The room of a model, and of an engine with a limit of its own."""
        own = int(family.model.config.get_text_config().max_position_embeddings)
        shorter = engine is not None and engine < own
        return cls(engine if engine is not None and shorter else own, "engine" if shorter else "model", answer)

    @property
    def prompt(self) -> int:
        """The most tokens of a prompt."""
        return self.whole - self.answer

    def fault(self, tokens: int) -> str:
        """What is wrong with a prompt that is too long."""
        try:
            check_length(tokens, self.answer, self.whole, self.holder)
        except ValueError as error:
            return str(error)
        raise AssertionError(f"a prompt of {tokens} tokens fits")

    @property
    def help(self) -> str:
        """The options that make room."""
        longer = "--engine-length (a longer engine), " if self.holder == "engine" else ""
        return (
            f"--max-pixels (images with fewer tokens), --max-prompt-tokens N (leaves longer rows out), {longer}"
            "a smaller --max-new-tokens, or --skip-broken (leaves these rows out)"
        )


def family_without_weights(config: TaskConfig) -> Family:
    """The model's family, which encodes prompts and computes nothing.

    Raises:
        ConfigError: Its processor refuses an option.
        ModelError: There is no such model, or it cannot be read.
    """
    folder = prepared_folder(config.model, config.pixels)
    return _loaded(folder, tuple(config.prompts.template_switches().items()))


@functools.lru_cache(maxsize=2)
def _loaded(folder: Path, switches: tuple[tuple[str, Any], ...]) -> Family:
    return weightless_family(folder, dict(switches))


def fit_prompts(
    config: TaskConfig,
    envs: VisualTaskVectorEnv,
    accelerator: Accelerator,
    console: Console,
    *,
    agent: VLMAgent | None = None,
    first: int | None = None,
) -> Lengths | None:
    """Counts the tokens of a data set's prompts, leaves rows out as the options say, and refuses others.

    A collective: the main rank counts. Call it before anything looks at the samples.

    Args:
        config: The options.
        envs: Environments whose samples are counted.
        accelerator: The ranks.
        console: What is counted and left out is printed there.
        agent: The agent that is shown them. Default: the model of the options, whose weights are not loaded.
        first: Number of samples that are shown, from the first one. Default: all.

    Returns:
        The lengths of the samples that are left; None without a data set.

    Raises:
        ConfigError: `max_prompt_tokens` is given without a data set, or the task takes videos and the engine none.
        ModelError: A system prompt is given, and the model's chat template has no system turns; or the task takes
            videos, and the model none.
        DataError: A prompt is too long or cannot be made, or no row is left.
    """
    most = config.data.max_prompt_tokens
    check_videos(config, envs.task)
    if not can_be_counted(envs.task):
        if most is not None:
            raise ConfigError("max_prompt_tokens leaves out rows of a data set, and there is none: give a dataset")
        return None
    found: tuple[Room, Lengths] | None = None
    with shared_failure(accelerator):
        if accelerator.is_main_process:
            family = family_without_weights(config) if agent is None else agent.family
            if config.prompts.system_prompt is not None:
                family.require_system_turns()
            lengths = count_tokens(envs.task, family, console, first=first if most is None else None)
            found = Room.of(config, family) if agent is None else Room.of_agent(agent), lengths
    (found,) = broadcast_object_list([found])
    assert found is not None
    with shared_failure(accelerator):
        return _fitted(envs, found[1], found[0], most, console)


def _fitted(envs: VisualTaskVectorEnv, lengths: Lengths, room: Room, most: int | None, console: Console) -> Lengths:
    """The lengths of the samples that stay in the source."""
    lengths = leave_out_longer(envs.task, lengths, most)
    say(f"{lengths}; there is room for {room.prompt:,}", console)
    _skip_or_refuse(envs, lengths, room, console)
    return lengths


def fit_engine(envs: VisualTaskVectorEnv, lengths: Lengths, agent: Agent, console: Console) -> None:
    """Leaves out or refuses prompts without room in an engine, whose limit may be known only after its start.

    Raises:
        DataError: A prompt is too long.
    """
    if isinstance(agent, VLMAgent) and agent.engine is not None:
        _skip_or_refuse(envs, lengths, Room.of_agent(agent), console)


def _skip_or_refuse(envs: VisualTaskVectorEnv, lengths: Lengths, room: Room, console: Console) -> None:
    if not envs.skips_broken:
        require_room(envs.task, lengths, room)
        return
    found = dict(prompt_faults(envs.task, lengths, room))
    faults = {index: fault for index, fault in found.items() if index not in envs.skipped}
    for index, fault in faults.items():
        envs.skip(SampleError(index, fault))
    if faults:
        count = f"{len(faults):,} of {len(lengths.tokens):,} rows"
        say(f"{count} are left out: the model cannot take their prompts", console)


def fit_answers(
    config: TaskConfig,
    envs: VisualTaskVectorEnv,
    accelerator: Accelerator,
    console: Console,
    *,
    agent: VLMAgent | None = None,
) -> None:
    """Finds true answers of a data set that cannot be imitated: longer ones than `max_new_tokens`, or control tokens.

    They are left out if broken rows are, and refused otherwise. A collective: the main rank looks.

    Raises:
        DataError: There are some, and broken rows are not left out.
    """
    if not can_be_counted(envs.task):
        return
    found: dict[int, tuple[int, str]] = {}
    with shared_failure(accelerator):
        if accelerator.is_main_process:
            family, most = (
                (family_without_weights(config), config.sampling.max_new_tokens)
                if agent is None
                else (agent.family, agent.max_new_tokens)
            )
            found = dict(_answer_faults(envs.task, family, most, console))
    (found,) = broadcast_object_list([found])
    found = {index: fault for index, fault in found.items() if index not in envs.skipped}
    if not found:
        return
    count, size = len(found), envs.task.source.size
    with shared_failure(accelerator):
        if not envs.skips_broken:
            longest = max(found, key=lambda index: (found[index][0], -index))
            others = f" {count - 1:,} more of {size:,} rows cannot be imitated either." if count > 1 else ""
            raise DataError(
                f"{found[longest][1]}.{others} What helps: a larger --max-new-tokens, shorter answers, "
                "or --skip-broken (leaves these rows out)"
            )
    for index, (_, fault) in found.items():
        envs.skip(SampleError(index, fault))
    say(f"{count:,} of {size:,} rows are left out: their true answers cannot be imitated", console)


def _answer_faults(
    task: VisualTaskEnv, family: Family, most: int, console: Console
) -> Iterator[tuple[int, tuple[int, str]]]:
    """The samples whose true answers cannot be imitated, with the answers' lengths and the reasons."""
    size = task.source.size or 0
    with progress("reading the true answers", size, console) as advance:
        for index in range(size):
            advance(1)
            try:
                sample = task.source.outline(index)
                ids = answer_ids(family, sample.response or task.write_answer(sample))
            except DataError:  # told where prompts are counted
                continue
            if fault := answer_fault(family, ids, most):
                yield index, (len(ids), f"{task.source.place(index, sample.id)}: {fault}")


def leave_out_longer(task: VisualTaskEnv, lengths: Lengths, most: int | None) -> Lengths:
    """Leaves samples with longer prompts out of a source, and returns the lengths of the others.

    Raises:
        DataError: None is left.
    """
    if most is None or not (long := lengths.above(most)):
        return lengths
    task.source.leave_out(long, f"the prompt has over {most:,} tokens")
    if not task.source.size:
        raise DataError(f"no row is left: all {len(long):,} prompts have over {most:,} tokens; raise max_prompt_tokens")
    return lengths.without(long)


def prompt_faults(task: VisualTaskEnv, lengths: Lengths, room: Room) -> Iterator[tuple[int, str]]:
    """The samples whose prompts the model cannot take, with their places and the reasons."""
    yield from lengths.faults.items()
    for index in lengths.above(room.prompt):
        yield index, f"{_place(task, index)}: {room.fault(int(lengths.tokens[index]))}"


def require_room(task: VisualTaskEnv, lengths: Lengths, room: Room) -> None:
    """Raises DataError if the model cannot take a prompt, or the prompt leaves no room for the answer."""
    count = len(lengths.tokens)
    if lengths.faults:
        first, more = next(iter(lengths.faults.values())), len(lengths.faults) - 1
        others = f" ({more:,} more of {count:,} rows cannot be taken either)" if more else ""
        raise DataError(f"{first}{others}; --skip-broken leaves such rows out")
    if long := lengths.above(room.prompt):
        worst = max(long, key=lambda index: (lengths.tokens[index], -index))
        others = f" {len(long) - 1:,} more of {count:,} rows are too long." if len(long) > 1 else ""
        fault = room.fault(int(lengths.tokens[worst]))
        raise DataError(f"{_place(task, worst)}: {fault}.{others} What helps: {room.help}")


def _place(task: VisualTaskEnv, index: int) -> str:
    return task.source.place(index, task.source.outline(index).id)
