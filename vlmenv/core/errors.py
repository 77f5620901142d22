"""Errors that a user can act on. The command line prints their message alone, without a traceback."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence


class VLMEnvError(Exception):
    """Wrong input, named so that the user can put it right."""


class ConfigError(VLMEnvError):
    """An option, or a combination of options, that cannot be run."""


class DataError(VLMEnvError):
    """A data set row or an image that cannot be read; the message names the file and the line."""


class RewardError(VLMEnvError):
    """A reward term that failed, or whose value cannot be used."""


class TrainingError(VLMEnvError):
    """Training that cannot go on."""


class CheckpointError(VLMEnvError):
    """A checkpoint that cannot be written."""


class ModelError(VLMEnvError):
    """A model that is incomplete, of a family that is not known, or computes no numbers."""


class EngineError(VLMEnvError):
    """An engine that failed, or that is not in step with the model that is trained."""


class ReadingError(EngineError):
    """An engine that takes a prompt in otherwise than the trainer.

    Attributes:
        ours: The trainer's tokens.
        theirs: The engine's.
    """

    def __init__(self, message: str, ours: Sequence[int], theirs: Sequence[int]) -> None:
        super().__init__(message)
        self.ours, self.theirs = ours, theirs


class PromptError(VLMEnvError):
    """A prompt that the model cannot take.

    Attributes:
        index: Position of the observation in the batch that was given to the agent.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"observation {index}: {reason}")
        self.index = index
        self.reason = reason


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """A message about an unknown name: the nearest known one of its kind, or all of them."""
    names = sorted(known)
    near = nearest_name(name, names)
    return f"unknown {kind} '{name}'. " + (f"Did you mean '{near}'?" if near else f"Known: {', '.join(names)}.")


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name that was probably meant; None if none is near."""
    found = difflib.get_close_matches(name.casefold(), sorted(known), n=1, cutoff=0.7)
    return found[0] if found else None


def require(condition: bool, message: str) -> None:
    """Raises ConfigError unless an option is as it must be."""
    if not condition:
        raise ConfigError(message)


def require_at_least(least: int, **options: int | None) -> None:
    """Raises ConfigError unless each of the named options is None or at least `least`."""
    for name, value in options.items():
        require(value is None or value >= least, f"{name} must be at least {least}, not {value}")


def require_weight(name: str, value: float) -> None:
    """Raises ConfigError unless an option is a finite number of at least 0."""
    require(0 <= value < math.inf, f"{name} must be finite and at least 0, not {value}")
