"""The options of `vlmenv doctor`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vlmenv.building import TaskConfig
from vlmenv.commands.train import ModelConfig
from vlmenv.core.errors import ConfigError


@dataclass(frozen=True)
class DoctorConfig(TaskConfig):
    """Check that model, processor, engine and data fit together; ends with status 1 where something does not."""

    config: Path | None = None
    """YAML file of options of `vlmenv train`, such as a run's config.yaml; those on the command line win, and those
    that have no bearing here are passed over."""
    published: str | None = None
    """Model whose processor prompts are compared with, a folder or a name on the hub; `model` where left out."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of forward and backward passes, as in training."""
    prompts_per_step: int = 16
    """Samples in a batch of the training that memory is reckoned for."""
    group_size: int = 8
    """Answers to each of them."""
    micro_batch_size: int | None = None
    """Completions in one pass of it; all of them where left out."""
    micro_batch_tokens: int | None = None
    """Tokens in one pass of it."""
    beta: float = 0.0
    """Weight of the KL penalty of it; above 0 it holds a frozen copy of the model."""
    adaptation: Annotated[ModelConfig, tyro.conf.arg(name="")] = field(default_factory=ModelConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prompts_per_step", "group_size", "micro_batch_size", "micro_batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        if self.beta < 0:
            raise ConfigError(f"beta must not be negative, not {self.beta}")
        if self.temperature == 0:
            raise ConfigError("temperature must be above 0: training needs varied answers")
