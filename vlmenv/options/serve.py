"""Options of `vlmenv serve`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vlmenv.core.errors import require
from vlmenv.core.names import BUILTIN
from vlmenv.core.pixels import PixelLimits
from vlmenv.options.task import DataOptions, PromptOptions, VLLMOptions


def _whole_gpu() -> VLLMOptions:
    return VLLMOptions(engine_memory=0.9)


@dataclass(frozen=True)
class ServeConfig:
    """Serve a model with vLLM, to generate for `vlmenv train --engine vllm-server`."""

    model: str = BUILTIN
    """Model to serve, the same as is trained: a shipped one, a checkpoint's or run's folder, or a name on the hub."""
    imports: Annotated[tuple[str, ...], tyro.conf.arg(name="import")] = ()
    """Modules of your own to import first, which register model families."""
    host: str = "127.0.0.1"
    """Address to listen on. Beyond this machine, nothing is encrypted without `--tls-cert`."""
    port: int = 8000
    """Port to listen on."""
    socket: Path | None = None
    """Unix socket to listen on instead of host and port, in a folder that only this account can use. A missing folder
    is made."""
    tls_cert: Path | None = None
    """File of the certificate (PEM, with its chain) for https. It goes with `--tls-key`."""
    tls_key: Path | None = None
    """File of the certificate's private key (PEM, without a password)."""
    weights: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Data type of the weights that generate. bf16 goes with `--precision bf16` in training."""
    pixels: PixelLimits = field(default_factory=PixelLimits)
    vllm: VLLMOptions = field(default_factory=_whole_gpu)

    def __post_init__(self) -> None:
        require(0 < self.port < 65536, f"port is a number from 1 to 65535, not {self.port}")
        tls = self.tls_cert is not None
        require(tls == (self.tls_key is not None), "tls_cert and tls_key go together: give both, or neither")
        if self.socket is not None:
            others = {"host": self.host != ServeConfig.host, "port": self.port != ServeConfig.port, "tls_cert": tls}
            given = [name for name, changed in others.items() if changed]
            require(not given, f"{' and '.join(given)} cannot go with socket: a socket replaces host and port")


@dataclass(frozen=True)
class ServeEnvConfig:
    """Serve an environment over HTTP and WebSocket in OpenEnv's form. It needs `pip install "vlmenv[openenv]"`."""

    env: tyro.conf.Positional[str] = "VLM-REC-v0"
    """Environment; one of your own is named with its module, as in my_task:My-Task-v0."""
    host: str = "127.0.0.1"
    """Address to listen on. Nothing is encrypted."""
    port: int = 8001
    """Port to listen on."""
    sessions: int = 8
    """Most sessions at a time."""
    seed: int = 0
    """Seed of the samples that are shown."""
    data: DataOptions = field(default_factory=DataOptions)
    prompts: PromptOptions = field(default_factory=PromptOptions)

    def __post_init__(self) -> None:
        require(0 < self.port < 65536, f"port is a number from 1 to 65535, not {self.port}")
        require(self.sessions >= 1, f"sessions must be at least 1, not {self.sessions}")
        require(self.seed >= 0, f"seed must be at least 0, not {self.seed}")
        require(self.prompts.chat_template_kwargs is None, "chat_template_kwargs belong to whoever calls the model")
        require(self.prompts.coordinates != "resized", "coordinates resized need a model's sizes: name another")
