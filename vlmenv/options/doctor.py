"""Options of `vlmenv doctor`."""

from __future__ import annotations

from dataclasses import dataclass

from vlmenv.options.train import AlgorithmT, TrainConfig


@dataclass(frozen=True)
class DoctorConfig(TrainConfig[AlgorithmT]):
    """Check that model, processor, engine and data fit together, with the options of the training to come.

    Ends with status 1 if something does not fit.
    """

    published: str | None = None
    """Model whose processor prompts are compared with: a folder, or a name on the hub. None: `model`."""
