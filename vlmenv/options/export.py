"""Options of `vlmenv export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vlmenv.core.errors import ConfigError, require


@dataclass(frozen=True)
class ExportConfig:
    """Write a trained model as others load it: weights, processor, licence and a model card."""

    model: tyro.conf.Positional[str]
    """Run's folder, checkpoint's folder, or adapter's folder."""
    target: tyro.conf.Positional[Path | None] = None
    """Folder to write, which must be new. None: the name of the run or model with "-export", in the present folder."""
    imports: Annotated[tuple[str, ...], tyro.conf.arg(name="import")] = ()
    """Modules of your own to import first, which register model families."""
    step: str | None = None
    """Checkpoint of the run: a step's number, or best. None: the best one if the run measured on its way, else the
    newest."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Data type of the weights. None: that of the base model's files; of adapters float32."""
    merged: bool = False
    """Merge adapters into the model's weights. Default: adapters are written alone, in peft's format."""
    adapter: bool = False
    """Write adapters alone, or fail if all weights were trained."""
    hub: str | None = None
    """Name of a repository on the Hugging Face hub, as in "me/my-model", to upload to. A new one is private."""

    def __post_init__(self) -> None:
        if self.merged and self.adapter:
            raise ConfigError("merged and adapter exclude each other: leave one of them out")
        known = self.step is None or self.step == "best" or self.step.isdecimal()
        require(known, f"step is a number or best, not {self.step}")
        require(self.hub is None or _is_repository(self.hub), f"hub is a name such as me/my-model, not {self.hub}")


def _is_repository(name: str) -> bool:
    """True if the hub takes a name with an owner."""
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # here: --help need not wait for it

    try:
        validate_repo_id(name)
    except ValueError:
        return False
    return "/" in name
