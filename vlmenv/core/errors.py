"""Errors that a user can act on. The command line prints their message without a traceback."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence


class VLMEnvError(Exception):
    """Wrong input. The message names it and tells what to do."""


class ConfigError(VLMEnvError):
    """An invalid option or combination of options."""


class DataError(VLMEnvError):
    """A row or an image that cannot be read. The message names file and line."""


class SampleError(DataError):
    """A sample that cannot be shown, or that a model cannot take; the message names its file, line and id.

    Attributes:
        index: Of the sample, within its source.
    """

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


class RewardError(VLMEnvError):
    """A reward term that failed or gave an invalid value."""


class TrainingError(VLMEnvError):
    """Training that cannot continue."""


class CheckpointError(VLMEnvError):
    """A checkpoint that cannot be written."""


class ModelError(VLMEnvError):
    """A model that is incomplete, of an unknown family, or with non-finite outputs."""


class EngineError(VLMEnvError):
    """An engine that failed, or that does not have the trainer's model."""


class ReadingError(EngineError):
    """An engine that encodes a prompt differently from the trainer.

    Attributes:
        ours: The trainer's tokens.
        theirs: The engine's tokens.
    """

    def __init__(self, message: str, ours: Sequence[int], theirs: Sequence[int]) -> None:
        super().__init__(message)
        self.ours, self.theirs = ours, theirs


class PromptError(VLMEnvError):
    """A prompt that the model cannot take.

    Attributes:
        index: Index of the observation in the agent's batch.
        reason: The reason, without the index.
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
    found = difflib.get_close_matches(name.casefold(), sorted(known), n=1, cutoff=0.65)
    return found[0] if found else None


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_at_least(least: int, **options: int | None) -> None:
    """Raises ConfigError unless each of the named options is None or at least `least`."""
    for name, value in options.items():
        require(value is None or value >= least, f"{name} must be at least {least}, not {value}")


def require_weight(name: str, value: float) -> None:
    """Raises ConfigError unless an option is a finite number of at least 0."""
    require(0 <= value < math.inf, f"{name} must be finite and at least 0, not {value}")
