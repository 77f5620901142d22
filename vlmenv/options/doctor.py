"""Options of `vlmenv doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlmenv.core.errors import ConfigError, require
from vlmenv.options.train import AlgorithmT, TrainConfig


@dataclass(frozen=True)
class DoctorConfig(TrainConfig[AlgorithmT]):
    """Check that model, processor, engine and data fit together, with the options of the training to come.

    Ends with status 1 if something does not fit.
    """

    published: str | None = None
    """Model whose processor prompts are compared with: a folder, or a name on the hub. None: `model`."""
    card: str | None = None
    """Card to predict the memory of training for, in place of all checks: a size, as 24GB, or a name, as rtx-4090. The
    card need not be there, nor the model's weights. None: the checks."""
    ranks: int = 1
    """Number of cards; goes with `card`."""
    sharding: Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"] = "ddp"
    """Strategy of the ranks: whole copies, FSDP2, or DeepSpeed's ZeRO of a stage; goes with `card`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.ranks >= 1, f"ranks must be at least 1, not {self.ranks}")
        if self.card is None and (self.ranks != 1 or self.sharding != "ddp"):
            raise ConfigError("ranks and sharding go with card: otherwise `accelerate launch` tells them")
        if self.batches.prompts_per_step % self.ranks:
            raise ConfigError(
                f"prompts_per_step={self.batches.prompts_per_step} is not a multiple of {self.ranks} ranks"
            )
