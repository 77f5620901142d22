"""Options of a run on several tasks."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vlmenv.core.errors import ConfigError
from vlmenv.options.fields import options_of, replaced
from vlmenv.options.files import read_options
from vlmenv.options.names import unknown_option
from vlmenv.options.task import DataOptions, PromptOptions

if TYPE_CHECKING:
    from vlmenv.options.train import TrainConfig


@dataclass(frozen=True)
class MixOptions:
    """Several tasks in one run."""

    mix: tuple[str, ...] | None = None
    """Tasks that share each step's groups, with weights, as in `--mix VLM-REC-v0:2 VLM-VQA-v0:1`. A name is that of an
    environment, or of a section of mix_file. None: a single task, env."""
    mix_file: Path | None = None
    """YAML file with a section for each task of the mix that needs options of its own: its data, prompt, rewards and
    evaluation data. None: all tasks have the run's."""

    def __post_init__(self) -> None:
        if self.mix is None and self.mix_file is not None:
            raise ConfigError("mix_file goes with mix, which names its tasks and their weights")
        if self.mix is not None and not self.mix:
            raise ConfigError("mix names tasks, as in --mix VLM-REC-v0:2 VLM-VQA-v0:1")

    @property
    def names(self) -> list[str]:
        """The names of the tasks; empty for a single task."""
        return [_weighted(item)[0].rpartition(":")[2] for item in self.mix or ()]


MIX: Final = "mix.yaml"
"""File of a run's folder with the sections that are used."""


@dataclass(frozen=True)
class Part:
    """A task of a mix."""

    weight: float
    config: TrainConfig[Any]
    """the run's options with those of the task's section, as for a run on the task alone"""


_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_NOT_BY_TASK: Final = ("chat_template_kwargs",)
"""Options of prompts that the agent has for all tasks."""


def parts_of(config: TrainConfig[Any]) -> dict[str, Part]:
    """The tasks of a mix by name, in their order; empty for a run on a single task.

    Raises:
        ConfigError: A weight is no number above 0, a task is named twice, or the file or one of its options is faulty.
    """
    mixing = config.mixing
    if mixing.mix is None:
        return {}
    sections = {} if mixing.mix_file is None else read_options(mixing.mix_file)
    unused, named = dict.fromkeys(sections), dict[str, Part]()
    for item in mixing.mix:
        env, weight = _weighted(item)
        name = env.rpartition(":")[2]
        key = name.replace("-", "_")  # as files of options are read
        if key in {known.replace("-", "_") for known in named}:
            raise ConfigError(f"mix names {name} twice: give its samples one weight, or name sections of a mix_file")
        if not _NAME.fullmatch(name):
            raise ConfigError(f"mix: {name!r} is no name: take letters, digits, and any of . _ + - behind the first")
        named[name] = Part(weight, _of_section(config, env, sections.get(key), f"{mixing.mix_file}: {name}"))
        unused.pop(key, None)
    if unused:
        raise ConfigError(f"{mixing.mix_file}: mix does not name {', '.join(unused)}: add it, or remove the section")
    return named


def _weighted(item: str) -> tuple[str, float]:
    """An environment and its weight; without a number behind the last colon that is 1."""
    name, colon, number = item.rpartition(":")
    try:
        weight = float(number) if colon else 1.0
    except ValueError:
        return item, 1.0  # module:Name
    if not 0 < weight < math.inf:
        raise ConfigError(f"mix: the weight of {name} must be finite and above 0, not {number}")
    return name if colon else item, weight


def _of_section(config: TrainConfig[Any], env: str, section: Any, place: str) -> TrainConfig[Any]:
    """The options of a task."""
    if section is not None and not isinstance(section, Mapping):
        raise ConfigError(f"{place}: a section has options by name, not {section!r}")
    own = dict(section or {})
    known = {"env", *names_by_task(config)}
    for name in own:
        if name not in known:
            raise ConfigError(f"{place}: {_refused(name, config, known)}")
    alone = replace(config, env=str(own.pop("env", env)), mixing=MixOptions())
    return replaced(alone, own, place)


def names_by_task(config: TrainConfig[Any]) -> list[str]:
    """The names of the options that a section may have, besides `env`."""
    own = [*options_of(DataOptions()), *options_of(PromptOptions())]
    own += [name for name in options_of(config.measuring) if name.startswith("eval_") and name not in _OF_ALL]
    return [name for name in own if name not in _NOT_BY_TASK]


_OF_ALL: Final = ("eval_limit", "eval_every")


def _refused(name: str, config: TrainConfig[Any], known: set[str]) -> str:
    if name in options_of(config):
        return f"{name} is an option of the whole run: give it outside of the section"
    return unknown_option(name, sorted(known))
