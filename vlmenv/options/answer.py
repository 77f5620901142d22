"""Options of `vlmenv answer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vlmenv.core.errors import ConfigError, require
from vlmenv.core.names import BUILTIN
from vlmenv.core.pixels import PixelLimits
from vlmenv.options.task import Device


@dataclass(frozen=True)
class AskConfig:
    """Ask a model about your own pictures: print its answers, and draw the places that they name."""

    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files. Each is asked about by itself, unless the prompt has a mark <image> for each of them."""
    prompt: str | None = None
    """Prompt, or the question that a task's own prompt is made of."""
    model: str = BUILTIN
    """Model: "builtin" or "builtin-tasks", a checkpoint's folder, a run's folder (its best or newest checkpoint), a
    folder of adapters, or a name on the Hugging Face hub."""
    env: str | None = None
    """Environment whose prompt, system prompt and answer format are used. None: those of the run that the model is
    from, and VLM-REC-v0 for the built-in model; for any other model the prompt is sent as it is."""
    plain: bool = False
    """Send the prompt as it is in any case. Places are then looked for in the whole answer."""
    interactive: bool = False
    """Ask for prompts, one after the other, until an empty one."""
    imports: Annotated[tuple[str, ...], tyro.conf.arg(name="import")] = ()
    """Modules of your own to import first, which register tasks and model families."""
    output: Path | None = None
    """Folder for the pictures. None: beside each image, as IMAGE.answer.png."""
    coordinates: Literal["auto", "original", "resized", "norm1000"] = "auto"
    """Convention of coordinates in answers: pixels of the stored image, pixels of the resized image that the model
    sees, or thousandths. "auto": the run's, or else the one that the model was trained with."""
    temperature: float = 0.0
    """Sampling temperature. 0 takes the most likely token."""
    max_new_tokens: int = 512
    """Length limit of an answer in tokens."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """Data type in which the model is loaded and computes."""
    device: Device = "auto"
    """Device of the model. "auto": a GPU if there is one."""
    seed: int = 0
    """Seed of sampling."""
    pixels: PixelLimits = field(default_factory=PixelLimits)

    def __post_init__(self) -> None:
        require(self.temperature >= 0, f"temperature must not be negative, not {self.temperature}")
        require(self.max_new_tokens >= 1, f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        require(0 <= self.seed < 2**63, f"seed must be from 0 to 2**63 - 1, not {self.seed}")
        if self.plain and self.env is not None:
            raise ConfigError("plain sends the prompt without a task's: leave out --env or --plain")
